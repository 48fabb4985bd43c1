"""Imports Megatron-Core in two thirds of the time that it would take."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from megatron_psft.distributed.quick_imports import quick_imports

_compile = torch.compile
_has_gpu = torch.cuda.is_available
_UNUSED = ("wandb", "torch.utils.tensorboard")
"""Megatron-Core imports them, where installed, for timers and an inference engine that no run of ours starts."""


def import_megatron() -> None:
    """Imports Megatron-Core without what a run may never use: torch's compiler, which every function that it fuses
    would load as it is defined, and trackers. Later imports find all as they are; a Megatron-Core that has been
    imported before stays as it is."""
    hidden = [name for name in _UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # which makes their import fail
    torch.compile = compile_when_called  # type: ignore[assignment]
    try:
        with quick_imports():
            import megatron.core  # noqa: F401
    finally:
        torch.compile = _compile
        for name in hidden:
            del sys.modules[name]


def compile_when_called(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """`torch.compile`, as a function or a decorator, whose work begins with the first call of what it returns. Without
    a GPU there is none: it would take seconds and a compiler of C++, for functions that a CPU computes in no time."""
    if function is None:
        return functools.partial(compile_when_called, **options)
    compiled = functools.cache(lambda: _compile(function, **options) if _has_gpu() else function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Where its caller is being compiled, it is a part of that.
        return (function if torch.compiler.is_compiling() else compiled())(*args, **kwargs)

    return call
