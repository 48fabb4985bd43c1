"""Everything that lets Megatron-Core run without a GPU.

Megatron-Core is written against `torch.cuda`. On a CPU `adapt_to_cpu` answers those calls, so that the trainer's code
is the same on a laptop and on a cluster. On a GPU nothing of that is touched. No other file of this package but
megatron_lines.py and megatron_import.py patches another library.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_psft.distributed.megatron_import import import_megatron
from megatron_psft.distributed.megatron_lines import do_without_engine

_TO_DEVICE = frozenset({torch.Tensor.cuda, torch.Tensor.pin_memory})


@functools.cache
def adapt_to_cpu() -> None:
    """Answers Megatron-Core's `torch.cuda` calls for the CPU; later calls do nothing.

    Must run before a Megatron-Core model is built. Changes `torch` for the whole process: where there is a GPU, neither
    this process nor those that it starts will see it.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import_megatron()  # which finds no GPU to look at
    _answer_device_queries()
    _answer_streams()
    _answer_random_state()
    _answer_fused_optimizers()
    _answer_gradient_norm()
    _answer_token_counts()
    _answer_offloading()
    do_without_engine()
    _CudaIsCpu().__enter__()  # for good: Megatron-Core names the device in many places


def plain_operations() -> contextlib.AbstractContextManager[None]:
    """For work of thousands of operations that names no device: without a GPU most of its time would go into answers
    that it does not need."""
    return contextlib.nullcontext() if torch.cuda.is_available() else torch._C.DisableTorchFunction()


class _CudaIsCpu(TorchFunctionMode):
    """Lets tensors that are asked to live on CUDA live on the CPU, for two microseconds per operation or query.

    Wrapping the factory functions would be cheaper, but torch recognizes them by identity: `with torch.device("meta")`,
    by which transformers builds its models, would silently leave memory uninitialized.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _TO_DEVICE:
            return args[0]
        if kwargs:
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs = {**kwargs, "device": "cpu"}
            return func(*args, **kwargs)
        result = func(*args)
        if func is torch.Tensor.type and isinstance(result, str):
            # The optimizers recognize parameters by `param.type() == "torch.cuda.FloatTensor"`.
            return result.replace("torch.", "torch.cuda.", 1)
        return result


class _HostIsNoDevice(TorchFunctionMode):
    """Takes tensors for CUDA's, but not those that were moved to the host nor what is made of them.

    Megatron-Core's optimizer that offloads tells by this which tensors have a copy on the host.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_on_host = func is torch.Tensor.cpu or any(getattr(arg, "is_on_host", False) for arg in args)
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined] # a new object each time
            return not is_on_host
        result = func(*args, **kwargs or {})
        if is_on_host and isinstance(result, torch.Tensor):
            result.is_on_host = True  # type: ignore[attr-defined]
        return result


class _Stream:
    """A stream or event of a device that runs everything in order: all waiting is over at once."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: "_Stream | None" = None) -> "_Stream":
        return event or _Stream()

    def query(self) -> bool:
        return True


def _answer_device_queries() -> None:
    _replace(
        torch.cuda,
        # CUDA has read which GPUs are visible if anything has asked before.
        is_available=lambda: False,
        device_count=lambda: 0,
        current_device=lambda: torch.device("cpu"),
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
        FloatTensor=torch.FloatTensor,
    )


def _answer_streams() -> None:
    _replace(
        torch.cuda,
        Stream=_Stream,
        Event=_Stream,
        current_stream=lambda device=None: _Stream(),
        default_stream=lambda device=None: _Stream(),
        stream=lambda stream: contextlib.nullcontext(),
    )


def _answer_random_state() -> None:
    """Megatron-Core forks the device's generator for dropout and recompute; here it forks the CPU's."""
    import megatron.core.tensor_parallel.random as megatron_random

    def get_state(device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: object, **kwargs: object) -> None:
        torch.set_rng_state(state)

    _replace(torch.cuda, manual_seed=torch.manual_seed, get_rng_state=get_state, set_rng_state=set_state)
    _replace(torch.cuda.random, get_rng_state=get_state, set_rng_state=set_state)
    # Megatron-Core's own setter queues the call until CUDA is initialized, which never happens here.
    _replace(megatron_random, _set_cuda_rng_state=set_state)


def _answer_fused_optimizers() -> None:
    """Transformer Engine's and Apex's kernels, which Megatron-Core takes on import where they are installed."""
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
    from megatron.core.utils import local_multi_tensor_applier, local_multi_tensor_scale

    _replace(optimizers, Adam=torch.optim.AdamW, SGD=torch.optim.SGD, USING_PYTORCH_OPTIMIZER=True)
    for module in (clip_grads, optimizer):
        _replace(
            module, multi_tensor_applier=local_multi_tensor_applier, multi_tensor_scale_impl=local_multi_tensor_scale
        )
    _replace(distrib_optimizer, HAVE_APEX_OR_TE=False, USING_TE_OPTIMIZER=False, USING_APEX_OPTIMIZER=False)


def _answer_gradient_norm() -> None:
    import megatron.core.optimizer.clip_grads as clip_grads

    _replace(clip_grads, l2_norm_impl=_l2_norm)


def _answer_token_counts() -> None:
    """How many tokens go to which rank's experts: read from the device as the numbers that collectives take."""
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    _replace(token_dispatcher, maybe_move_tensor_to_cpu=to_host)


def _answer_offloading() -> None:
    """Which parameters Megatron-Core's optimizer updates on the host, where all of them are."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    divide = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def divide_parameters(optimizer: Any, offload_fraction: float) -> Any:
        with _HostIsNoDevice():
            return divide(optimizer, offload_fraction)

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = divide_parameters


def _l2_norm(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Norm over all elements of the first list, fp32 `[1]`, as the norm of the norms of short rows.

    Stands in for `torch.norm`, which on the CPU adds all squares into a few fp32 numbers: over an embedding's 10^8
    elements its error is above 1 %, here it is below 1e-6 (and the rows are also faster).
    """
    norms = [torch.linalg.vector_norm(row_block, dim=-1).flatten() for x in tensor_lists[0] for row_block in _rows(x)]
    return torch.linalg.vector_norm(torch.cat(norms)).reshape(1), None


def _rows(tensor: torch.Tensor, length: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    """The flat tensor as rows of `length` elements, and what is left over."""
    flat = tensor.flatten()
    whole = flat.numel() // length * length
    return flat[:whole].view(-1, length), flat[whole:]


def _replace(module: ModuleType, **answers: object) -> None:
    for name, answer in answers.items():
        setattr(module, name, answer)
