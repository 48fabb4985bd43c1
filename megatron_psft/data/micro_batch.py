"""Rows of one forward pass, and how they are filled from records."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from megatron_psft.data.example import Example
from megatron_psft.data.rows import RowLayout, separate_rows


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows of one forward pass, each [batch, seq]. `labels[b, s]` is the token after `tokens[b, s]` in its record; it
    counts where `label_mask` is true. Under context parallelism a rank has a part of each row, and `seq` is its length.

    Where records lie is said four times, once for each reader, and all follow from the records' lengths (`RowLayout`):
    `segments` for attention, the borders that it must not cross; `position_ids` for rotary embeddings, 0, 1, ... within
    each segment or, without segments, each row; `record_ids` for losses over whole records, the number of the segment
    or row, 0 in padding; `label_counts` for their means, how many positions of each record id have a true `label_mask`,
    counted before the split over context-parallel ranks.

    The two sequences of a preference pair are records of their own here: chosen and rejected of pair p are 2p and 2p +
    1.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    label_mask: torch.Tensor
    position_ids: torch.Tensor
    record_ids: torch.Tensor
    """`[batch, seq]` int64, which of the micro-batch's records a token is of; 0 where there is padding."""
    label_counts: torch.Tensor
    """`[records]` int64, label tokens of each record, over all context-parallel ranks."""
    num_tokens: int
    """Tokens that are no padding, over all context-parallel ranks."""
    segments: tuple[int, ...] | None = None
    """Lengths of the parts of the one row that must not see each other, before the split: each record with its padding,
    and what pads the row. None if each row is one record, or padding alone."""
    advantages: torch.Tensor | None = None
    """`[records]` fp32, of each record; None where all of the data set are 1."""
    ref_log_probs: torch.Tensor | None = None
    """`[batch, seq]` fp32, log-probabilities of the labels under the initial model, zeros where no label counts; None
    where the objective has no use for them, and outside training."""
    ref_top: torch.Tensor | None = None
    """`[batch, seq, columns]` fp32, what the reference keeps of each label besides its own log-probability
    (scoring/top_tokens.py); None where the objective has no use for it."""
    nll_z: torch.Tensor | None = None
    """`[records]` fp32, by how many standard deviations each is less probable than the mean record of the global batch;
    None where the objective has no use for it."""
    sources: torch.Tensor | None = None
    """`[records]` int64, which source of the data set each is of, from 0; None where it has one."""

    @property
    def num_records(self) -> int:
        """Records, over all context-parallel ranks."""
        return len(self.label_counts)

    @property
    def seq_length(self) -> int:
        """Length of a row over all context-parallel ranks."""
        return self.tokens.shape[1] if self.segments is None else sum(self.segments)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on `device`."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        moved: dict[str, Any] = {name: to_device(value, device) for name, value in tensors.items()}
        return replace(self, **moved)


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy from host memory that a GPU makes when its turn comes: for pageable memory the host would wait."""
    pinned = values.pin_memory() if device.type == "cuda" and not values.is_cuda else values
    return pinned.to(device, non_blocking=True)


def collate(examples: Sequence[Example], *, batch_size: int, seq_length: int, pad_token_id: int) -> MicroBatch:
    """Examples of at most `seq_length + 1` tokens, a row each, as int64 [batch_size, seq_length] (`label_mask`: bool).

    Rows beyond the examples are padding.
    """
    return fill_rows(examples, separate_rows(len(examples), rows=batch_size, seq_length=seq_length), pad_token_id)


def fill_rows(
    examples: Sequence[Example], layout: RowLayout, pad_token_id: int, *, has_advantages: bool = False
) -> MicroBatch:
    """Lays the inputs and labels of `examples` out as `layout` says. Labels are shifted within each record, before any
    split. `has_advantages`: whether the batch has those of the examples.

    Padding is told by its place and never by its value: `pad_token_id` is the eos token of many models, and so a label
    elsewhere.
    """
    tokens = layout.fill([example.tokens[:-1] for example in examples], padding=pad_token_id)
    labels = layout.fill([example.tokens[1:] for example in examples], padding=pad_token_id)
    masks = [example.label_mask[1:] for example in examples]
    record_ids = layout.fill([np.full(len(mask), record) for record, mask in enumerate(masks)], padding=0)
    return MicroBatch(
        tokens=torch.from_numpy(tokens.astype(np.int64)),
        labels=torch.from_numpy(labels.astype(np.int64)),
        label_mask=torch.from_numpy(layout.fill(masks, padding=False)),
        position_ids=torch.from_numpy(layout.positions()),
        record_ids=torch.from_numpy(record_ids.astype(np.int64)),
        label_counts=torch.tensor([int(mask.sum()) for mask in masks], dtype=torch.int64),
        num_tokens=sum(map(len, masks)),
        segments=layout.segments,
        advantages=torch.tensor([e.advantage for e in examples], dtype=torch.float32) if has_advantages else None,
    )
