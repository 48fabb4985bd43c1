"""The scores of the old policy's window as a checkpoint has them: whole packs, for a run in any layout."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_psft.data.loader import BatchLoader
from megatron_psft.distributed.collective import sum_over_context
from megatron_psft.distributed.grid import Parallel
from megatron_psft.scoring.packs import from_packs, to_packs


def sharded_window(
    steps: Iterable[int],
    loader: BatchLoader,
    parallel: Parallel,
    *,
    scores: Mapping[int, Sequence[Tensor]] | None = None,
) -> dict[str, ShardedTensor]:
    """Checkpoint tensors `[global batch, longest pack]` fp32, this replica's packs of each, by step.

    They hold no padding that a layout may add, and each pack whole, so that any layout can read them. For ranks of the
    last pipeline stage; collective over those that share rows.

    Args:
        steps: that the checkpoint has, or is to have.
        loader: of the training batches.
        parallel: this rank's place.
        scores: `OldPolicyWindow.state`, to write; None to read into zeros.
    """
    sharded = {}
    for step in steps:
        if scores is None:
            packs = torch.zeros(loader.packs_per_rank, loader.unpadded_length(step))
        else:
            packs = sum_over_context(to_packs(loader, step, scores[step]), parallel).cpu()
        sharded[str(step)] = ShardedTensor.from_rank_offsets(
            f"old_log_probs.{step}",
            packs,
            (0, parallel.data_rank, parallel.data_size),
            replica_id=parallel.context_rank * parallel.tensor_size + parallel.tensor_rank,
        )
    return sharded


def window_state(
    steps: Iterable[int], packs: Mapping[str, Tensor] | None, loader: BatchLoader
) -> dict[int, list[Tensor]]:
    """`OldPolicyWindow.state` from the tensors that `sharded_window` describes; None on ranks of other stages."""
    return {step: [] if packs is None else from_packs(loader, step, packs[str(step)]) for step in steps}
