"""What stands in for values, and for what fake tensors and groups do not do, in a dry run."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses import fake_impls
from torch.utils._python_dispatch import _disable_current_modes

from megatron_psft.diagnostics.plan import Plan
from megatron_psft.head.kernels import portable


@contextmanager
def answers(plan: Plan) -> Iterator[None]:
    """As the docstring of `dry_run.py` says; of a step, or of a pass that scores."""
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    new_group = dist.new_group
    aten = torch.ops.aten
    experts = plan.shape.experts
    share = 1.0 if experts is None else experts.per_token / experts.count

    def fake_group(ranks: Any = None, *args: Any, backend: Any = None, **options: Any) -> Any:
        return new_group(ranks, *args, backend="fake", **options)

    def gather_objects(found: list[Any], own: Any, group: Any = None) -> None:
        found[:] = [own] * len(found)

    def scalar(mode: Any, func: Any, tensor: torch.Tensor) -> float:
        return 1.0 if tensor.is_floating_point() else 1

    def every(mode: Any, func: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty((tensor.numel(), tensor.dim()), dtype=torch.int64)

    def chosen(mode: Any, func: Any, tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty(round(mask.numel() * share))

    operations = {
        aten._local_scalar_dense.default: scalar,
        aten.nonzero.default: every,
        aten.masked_select.default: chosen,
    }
    with ExitStack() as stack:
        for target, name, answer in (
            (dist, "new_group", fake_group),
            (dist, "all_gather_object", gather_objects),
            (torch.nn.Module, "_apply", _apply),
            # Fewer operations, and 24 MiB more of scratch memory.
            (portable, "_CPU_BLOCK_BYTES", 32 * 2**20),
            (dispatcher, "maybe_move_tensor_to_cpu", _even_counts(plan)),
        ):
            stack.enter_context(mock.patch.object(target, name, answer))
        stack.enter_context(mock.patch.dict(fake_impls.op_implementations_dict, operations))
        yield


def _apply(module: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    """As torch's, which swaps parameters in a way that fake ones do not allow."""
    for child in module.children():
        child._apply(function)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else function(buffer)
    for name, parameter in module._parameters.items():
        if parameter is None or (made := function(parameter.detach())).dtype == parameter.dtype:
            continue
        module._parameters[name] = torch.nn.Parameter(made, requires_grad=parameter.requires_grad)
        vars(module._parameters[name]).update(vars(parameter))
    return module


def _even_counts(plan: Plan) -> Any:
    """How many tokens go where, by the shape in which Megatron-Core asks for it."""
    experts, parallel = plan.shape.experts, plan.config.parallel
    if experts is None:
        return None
    ranks, shared = parallel.expert_model_parallel_size, parallel.expert_tensor_size
    local = experts.count // ranks
    positions = plan.tokens(plan.config.batch.micro_batch_size) / parallel.tensor_model_parallel_size
    each = int(positions * experts.per_token / experts.count)

    def counts(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return tensor
        if as_numpy:  # to or from each rank with other experts, or from each that has a part of the same
            value = each * local * (1 if tensor.shape == (ranks,) else ranks)
        else:  # of each expert from each rank, or of each expert here
            value = each * (1 if tensor.dim() == 2 else ranks * shared)
        with _disable_current_modes():
            filled = np.full(tuple(tensor.shape), value)
            return filled if as_numpy else torch.from_numpy(filled)

    return counts
