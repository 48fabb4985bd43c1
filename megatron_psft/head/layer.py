"""What the head is asked and answers, and the head itself: from the last hidden states to loss and statistics of label
tokens, without all the logits."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_psft.head.chunked import ChunkLoss, fused_label_stats, fused_loss
from megatron_psft.objectives.declare import ExtraStat
from megatron_psft.objectives.labels import LabelStats


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
    top_ids: Tensor | None = None
    """`[n, k]` int64, tokens whose log-probabilities it needs, too."""
    top_k: int = 0
    """To score: of how many of the most probable tokens to say ids and log-probabilities."""

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
    """`[b, s, ...]` to the label tokens' `[n, ...]`."""
    return values.transpose(0, 1).flatten(0, 1)[positions]


def scatter_labels(values: Tensor, positions: Tensor, label_mask: Tensor) -> Tensor:
    """`[n, ...]` back to `[b, s, ...]`, with zeros where no label counts."""
    batch, seq = label_mask.shape
    placed = values.new_zeros(seq * batch, *values.shape[1:])
    placed[positions] = values
    return placed.unflatten(0, (seq, batch)).transpose(0, 1).contiguous()


def loss_of_all(stats: LabelStats, token_loss: ChunkLoss) -> HeadOutput:
    """From all label tokens of the micro-batch at once."""
    loss = token_loss(stats, slice(0, len(stats.log_probs))).sum()
    return HeadOutput(stats=stats._replace(log_probs=stats.log_probs.detach()), loss=loss)


def fused_head(
    hidden: Tensor,
    weight: Tensor,
    inputs: HeadInputs,
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
    sequence_parallel: bool,
) -> HeadOutput:
    """From the last hidden states and the output weight, without all the logits; collective over `group`.

    Args:
        hidden: `[s, b, h]`; with `sequence_parallel` this rank's part of s.
        weight: `[v, h]`; rank r of `group` holds rows `r * v` to `(r + 1) * v` of the matrix.
        inputs: what is asked of the label tokens.
        vocab_size: true vocabulary size; rows from there on are padding: no probability, no gradient.
        group: tensor-parallel group over which the vocabulary is split.
        sequence_parallel: whether s is split over `group` too.
    """
    # Both are the identity without tensor parallelism, and sum the gradient over the group on the way back.
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=group)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
    rows = hidden.flatten(0, 1).index_select(0, inputs.label_positions)
    labels, token_loss = inputs.label_ids, inputs.token_loss
    place: dict[str, Any] = {"vocab_size": vocab_size, "group": group, "extra_stats": inputs.extra_stats}
    if token_loss is not None and torch.is_grad_enabled() and not inputs.needs_whole_records:
        # The gradients are formed in this very call, that of the weight in `main_grad`, where no later factor reaches
        # it. So nothing may scale the loss on its way back: no loss scaling as for fp16, no division by micro-batches.
        # The backward pass refuses any gradient but 1.
        loss, stats = fused_loss(rows, weight, labels, token_loss, top_ids=inputs.top_ids, **place)
        return HeadOutput(stats=stats, loss=loss)
    assert inputs.top_ids is None or token_loss is None, "other tokens and whole records have no path in common"
    stats = fused_label_stats(rows, weight, labels, top_k=inputs.top_k, **place)
    if token_loss is None or not torch.is_grad_enabled():
        return HeadOutput(stats=stats, loss=None)
    return loss_of_all(stats, token_loss)
