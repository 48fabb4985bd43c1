"""Runs a module that uses Megatron-Bridge on the CPU: on the ranks of a pool, or in a process of its own by
`python -m tests.nemo.cpu MODULE ARGUMENTS`.

Bridge, unlike Megatron-Core, cannot be imported without Transformer Engine and nvidia-resiliency-ext, and asks for CUDA
by name. The two get stand-ins, once Megatron-Core has seen that they are not there, the engine's layers portable ones,
so that models are built by Bridge's own specifications, and CUDA's questions the CPU's answers, beyond those of
megatron_psft.distributed.cpu_shims.
"""

import functools
import importlib
import importlib.machinery
import sys
import types

import torch

from megatron_psft.distributed.cpu_shims import adapt_to_cpu
from megatron_psft.model.portable_engine import stand_in_for_engine
from tests.support.cli import Exit, call_main

_ENGINE = ("", ".common", ".common.recipe", ".pytorch", ".pytorch.fp8", ".pytorch.ops")
_STAND_INS = [*(f"transformer_engine{name}" for name in _ENGINE), "nvidia_resiliency_ext"]
_STAND_INS += ["nvidia_resiliency_ext.inprocess"]
_MEGATRON = ("distributed", "extensions.transformer_engine", "models.gpt.gpt_layer_specs", "optimizer")


class _StandIn(types.ModuleType):
    """A module that has any name, as a class that nothing may use."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (torch.nn.Module,), {})


def run(module: str, argv: list[str]) -> Exit:
    """What the module's `main` does on this rank; for `pool.run` of a pool that runs nothing else."""
    prepare()
    return call_main(importlib.import_module(module).main, argv)


@functools.cache
def prepare() -> None:
    """Changes torch and `sys.modules` for the whole process, before Megatron-Bridge is imported."""
    torch.compiler.set_stance("force_eager")  # what Megatron-Core compiles would need a C++ compiler
    adapt_to_cpu()
    for name in _MEGATRON:
        importlib.import_module(f"megatron.core.{name}")
    for name in _STAND_INS:
        _install(name)
    stand_in_for_engine()
    _answer_as_cuda()
    import megatron.core.datasets.utils as datasets_utils

    datasets_utils.compile_helpers = lambda: None  # needs a compiler, for data sets that are not read here


def _install(name: str) -> None:
    module = _StandIn(name)
    module.__path__ = []
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
    module.__version__ = "0"
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _answer_as_cuda() -> None:
    properties = types.SimpleNamespace(major=8, minor=0, total_memory=2**34, name="CPU", multi_processor_count=1)
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "is_current_stream_capturing": lambda: False,
        "memory_stats": lambda *args: {},
        "get_device_properties": lambda *args: properties,
        "get_device_capability": lambda *args: (8, 0),
        "reset_peak_memory_stats": lambda *args: None,
        **{f"{prefix}memory_{kind}": lambda *args: 0 for prefix in ("", "max_") for kind in ("allocated", "reserved")},
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


if __name__ == "__main__":
    prepare()
    # Its `main`, as under its own `__main__`: which stays this module, that helper processes import again.
    sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
