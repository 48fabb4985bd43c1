"""Tokenized records -> the micro-batches of one rank.

Which records make a global batch depends on the step, the seed and the batch size alone, not on the layout. So a
resumed run needs nothing of the loader but the step, with the same or another number of ranks. Where a global batch
counts records, which of them share a row is another matter: `dealing` says it anew for each step and layout.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_psft.data import dealing
from megatron_psft.data.dataset import TokenizedDataset
from megatron_psft.data.dealing import ByTokens
from megatron_psft.data.micro_batch import MicroBatch, fill_rows
from megatron_psft.data.packing import EpochOrder, PackPlan
from megatron_psft.data.rows import RowLayout, packed_row, separate_rows
from megatron_psft.distributed.context_split import aligned_length
from megatron_psft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The part of every global batch that a rank has: the packs of its data-parallel replica, and of their row the
    positions of its context-parallel rank."""

    data_rank: int = 0
    data_size: int = 1
    context_rank: int = 0
    context_size: int = 1
    by_tokens: ByTokens | None = None
    """Where each pack is a record, and a rank's share of them is one by tokens; None for equal numbers of packs."""


class BatchLoader:
    """Global batches as a pure function of the step: nothing to save but the step, nothing to lose on resume.

    The stream of packs is one order of the plan per epoch, one after the other; global batch i is its positions [i *
    global_batch_size, (i + 1) * global_batch_size) and may lie across an epoch's end. Data-parallel rank d has the d-th
    equal part of it, in micro-batches of consecutive packs, or a share by tokens; the context-parallel ranks of a
    replica share each row. With `wrap` false the stream is a single epoch, and empty packs fill its last global batch:
    for evaluation, where each record counts once.

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
            micro_batch_size: packs per forward pass, or what its row has room for.
            shard: of this rank.
            shuffle_seed: of the epochs' orders; None is the order of the file in each.
            one_row: whether all packs of a micro-batch are in one row; needed for packs of several records and for
                context parallelism.
            pad_to_multiple_of: each context-parallel rank's part of a row is a multiple of it.
            pad_token_id: any valid id.
            wrap: whether epoch follows upon epoch.
        """
        if shard.by_tokens is None and global_batch_size % (micro_batch_size * shard.data_size):
            raise UserError(
                f"global_batch_size ({global_batch_size}) must be a multiple of micro_batch_size * data_parallel_size "
                f"({micro_batch_size} * {shard.data_size}); change one of them"
            )
        assert 0 <= shard.data_rank < shard.data_size
        assert 0 <= shard.context_rank < shard.context_size
        assert one_row or (shard.context_size == 1 and len(plan) == len(dataset))
        assert shard.by_tokens is None or (one_row and len(plan) == len(dataset))
        self._dataset = dataset
        self._has_advantages = dataset.has_advantages
        self._plan = plan
        self._global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self._shard = shard
        self._shuffle_seed = shuffle_seed
        self._pad_token_id = pad_token_id
        self._wrap = wrap
        self._one_row = one_row
        # What every record is a multiple of, and what the row is cut into.
        self._row_multiple = math.lcm(aligned_length(1, shard.context_size), shard.context_size * pad_to_multiple_of)
        self._orders: dict[int, EpochOrder] = {}
        self._dealt: dict[tuple[int, int], dealing.Dealt] = {}
        self._ref_log_probs: Callable[[int], NDArray[np.float32]] | None = None
        self._ref_columns = 1

    def with_ref_log_probs(
        self, ref_log_probs: Callable[[int], NDArray[np.float32]], columns: int = 1
    ) -> "BatchLoader":
        """The same batches with `MicroBatch.ref_log_probs`, of which `ref_log_probs` gives those of a record: one for
        each token that the model reads. Where it gives several `columns`, the others are `MicroBatch.ref_top`."""
        loader = copy.copy(self)
        loader._ref_log_probs, loader._ref_columns = ref_log_probs, columns
        return loader

    @property
    def num_batches(self) -> int:
        """Global batches that cover the set once."""
        return -(-len(self._plan) // self._global_batch_size)

    def lengths(self, step: int) -> NDArray[np.int64]:
        """Tokens the model reads of each sequence of global batch `step`: all but the last, which is a label only."""
        return self._plan.sequence_lengths(np.concatenate(self._packs(step)))

    def micro_batch_lengths(self, step: int) -> list[NDArray[np.int64]]:
        """The part of `lengths` in each of `micro_batches`, in its order."""
        none = np.array([], dtype=np.int64)
        return [self._plan.sequence_lengths(np.concatenate([none, *packs])) for packs, _ in self._layouts(step, None)]

    def record_lengths(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens the model reads of each of `records`."""
        return self._plan.lengths[records]

    def batch_packs(self, step: int) -> int:
        """Packs of global batch `step`, over all ranks; fewer at the end without `wrap`."""
        return len(self._packs(step))

    def own_numbers(self, step: int) -> list[int]:
        """Which packs of global batch `step` this rank has, by their numbers in it, ascending; the same for every size
        of micro-batches."""
        own = self._dealt_out(step, self.micro_batch_size)[self._shard.data_rank]
        return sorted(number for numbers in own for number in numbers)

    def own_packs(self, step: int) -> list[NDArray[np.int64]]:
        """The records of each of `own_numbers`."""
        packs = self._packs(step)
        return [packs[number] for number in self.own_numbers(step)]

    def unpadded_length(self, step: int) -> int:
        """Tokens of the longest pack: the same for every layout."""
        return max(int(self._plan.lengths[pack].sum()) for pack in self._packs(step))

    def row_lengths(self, step: int, micro_batch_size: int | None = None) -> list[int]:
        """Padded length of the rows of each of this rank's micro-batches, over all context-parallel ranks.

        All rows of a step are as long as the longest, over all ranks, as a pipeline needs. Those that are dealt out by
        tokens may be each as long as it must.
        """
        dealt = self._dealt_out(step, micro_batch_size or self.micro_batch_size)
        packs = self._packs(step)
        if self._one_row:
            sizes = np.array([self._aligned(pack) for pack in packs])
            longest = np.array([[sizes[numbers].sum() for numbers in own] for own in dealt], dtype=np.int64)
        else:
            longest = np.full((len(dealt), len(dealt[0])), self.lengths(step).max())
        by_tokens = self._shard.by_tokens
        if by_tokens is None or by_tokens.equal_rows == "of a step":
            longest[:] = longest.max()
        elif by_tokens.equal_rows == "of a micro-batch":
            longest[:] = longest.max(axis=0)
        multiple = self._row_multiple
        own_rows: list[int] = (-(-longest[self._shard.data_rank].clip(min=1) // multiple) * multiple).tolist()
        return own_rows

    def positions_per_rank(self, step: int) -> int:
        """Positions of global batch `step` that this rank computes, padding counted."""
        rows = 1 if self._one_row else self.micro_batch_size * self._plan.rows_per_record
        return rows * sum(self.row_lengths(step)) // self._shard.context_size

    def micro_batches(self, step: int, micro_batch_size: int | None = None) -> list[MicroBatch]:
        """This rank's part of global batch `step`, counted from 0, in micro-batches of the loader's size or of another;
        on the CPU."""
        return [self._fill(packs, layout) for packs, layout in self._layouts(step, micro_batch_size)]

    def label_masks(self, step: int, micro_batch_size: int | None = None) -> list[torch.Tensor]:
        """`MicroBatch.label_mask` of each of `micro_batches`, bool `[batch, seq]`, without the rest of them."""
        masks = []
        for packs, layout in self._layouts(step, micro_batch_size):
            sequences = [sequence for pack in packs for record in pack for sequence in self._dataset[record].sequences]
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
        if self._ref_columns == 1:
            return replace(batch, ref_log_probs=torch.from_numpy(layout.fill(values, padding=0.0)))
        columns = torch.from_numpy(layout.fill(values, padding=0.0, of_token=(self._ref_columns,)))
        return replace(batch, ref_log_probs=columns[..., 0], ref_top=columns[..., 1:])

    def _cut(self, record: int, values: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """The values of a record, by sequence."""
        first = self._plan.first_lengths
        return [values] if first is None else [values[: first[record]], values[first[record] :]]

    def to_packs(self, step: int, values: Sequence[torch.Tensor], micro_batch_size: int | None = None) -> torch.Tensor:
        """Brings values of this rank's positions into an order that no layout has a part in.

        Args:
            step: of the global batch.
            values: per micro-batch, shaped as its tokens, with further dimensions behind where each has several.
            micro_batch_size: of these micro-batches; the loader's where None.

        Returns:
            `[packs, unpadded_length(step), ...]`, the tokens of each of `own_packs` without padding. Zero stands for
            what other context-parallel ranks have, so that their sum is complete.
        """
        size = (len(self.own_numbers(step)), self.unpadded_length(step))
        packs = torch.zeros(*size, *values[0].shape[2:], dtype=values[0].dtype)
        flat = packs.view(size[0] * size[1], *values[0].shape[2:])
        for places, part in zip(self._places(step, micro_batch_size), values, strict=True):
            flat[places[places >= 0]] = part.cpu()[places >= 0]
        return packs

    def from_packs(self, step: int, rows: torch.Tensor) -> list[torch.Tensor]:
        """The reverse of `to_packs`, on any rank of any layout: this rank's part, zero where there is padding."""
        flat = torch.cat([rows.flatten(), rows.new_zeros(1)])  # places of -1 are padding's
        return [flat[places] for places in self._places(step)]

    def _places(self, step: int, micro_batch_size: int | None = None) -> list[torch.Tensor]:
        """The place in `to_packs` of each of this rank's positions, -1 for padding; int64, a tensor per micro-batch."""
        width = self.unpadded_length(step)
        row_of = {number: row for row, number in enumerate(self.own_numbers(step))}
        places = []
        numbers_of = self._dealt_out(step, micro_batch_size or self.micro_batch_size)[self._shard.data_rank]
        for numbers, (packs, layout) in zip(numbers_of, self._layouts(step, micro_batch_size), strict=True):
            arrays = []
            for number, pack in zip(numbers, packs, strict=True):
                lengths = self._plan.sequence_lengths(pack)
                ends = row_of[number] * width + np.cumsum(lengths)
                arrays += [np.arange(end - n, end) for end, n in zip(ends, lengths, strict=True)]
            places.append(torch.from_numpy(layout.fill(arrays, padding=-1)))
        return places

    def _layouts(self, step: int, micro_batch_size: int | None) -> Iterator[tuple[list[NDArray[np.int64]], RowLayout]]:
        """The packs of each of this rank's micro-batches, none in an empty one, and where they lie in its rows."""
        micro_batch_size = micro_batch_size or self.micro_batch_size
        packs = self._packs(step)
        dealt = self._dealt_out(step, micro_batch_size)[self._shard.data_rank]
        for numbers, row_length in zip(dealt, self.row_lengths(step, micro_batch_size), strict=True):
            own = [packs[number] for number in numbers]
            yield own, self._layout(own, row_length, micro_batch_size)

    def _layout(self, packs: Sequence[NDArray[np.int64]], row_length: int, micro_batch_size: int) -> RowLayout:
        if not self._one_row:
            each = self._plan.rows_per_record
            return separate_rows(sum(map(len, packs)) * each, rows=micro_batch_size * each, seq_length=row_length)
        lengths = [int(length) for pack in packs for length in self._plan.sequence_lengths(pack)]
        shard = self._shard
        return packed_row(
            lengths, seq_length=row_length, context_rank=shard.context_rank, context_size=shard.context_size
        )

    def _aligned(self, pack: NDArray[np.int64]) -> int:
        return sum(
            aligned_length(int(length), self._shard.context_size) for length in self._plan.sequence_lengths(pack)
        )

    def _dealt_out(self, step: int, size: int) -> dealing.Dealt:
        """The packs of global batch `step` for each rank, in micro-batches of `size` packs or with room for as many."""
        if (step, size) not in self._dealt:
            packs, ranks, by_tokens = self._packs(step), self._shard.data_size, self._shard.by_tokens
            if by_tokens is not None:
                lengths = np.array([self._plan.lengths[pack].sum() for pack in packs])
                room = self._plan.capacity * size
                dealt = dealing.by_tokens(lengths, ranks=ranks, room=room, multiple_of=by_tokens.multiple_of)
            else:
                per_rank = self._global_batch_size // ranks
                dealt = dealing.in_order(len(packs), ranks=ranks, per_rank=per_rank, size=size)
            # Few at a time: a step, in the size of training and in that of scoring.
            self._dealt = dict([*self._dealt.items()][-3:]) | {(step, size): dealt}
        return self._dealt[step, size]

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
