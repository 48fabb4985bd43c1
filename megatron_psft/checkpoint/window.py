"""The scores of the old policy's window as a checkpoint has them: whole packs, for a run in any layout."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_psft.data.loader import BatchLoader
from megatron_psft.distributed.collective import sum_over_context, sum_over_data
from megatron_psft.distributed.grid import Parallel
from megatron_psft.scoring.packs import from_packs, to_packs


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
    sharded = {}
    for step in steps:
        part, width = _part(step, loader, parallel), loader.unpadded_length(step)
        if scores is None:
            packs = torch.zeros(len(part), width)
        else:
            own = sum_over_context(to_packs(loader, step, scores[step]), parallel).cpu()
            packs = _of_all_ranks(step, own, loader.own_numbers(step), loader, parallel)[part.start : part.stop].clone()
        if not len(part):
            continue
        sharded[str(step)] = ShardedTensor(
            key=f"old_log_probs.{step}",
            data=packs,
            dtype=packs.dtype,
            local_shape=tuple(packs.shape),
            global_shape=(loader.batch_packs(step), width),
            global_offset=(part.start, 0),
            axis_fragmentations=None,
            replica_id=parallel.context_rank * parallel.tensor_size + parallel.tensor_rank,
        )
    return sharded


def window_state(
    steps: Iterable[int], packs: Mapping[str, Tensor] | None, loader: BatchLoader, parallel: Parallel
) -> dict[int, list[Tensor]]:
    """`OldPolicyWindow.state` from the tensors that `sharded_window` describes; None on ranks of other stages.
    Collective, as `sharded_window`."""
    if packs is None:
        return {step: [] for step in steps}
    state = {}
    for step in steps:
        part = _part(step, loader, parallel)
        read = packs.get(str(step), torch.zeros(0, loader.unpadded_length(step)))
        whole = _of_all_ranks(step, read, part, loader, parallel)
        state[step] = from_packs(loader, step, whole[loader.own_numbers(step)])
    return state


def _part(step: int, loader: BatchLoader, parallel: Parallel) -> range:
    """The packs of a global batch, by number, that this data-parallel replica reads and writes."""
    count, size, rank = loader.batch_packs(step), parallel.data_size, parallel.data_rank
    return range(count * rank // size, count * (rank + 1) // size)


def _of_all_ranks(step: int, packs: Tensor, numbers: Sequence[int], loader: BatchLoader, parallel: Parallel) -> Tensor:
    """`[global batch, longest pack]` of which each rank has `packs`, the `numbers` of it; on the CPU."""
    whole = torch.zeros(loader.batch_packs(step), packs.shape[1])
    whole[list(numbers)] = packs
    return sum_over_data(whole, parallel).cpu()
