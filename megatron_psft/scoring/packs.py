"""Values of label tokens pack by pack, in an order that no layout has a part in: as checkpoints have them."""

from collections.abc import Sequence

from torch import Tensor

from megatron_psft.data.loader import BatchLoader
from megatron_psft.head.layer import label_positions, scatter_labels, select_labels


def to_packs(
    loader: BatchLoader, step: int, log_probs: Sequence[Tensor], micro_batch_size: int | None = None
) -> Tensor:
    """This rank's part of a global batch, pack by pack.

    Args:
        loader: of the global batch.
        step: of the global batch.
        log_probs: `[n]` for each micro-batch, as `Scores.log_probs`.
        micro_batch_size: of these micro-batches; the loader's if None.

    Returns:
        `BatchLoader.to_packs` of them, zero where no label counts; on the CPU.
    """
    rows = [
        scatter_labels(values.cpu(), label_positions(mask), mask)
        for values, mask in zip(log_probs, loader.label_masks(step, micro_batch_size), strict=True)
    ]
    return loader.to_packs(step, rows, micro_batch_size)


def from_packs(loader: BatchLoader, step: int, packs: Tensor) -> list[Tensor]:
    """The reverse, on any rank of any layout: `[n]` for each micro-batch of this rank."""
    rows = loader.from_packs(step, packs)
    return [
        select_labels(values, label_positions(mask))
        for values, mask in zip(rows, loader.label_masks(step), strict=True)
    ]
