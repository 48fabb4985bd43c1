"""The end of the model: from the last hidden states to the loss and the statistics of the label tokens."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_psft.head.chunked import ChunkLoss, fused_label_stats, fused_loss
from megatron_psft.head.plain import label_stats
from megatron_psft.loss.labels import ExtraStat, LabelStats


@dataclass(frozen=True, kw_only=True)
class HeadInputs:
    """What the head is asked about a micro-batch, whose label tokens are numbered along `[s, b]`, as hidden states
    lie."""

    labels: Tensor
    """`[b, s]` int64."""
    label_positions: Tensor
    """`[n]` int64, ascending, the positions in flattened `[s, b]` whose label counts."""
    token_loss: ChunkLoss | None
    """The objective; None to score only."""
    needs_whole_records: bool = False
    """Whether `token_loss` must be asked of all label tokens at once. Only then it may mix tokens."""
    extra_stats: AbstractSet[ExtraStat] = frozenset()
    """Statistics that `token_loss` needs beyond log-probability and entropy."""

    @property
    def label_ids(self) -> Tensor:
        """`[n]`."""
        return select_labels(self.labels, self.label_positions)


@dataclass(frozen=True, kw_only=True)
class HeadOutput:
    """The answer. Megatron-Core passes it on as it is, through its wrappers and its schedules."""

    stats: LabelStats
    """`[n]`, the same on every tensor-parallel rank."""
    loss: Tensor | None
    """Sum of the token losses, fp32 scalar; None where no objective was given."""

    @property
    def device(self) -> torch.device:
        """Asked by Megatron-Core's schedules where the model has experts."""
        return self.stats.log_probs.device


def label_positions(label_mask: Tensor) -> Tensor:
    """`[b, s]` bool to `HeadInputs.label_positions`. Waits for the device that the mask is on: ask on the CPU."""
    return label_mask.t().flatten().nonzero().squeeze(1)


def select_labels(values: Tensor, positions: Tensor) -> Tensor:
    """`[b, s]` to the label tokens' `[n]`."""
    return values.t().flatten()[positions]


def scatter_labels(values: Tensor, positions: Tensor, label_mask: Tensor) -> Tensor:
    """`[n]` back to `[b, s]`, with zeros where no label counts."""
    batch, seq = label_mask.shape
    placed = values.new_zeros(seq * batch)
    placed[positions] = values
    return placed.view(seq, batch).t().contiguous()


def plain_head(logits: Tensor, inputs: HeadInputs, *, vocab_size: int, group: dist.ProcessGroup) -> HeadOutput:
    """The reference for `OutputLayer`, from all logits `[s, b, v]`."""
    every = label_stats(logits, inputs.labels, vocab_size=vocab_size, group=group, extra_stats=inputs.extra_stats)
    stats = every.map(lambda values: select_labels(values, inputs.label_positions))
    if inputs.token_loss is None:
        return HeadOutput(stats=stats, loss=None)
    return _loss_of_all(stats, inputs.token_loss)


def _loss_of_all(stats: LabelStats, token_loss: ChunkLoss) -> HeadOutput:
    """From all label tokens of the micro-batch at once."""
    loss = token_loss(stats, slice(0, len(stats.log_probs))).sum()
    return HeadOutput(stats=stats._replace(log_probs=stats.log_probs.detach()), loss=loss)


class OutputLayer(ColumnParallelLinear):
    """Megatron-Core's output layer, with a forward that ends in the loss where it is told the labels.

    It is the layer's own forward, and not a function of its weight, because Megatron-Core gathers the weight in hooks
    of that forward (`overlap_param_gather`).
    """

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        inputs: HeadInputs | None = None,
        vocab_size: int | None = None,
    ) -> Any:
        """With `inputs` and `vocab_size` (the true one): `[s, b, h]` to `HeadOutput`; without: to logits."""
        if inputs is None:
            return super().forward(input_, weight, runtime_gather_output)
        assert vocab_size is not None
        # Both are the identity without tensor parallelism, and sum the gradient over the group on the way back.
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        rows = hidden.flatten(0, 1).index_select(0, inputs.label_positions)
        weight = self.weight if weight is None else weight
        assert weight is not None
        labels, token_loss = inputs.label_ids, inputs.token_loss
        place = {"vocab_size": vocab_size, "group": self.tp_group, "extra_stats": inputs.extra_stats}
        if token_loss is not None and torch.is_grad_enabled() and not inputs.needs_whole_records:
            loss, stats = fused_loss(rows, weight, labels, token_loss, **place)
            return HeadOutput(stats=stats, loss=loss)
        stats = fused_label_stats(rows, weight, labels, **place)
        if token_loss is None or not torch.is_grad_enabled():
            return HeadOutput(stats=stats, loss=None)
        return _loss_of_all(stats, token_loss)
