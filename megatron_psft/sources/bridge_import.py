"""Imports Megatron-Bridge: which takes seconds, wants libraries that only a GPU has, and may not be there."""

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_psft.errors import UserError

_LINE = "0.6"
"""Of the releases whose way of reading each family was compared."""

_ABSENT = (
    *("transformer_engine", "transformer_engine.common", "transformer_engine.common.recipe"),
    *("transformer_engine.pytorch", "transformer_engine.pytorch.fp8", "transformer_engine.pytorch.ops"),
    *("nvidia_resiliency_ext", "nvidia_resiliency_ext.inprocess"),
)
"""What Bridge names as it is imported, and does not use as a source of models on a CPU."""

_LEFT_OUT = "modelopt"
"""A library of quantization that takes longer to import than all of Bridge, and changes others as it is. Those who
import it along can do without."""

_DELTA_NET = {"fla": "flash-linear-attention"}
_KERNELS = {
    "qwen3_next": _DELTA_NET,
    "qwen3_5_text": _DELTA_NET,
    "nemotron_h": {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"},
}
"""What layers of a family compute with on a GPU besides Transformer Engine: modules, and what pip calls them."""

REMEDY = "pip install 'megatron_psft[nemo]', on Python 3.12"


def has_bridge() -> bool:
    """Whether Megatron-Bridge is installed; it is not imported."""
    return importlib.util.find_spec("megatron.bridge") is not None


@functools.cache
def import_bridge() -> Any:
    """Bridge's `AutoBridge`. On a CPU its layers are those of model/portable_engine.py from then on.

    Raises:
        UserError: Bridge is not installed, or of another line; on a GPU also where Transformer Engine is missing.
    """
    if not has_bridge():
        raise UserError(f"a model from Megatron-Bridge needs megatron-bridge {_LINE}: {REMEDY}")
    version = importlib.metadata.version("megatron-bridge")
    if not version.startswith(f"{_LINE}."):
        raise UserError(
            f"a model from Megatron-Bridge needs megatron-bridge {_LINE}, and {version} is installed: models of "
            f"another line were not compared; {REMEDY}"
        )
    logging.getLogger("megatron.bridge").setLevel(logging.ERROR)
    if torch.cuda.is_available():
        if importlib.util.find_spec("transformer_engine") is None:
            raise UserError(
                "a model from Megatron-Bridge needs Transformer Engine on a GPU: pip install "
                "'transformer-engine[pytorch]'"
            )
        return _auto_bridge()
    from megatron_psft.model.portable_engine import stand_in_for_engine
    from megatron_psft.model.portable_recurrence import stand_in_for_kernels

    stand_in_for_engine()
    stand_in_for_kernels()
    torch.compiler.set_stance("force_eager")  # what Bridge's models have compiled would need a C++ compiler
    with _standing_in():
        return _auto_bridge()


def _auto_bridge() -> Any:
    """Without what Bridge has to say of libraries that are not there, tracebacks among it."""
    silenced = logging.root.manager.disable
    logging.disable(logging.WARNING)
    is_left_out = _LEFT_OUT not in sys.modules
    if is_left_out:
        sys.modules[_LEFT_OUT] = None  # type: ignore[assignment] # to import it is an ImportError
    try:
        return importlib.import_module("megatron.bridge").AutoBridge
    finally:
        logging.disable(silenced)
        if is_left_out:
            del sys.modules[_LEFT_OUT]


def check_kernels(model_type: str) -> None:
    """Raises UserError where a GPU is to compute a model whose layers want a library that is not installed."""
    for module in _KERNELS.get(model_type, {}):
        if torch.cuda.is_available() and importlib.util.find_spec(module) is None:
            raise UserError(
                f"model_type ({model_type}) from Megatron-Bridge needs {module} on a GPU: "
                f"pip install {' '.join(_KERNELS[model_type].values())}"
            )


@contextmanager
def _standing_in() -> Iterator[None]:
    """Modules of these names for as long as this context lasts: whoever looks for the libraries later finds none."""
    for name in _ABSENT:
        module = _Absent(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        yield
    finally:
        for name in _ABSENT:
            sys.modules.pop(name, None)


class _Absent(types.ModuleType):
    """Has any name, as a class that nothing uses."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (torch.nn.Module,), {})
