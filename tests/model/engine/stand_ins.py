"""Imports Transformer Engine's layers where there is no GPU: stand-ins for its compiled library, which compute nothing.

For a process of its own, which has the folder of requirements.txt on its path and imports this before anything else.
"""

import enum
import importlib.machinery
import importlib.metadata
import os
import sys
import types
from collections.abc import Callable
from typing import Any


class _Meta(type):
    """Of classes that also count, and answer to whatever they are asked for."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, _make(name))
        return cls.__dict__[name]

    def __int__(cls) -> int:
        return 0

    __index__ = __int__

    def __or__(cls, other: Any) -> Any:
        return cls

    def __lt__(cls, other: Any) -> bool:
        return False


def _make(name: str) -> Any:
    return _Meta(name, (), {"__init__": lambda *_, **__: None, "__call__": lambda *_, **__: None})


class _Anything:
    """A value that can be called and asked for anything; as a decorator it changes nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else _Anything()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __getitem__(self, key: Any) -> Any:
        return _Anything()


def _stand_in(name: str, make: Callable[[str], Any]) -> Any:
    class Module(types.ModuleType):
        def __getattr__(self, attribute: str) -> Any:
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            setattr(self, attribute, make(attribute))
            return self.__dict__[attribute]

    module: Any = Module(name)
    module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
    module.__file__ = "stand-in"
    sys.modules[name] = module
    return module


def _import_engine() -> None:
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # keeps it from loading its compiled library
    compiled = _stand_in("transformer_engine_torch", _make)
    dtypes = {"kByte": 0, "kInt32": 2, "kFloat32": 4, "kFloat16": 5, "kBFloat16": 6, "kFloat8E4M3": 7}
    compiled.DType = enum.IntEnum("DType", {**dtypes, "kFloat8E5M2": 8, "kFloat4E2M1": 10})
    backends = {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
    compiled.NVTE_Fused_Attn_Backend = enum.IntEnum("Backend", backends)
    for name in ("onnx", "onnx.defs", "onnxscript", "onnxscript.function_libs", "onnx_ir"):
        _stand_in(name, lambda _: _Anything())
    version = importlib.metadata.version
    own = version("transformer_engine")  # which also answers for the packages of its compiled parts
    importlib.metadata.version = lambda name: (
        own if name.startswith("transformer") and "engine" in name else version(name)
    )
    import transformer_engine.common as common

    common.load_framework_extension = lambda *_, **__: None
    import transformer_engine.pytorch  # noqa: F401


def _pretend_hopper() -> None:
    """What Transformer Engine asks of a device when its layers are built."""
    import torch

    from megatron_psft.distributed import cpu_shims

    cpu_shims.do_without_engine = lambda: None
    cpu_shims.adapt_to_cpu()
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="H100")
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.is_available = lambda: True
    torch.cuda._lazy_init = lambda: None


_import_engine()
_pretend_hopper()
