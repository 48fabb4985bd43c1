"""The language model inside a Megatron-Bridge model, with our head at its end."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_psft.errors import UserError
from megatron_psft.head.layer import HeadInputs, HeadOutput, OutputLayer, label_positions
from megatron_psft.loss.labels import LabelInputs
from megatron_psft.loss.objectives import Objective
from megatron_psft.model.gpt import PolicyModel

IGNORED = -100
"""In place of a label that does not count."""


class MarkedLabels(Iterator[dict[str, Any]]):
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


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the next forward pass of a policy is asked."""

    objective: Objective | None = None
    """The token loss; None to score only."""
    scored: Tensor | None = None
    """What the old policy said of the micro-batch, as `PolicyOutput.scored`; None where it is the current one."""


@dataclass(frozen=True, kw_only=True)
class PolicyOutput(HeadOutput):
    """The head's answer, with what it was about."""

    label_ids: Tensor
    """`[n]` int64, the labels that count."""
    given: LabelInputs
    """Of these labels."""

    @property
    def device(self) -> torch.device:
        """Asked for by Megatron-Core's schedules where the model has experts."""
        return self.label_ids.device

    @property
    def scored(self) -> Tensor:
        """`[2, n]` fp32, label ids and their log-probabilities; ids are below 2^24, and so exact."""
        return torch.stack([self.label_ids.to(torch.float32), self.stats.log_probs])


class BridgePolicy(PolicyModel):
    """A `GPTModel` that Bridge has built, which answers a `Question` about the labels instead of giving their
    cross-entropy. `policy_of` makes it; it has no constructor of its own."""

    question: Question

    def _postprocess(  # type: ignore[override]  # Bridge passes labels as they are in its batch
        self, hidden_states: Tensor, *, labels: Tensor | None, **rest: Any
    ) -> Any:
        if not self.post_process or labels is None:
            return super()._postprocess(hidden_states, labels=None, **rest)
        positions = label_positions(labels != IGNORED)
        # Any valid id will do where no label counts.
        inputs = HeadInputs(labels=labels.clamp(min=0), label_positions=positions, token_loss=None)
        ids, given = inputs.label_ids, LabelInputs()
        objective, scored = self.question.objective, self.question.scored
        if scored is not None:
            given = LabelInputs(old_log_probs=_log_probs_of(ids, scored.to(ids.device)))
        if objective is not None:
            inputs = HeadInputs(
                labels=inputs.labels,
                label_positions=positions,
                token_loss=lambda stats, part: objective.token_loss(stats, given.part(part)),
                extra_stats=objective.extra_stats,
            )
        output: HeadOutput = super()._postprocess(hidden_states, labels=inputs, **rest)
        return PolicyOutput(stats=output.stats, loss=output.loss, label_ids=ids, given=given)


def _log_probs_of(label_ids: Tensor, scored: Tensor) -> Tensor:
    """The old log-probabilities, once it is certain that they are of these labels."""
    ids, log_probs = scored
    if not torch.equal(ids, label_ids.to(ids.dtype)):
        raise RuntimeError(
            "the old policy has scored other labels than training got: the data set does not return the same sample "
            "for the same index, or something reads from Bridge's training iterator besides training"
        )
    return log_probs


def policy_of(chunk: torch.nn.Module, *, vocab_size: int, fused_head: bool) -> BridgePolicy:
    """The language model of a chunk, changed in place when it is first asked for; it holds no other parameters.

    Args:
        chunk: in whatever Bridge and Megatron-Core wrap it in; a `GPTModel`, or a multimodal model around one.
        vocab_size: true size, without padding.
        fused_head: whether loss and gradient are computed without all logits.

    Raises:
        UserError: the language model, or its last layer, is of another class.
    """
    model = unwrap_model(chunk)
    model = getattr(model, "language_model", model)
    if isinstance(model, BridgePolicy):
        return model
    _require_class(model, GPTModel, "the language model")
    if model.post_process:
        _require_class(model.output_layer, ColumnParallelLinear, "the output layer")
        model.output_layer.__class__ = OutputLayer
    # Bridge builds the model and asks for no class. These add methods and three plain attributes.
    model.__class__ = BridgePolicy
    model.true_vocab_size, model.fused_head, model.question = vocab_size, fused_head, Question()
    return model


def _require_class(module: torch.nn.Module, wanted: type, what: str) -> None:
    if type(module) is not wanted:
        raise UserError(
            f"{what} ({type(module).__name__}) must be Megatron-Core's {wanted.__name__}: no other can end in a token "
            "loss so far; choose another model, or set model.cross_entropy_fusion_impl to native"
        )
