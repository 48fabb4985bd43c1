"""What the head is asked about a micro-batch of Megatron-Bridge's, of whose labels the model knows where they count."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_psft.head.layer import HeadInputs, label_positions
from megatron_psft.objectives.labels import LabelInputs
from megatron_psft.objectives.objective import Objective

IGNORED = -100
"""In place of a label that does not count."""


class MaskedLabels(Iterator[dict[str, Any]]):
    """Bridge's micro-batches with the loss mask written into the labels, as `IGNORED`.

    Bridge hands labels and mask to the loss on separate ways, and cuts rows up for context parallelism on each; so they
    stay together.
    """

    def __init__(self, micro_batches: Iterator[dict[str, Any]]) -> None:
        self._micro_batches = micro_batches

    def __next__(self) -> dict[str, Any]:
        batch = next(self._micro_batches)
        if batch.get("labels") is None or batch.get("loss_mask") is None:
            return batch
        return {**batch, "labels": torch.where(batch["loss_mask"] > 0, batch["labels"], IGNORED)}


class ScoredLabels(NamedTuple):
    """What a policy says of the labels of a micro-batch."""

    ids: Tensor
    """`[n]`, integers."""
    log_probs: Tensor
    """`[n]` fp32."""


class MaskedQuestion:
    """What a forward pass is asked about labels that hold `IGNORED`, which it sees only at the end of the model: a
    `Question` of `megatron_psft.model.end`."""

    label_ids: Tensor
    """`[n]` int64, the labels that count; there once the question was asked."""
    given: LabelInputs
    """Of these labels; there once the question was asked."""

    def __init__(self, objective: Objective | None = None, scored: Iterator[ScoredLabels] | None = None) -> None:
        """Asks for a token loss.

        Args:
            objective: the token loss; None to score only.
            scored: yields what the old policy says of the micro-batch, if that is an earlier policy; one is taken when
                the question is asked.
        """
        self.objective, self._scored = objective, scored

    def __call__(self, labels: Tensor) -> HeadInputs:
        """`[b, s]` int64. Raises RuntimeError where the old policy has scored other labels."""
        # Any valid id will do where no label counts.
        valid, positions, objective = labels.clamp(min=0), label_positions(labels != IGNORED), self.objective
        inputs = HeadInputs(labels=valid, label_positions=positions, token_loss=None)
        self.label_ids, self.given = inputs.label_ids, LabelInputs()
        if objective is None:
            return inputs
        if self._scored is not None:
            self.given = LabelInputs(old_log_probs=_log_probs_of(self.label_ids, next(self._scored)))
        given = self.given
        return HeadInputs(
            labels=valid,
            label_positions=positions,
            token_loss=lambda stats, part: objective.token_loss(stats, given.part(part)),
            extra_stats=objective.extra_stats,
        )


def _log_probs_of(label_ids: Tensor, scored: ScoredLabels) -> Tensor:
    """The old log-probabilities, once it is certain that they are of these labels."""
    if not torch.equal(scored.ids.to(label_ids), label_ids):
        raise RuntimeError(
            "the old policy has scored other labels than training got: the data set does not return the same sample "
            "for the same index, or something reads from Bridge's training iterator besides training"
        )
    return scored.log_probs.to(label_ids.device)
