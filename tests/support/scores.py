"""Old log-probabilities that a test has made, as the pipeline takes them."""

from collections.abc import Sequence

from torch import Tensor

from megatron_psft.data.micro_batch import MicroBatch
from megatron_psft.head.layer import label_positions, select_labels
from megatron_psft.scoring.old_policy import Scores


def scores_of(micro_batches: Sequence[MicroBatch], rows: Sequence[Tensor]) -> Scores:
    """Those of the label tokens, from a value for every position, `[b, s]` for each micro-batch."""
    return Scores(
        [
            select_labels(values, label_positions(batch.label_mask))
            for batch, values in zip(micro_batches, rows, strict=True)
        ]
    )
