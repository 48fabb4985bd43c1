"""Tokenized records -> the micro-batches of one rank.

Which records make a global batch depends on the step, the seed and the batch size alone, not on the layout. So a
resumed run needs nothing of the loader but the step, with the same or another number of ranks.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_psft.data.dataset import TokenizedDataset
from megatron_psft.data.example import Example
from megatron_psft.data.packing import EpochOrder, PackPlan
from megatron_psft.data.rows import RowLayout, packed_row, separate_rows
from megatron_psft.distributed.context_split import aligned_length
from megatron_psft.errors import UserError


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

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


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


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The part of every global batch that a rank has: the packs of its data-parallel replica, and of their row the
    positions of its context-parallel rank."""

    data_rank: int = 0
    data_size: int = 1
    context_rank: int = 0
    context_size: int = 1


class BatchLoader:
    """Global batches as a pure function of the step: nothing to save but the step, nothing to lose on resume.

    The stream of packs is one order of the plan per epoch, one after the other; global batch i is its positions [i *
    global_batch_size, (i + 1) * global_batch_size) and may lie across an epoch's end. Data-parallel rank d has the d-th
    equal part of it, in micro-batches of consecutive packs; the context-parallel ranks of a replica share each row.
    With `wrap` false the stream is a single epoch, and empty packs fill its last global batch: for evaluation, where
    each record counts once.

    A micro-batch is either one row that holds all its packs, or, where every pack is one record, a row for each; for
    each of both sequences where records are pairs.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        plan: PackPlan,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        shard: Shard,
        shuffle_seed: int | None,
        one_row: bool,
        pad_to_multiple_of: int,
        pad_token_id: int,
        wrap: bool = True,
    ) -> None:
        """Describes the batches of one rank.

        Args:
            dataset: the records.
            plan: which of them share a pack.
            global_batch_size: packs per step.
            micro_batch_size: packs per forward pass.
            shard: of this rank.
            shuffle_seed: of the epochs' orders; None is the order of the file in each.
            one_row: whether all packs of a micro-batch are in one row; needed for packs of several records and for
                context parallelism.
            pad_to_multiple_of: each context-parallel rank's part of a row is a multiple of it.
            pad_token_id: any valid id.
            wrap: whether epoch follows upon epoch.
        """
        if global_batch_size % (micro_batch_size * shard.data_size):
            raise UserError(
                f"global_batch_size ({global_batch_size}) must be a multiple of micro_batch_size * data_parallel_size "
                f"({micro_batch_size} * {shard.data_size}); change one of them"
            )
        assert 0 <= shard.data_rank < shard.data_size
        assert 0 <= shard.context_rank < shard.context_size
        assert one_row or (shard.context_size == 1 and len(plan) == len(dataset))
        self._dataset = dataset
        self._has_advantages = dataset.has_advantages
        self._plan = plan
        self._global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.packs_per_rank = global_batch_size // shard.data_size
        """Packs of a global batch that a data-parallel rank has."""
        self._shard = shard
        self._shuffle_seed = shuffle_seed
        self._pad_token_id = pad_token_id
        self._wrap = wrap
        self._one_row = one_row
        # What every record is a multiple of, and what the row is cut into.
        self._row_multiple = math.lcm(aligned_length(1, shard.context_size), shard.context_size * pad_to_multiple_of)
        self._orders: dict[int, EpochOrder] = {}
        self._ref_log_probs: Callable[[int], NDArray[np.float32]] | None = None

    def with_ref_log_probs(self, ref_log_probs: Callable[[int], NDArray[np.float32]]) -> "BatchLoader":
        """The same batches with `MicroBatch.ref_log_probs`, of which `ref_log_probs` gives those of a record: one for
        each token that the model reads."""
        loader = copy.copy(self)
        loader._ref_log_probs = ref_log_probs
        return loader

    @property
    def num_batches(self) -> int:
        """Global batches that cover the set once."""
        return -(-len(self._plan) // self._global_batch_size)

    def lengths(self, step: int) -> NDArray[np.int64]:
        """Tokens the model reads of each sequence of global batch `step`: all but the last, which is a label only."""
        return self._plan.sequence_lengths(np.concatenate(self._packs(step)))

    def record_lengths(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens the model reads of each of `records`."""
        return self._plan.lengths[records]

    def own_packs(self, step: int) -> list[NDArray[np.int64]]:
        """The records of each of this rank's packs of global batch `step`; fewer at the end without `wrap`."""
        return self._packs(step)[self._shard.data_rank * self.packs_per_rank :][: self.packs_per_rank]

    def unpadded_length(self, step: int) -> int:
        """Tokens of the longest pack: the same for every layout."""
        return max(int(self._plan.lengths[pack].sum()) for pack in self._packs(step))

    def seq_length(self, step: int, micro_batch_size: int | None = None) -> int:
        """Padded length of the rows of global batch `step`, over all context-parallel ranks: the same on every rank and
        micro-batch, as a pipeline needs."""
        if self._one_row:
            sizes, size = [self._aligned(pack) for pack in self._packs(step)], micro_batch_size or self.micro_batch_size
            longest = max(sum(sizes[first : first + size]) for first in range(0, len(sizes), size))
        else:
            longest = int(self.lengths(step).max())
        return -(-longest // self._row_multiple) * self._row_multiple

    def positions_per_rank(self, step: int) -> int:
        """Positions of global batch `step` that each rank computes, padding counted."""
        packs = self.packs_per_rank
        rows = packs // self.micro_batch_size if self._one_row else packs * self._plan.rows_per_record
        return rows * self.seq_length(step) // self._shard.context_size

    def micro_batches(self, step: int, micro_batch_size: int | None = None) -> list[MicroBatch]:
        """This rank's part of global batch `step`, counted from 0, in micro-batches of the loader's size or of another;
        on the CPU."""
        micro_batch_size = micro_batch_size or self.micro_batch_size
        seq_length = self.seq_length(step, micro_batch_size)
        return [
            self._fill(packs, self._layout(packs, seq_length, micro_batch_size))
            for packs in self._micro_batch_packs(step, micro_batch_size)
        ]

    def label_masks(self, step: int, micro_batch_size: int | None = None) -> list[torch.Tensor]:
        """`MicroBatch.label_mask` of each of `micro_batches`, bool `[batch, seq]`, without the rest of them."""
        micro_batch_size = micro_batch_size or self.micro_batch_size
        seq_length = self.seq_length(step, micro_batch_size)
        masks = []
        for packs in self._micro_batch_packs(step, micro_batch_size):
            sequences = [sequence for pack in packs for record in pack for sequence in self._dataset[record].sequences]
            layout = self._layout(packs, seq_length, micro_batch_size)
            masks.append(torch.from_numpy(layout.fill([each.label_mask[1:] for each in sequences], padding=False)))
        return masks

    def _fill(self, packs: Sequence[NDArray[np.int64]], layout: RowLayout) -> MicroBatch:
        records = [int(record) for pack in packs for record in pack]
        batch = fill_rows(
            [sequence for record in records for sequence in self._dataset[record].sequences],
            layout,
            self._pad_token_id,
            has_advantages=self._has_advantages,
        )
        if self._dataset.num_sources > 1:
            sources = [self._dataset.source_of(record) for record in records for _ in range(self._plan.rows_per_record)]
            batch = replace(batch, sources=torch.tensor(sources, dtype=torch.int64))
        if self._ref_log_probs is None:
            return batch
        values = [part for record in records for part in self._cut(record, self._ref_log_probs(record))]
        return replace(batch, ref_log_probs=torch.from_numpy(layout.fill(values, padding=0.0)))

    def _cut(self, record: int, values: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """The values of a record, by sequence."""
        first = self._plan.first_lengths
        return [values] if first is None else [values[: first[record]], values[first[record] :]]

    def to_packs(self, step: int, values: Sequence[torch.Tensor], micro_batch_size: int | None = None) -> torch.Tensor:
        """Brings values of this rank's positions into an order that no layout has a part in.

        Args:
            step: of the global batch.
            values: per micro-batch, shaped as its tokens.
            micro_batch_size: of these micro-batches; the loader's where None.

        Returns:
            `[packs_per_rank, unpadded_length(step)]`, a pack's tokens without padding in each row. Zero stands for what
            other context-parallel ranks have, so that their sum is complete.
        """
        flat = torch.zeros(self.packs_per_rank * self.unpadded_length(step), dtype=values[0].dtype)
        places_of = self._places(step, micro_batch_size or self.micro_batch_size)
        for places, part in zip(places_of, values, strict=True):
            flat[places[places >= 0]] = part.cpu()[places >= 0]
        return flat.view(self.packs_per_rank, -1)

    def from_packs(self, step: int, rows: torch.Tensor) -> list[torch.Tensor]:
        """The reverse of `to_packs`, on any rank of any layout: this rank's part, zero where there is padding."""
        flat = rows.flatten()
        return [
            torch.where(places >= 0, flat[places.clamp(min=0)], 0)
            for places in self._places(step, self.micro_batch_size)
        ]

    def _places(self, step: int, micro_batch_size: int) -> list[torch.Tensor]:
        """The place in `to_packs` of each of this rank's positions, -1 for padding; int64, a tensor per micro-batch."""
        seq_length, width = self.seq_length(step, micro_batch_size), self.unpadded_length(step)
        places, row = [], 0
        for packs in self._micro_batch_packs(step, micro_batch_size):
            arrays = []
            for pack in packs:
                lengths = self._plan.sequence_lengths(pack)
                ends = row * width + np.cumsum(lengths)
                arrays += [np.arange(end - n, end) for end, n in zip(ends, lengths, strict=True)]
                row += 1
            places.append(torch.from_numpy(self._layout(packs, seq_length, micro_batch_size).fill(arrays, padding=-1)))
        return places

    def _layout(self, packs: Sequence[NDArray[np.int64]], seq_length: int, micro_batch_size: int) -> RowLayout:
        if not self._one_row:
            each = self._plan.rows_per_record
            return separate_rows(sum(map(len, packs)) * each, rows=micro_batch_size * each, seq_length=seq_length)
        lengths = [int(length) for pack in packs for length in self._plan.sequence_lengths(pack)]
        shard = self._shard
        return packed_row(
            lengths, seq_length=seq_length, context_rank=shard.context_rank, context_size=shard.context_size
        )

    def _aligned(self, pack: NDArray[np.int64]) -> int:
        return sum(
            aligned_length(int(length), self._shard.context_size) for length in self._plan.sequence_lengths(pack)
        )

    def _micro_batch_packs(self, step: int, size: int) -> list[list[NDArray[np.int64]]]:
        """The packs of each micro-batch of this rank; fewer, or none, at the end of the last batch without `wrap`."""
        own = self.own_packs(step)
        return [own[first : first + size] for first in range(0, self.packs_per_rank, size)]

    def _packs(self, step: int) -> list[NDArray[np.int64]]:
        """The records of each pack of global batch `step`, over all ranks; fewer packs in the last one without
        `wrap`."""
        size = len(self._plan)
        start, stop = step * self._global_batch_size, (step + 1) * self._global_batch_size
        if not self._wrap:
            stop = min(stop, size)
        if not 0 <= start < stop:
            raise IndexError(f"global batch {step} of {self.num_batches}")
        return [self._order(position // size)[position % size] for position in range(start, stop)]

    def _order(self, epoch: int) -> EpochOrder:
        epoch = 0 if self._shuffle_seed is None else epoch
        if epoch not in self._orders:
            # Two at a time: a batch, or the old policy's window, may lie across an epoch's end.
            self._orders = dict(list(self._orders.items())[-1:])
            seed = self._shuffle_seed
            self._orders[epoch] = self._plan.file_order() if seed is None else self._plan.shuffled(seed, epoch)
        return self._orders[epoch]
