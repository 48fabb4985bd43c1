"""The scores of the old policy's window as a checkpoint has them: whole packs, for a run in any layout."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_psft.data.loader import BatchLoader
from megatron_psft.distributed.collective import sum_over_replicas
from megatron_psft.distributed.grid import Parallel
from megatron_psft.scoring.packs import from_packs, to_packs

_STEPS_AT_ONCE = 16
"""Summed in one collective: each has all ranks wait for each other, and the largest windows are whole epochs."""


def sharded_window(
    steps: Iterable[int],
    loader: BatchLoader,
    parallel: Parallel,
    *,
    scores: Mapping[int, Sequence[Tensor]] | None = None,
) -> dict[str, ShardedTensor]:
    """Checkpoint tensors `[global batch, longest pack]` fp32 by step, of each an equal part of the packs, whoever is
    trained on them here.

    They hold no padding that a layout may add, and each pack whole, in the order of the batch, so that any layout can
    read them. For ranks of the last pipeline stage; collective over those that share rows or the weights.

    Args:
        steps: that the checkpoint has, or is to have.
        loader: of the training batches.
        parallel: this rank's place.
        scores: `OldPolicyWindow.state`, to write; None to read into zeros.
    """
    steps = list(steps)
    parts = {step: _part(step, loader, parallel) for step in steps}
    if scores is None:
        packs = {step: torch.zeros(len(parts[step]), loader.unpadded_length(step)) for step in steps}
    else:
        own = ((step, loader.own_numbers(step), to_packs(loader, step, scores[step])) for step in steps)
        wholes = _of_all_ranks(own, loader, parallel)
        packs = {step: whole[parts[step].start : parts[step].stop].clone() for step, whole in wholes}
    return {
        str(step): ShardedTensor(
            key=f"old_log_probs.{step}",
            data=packs[step],
            dtype=torch.float32,
            local_shape=tuple(packs[step].shape),
            global_shape=(loader.batch_packs(step), packs[step].shape[1]),
            global_offset=(part.start, 0),
            axis_fragmentations=None,
            replica_id=parallel.context_rank * parallel.tensor_size + parallel.tensor_rank,
        )
        for step, part in parts.items()
        if len(part)
    }


def window_state(
    steps: Iterable[int], packs: Mapping[str, Tensor] | None, loader: BatchLoader, parallel: Parallel
) -> dict[int, list[Tensor]]:
    """`OldPolicyWindow.state` from the tensors that `sharded_window` describes; None on ranks of other stages.
    Collective, as `sharded_window`."""
    if packs is None:
        return {step: [] for step in steps}

    def read(step: int) -> Tensor:
        part = packs.get(str(step), torch.zeros(0, loader.unpadded_length(step)))
        # Context-parallel ranks have all read the same: one of them counts.
        return part if parallel.context_rank == 0 else torch.zeros_like(part)

    own = ((step, _part(step, loader, parallel), read(step)) for step in steps)
    return {
        step: from_packs(loader, step, whole[loader.own_numbers(step)])
        for step, whole in _of_all_ranks(own, loader, parallel)
    }


def _part(step: int, loader: BatchLoader, parallel: Parallel) -> range:
    """The packs of a global batch, by number, that this data-parallel replica reads and writes."""
    count, size, rank = loader.batch_packs(step), parallel.data_size, parallel.data_rank
    return range(count * rank // size, count * (rank + 1) // size)


def _of_all_ranks(
    own: Iterable[tuple[int, Sequence[int], Tensor]], loader: BatchLoader, parallel: Parallel
) -> Iterator[tuple[int, Tensor]]:
    """`[global batch, longest pack]` by step, on the CPU. `own`: by step the numbers of the packs that this rank has
    some of, and these packs, zero where another has it."""
    own = iter(own)
    while some := list(islice(own, _STEPS_AT_ONCE)):
        batches = [torch.zeros(loader.batch_packs(step), packs.shape[1]) for step, _, packs in some]
        for batch, (_, numbers, packs) in zip(batches, some, strict=True):
            batch[list(numbers)] = packs
        flat = sum_over_replicas(torch.cat([batch.flatten() for batch in batches]), parallel).cpu()
        sizes = [batch.numel() for batch in batches]
        for (step, *_), batch, values in zip(some, batches, flat.split(sizes), strict=True):
            yield step, values.view_as(batch)
