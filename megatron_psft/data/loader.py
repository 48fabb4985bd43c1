"""Tokenized records -> the micro-batches of one data-parallel rank.

Which records make a global batch depends on the step, the seed and the batch size alone, not on the layout. So a
resumed run needs nothing of the loader but the step, with the same or another number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_psft.data.chat import Example
from megatron_psft.data.dataset import TokenizedDataset
from megatron_psft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows of one forward pass, each [batch, seq] and padded on the right. `labels[b, s]` is the token after
    `tokens[b, s]`; it counts where `loss_mask` is true."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    num_sequences: int
    """Rows that are records; the others fill up the last batch of an evaluation and have no labels."""
    num_tokens: int
    """Tokens that are no padding."""

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same on `device`."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            loss_mask=self.loss_mask.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
        )


def collate(examples: Sequence[Example], *, batch_size: int, seq_length: int, pad_token_id: int) -> MicroBatch:
    """Examples of at most `seq_length + 1` tokens as int64 [batch_size, seq_length] (`loss_mask`: bool).

    Rows beyond the examples are padding. Padding is told by its place and never by its value: `pad_token_id` is the eos
    token of many models, and so a label elsewhere.
    """
    tokens = torch.full((batch_size, seq_length), pad_token_id, dtype=torch.int64)
    labels = torch.full((batch_size, seq_length), pad_token_id, dtype=torch.int64)
    loss_mask = torch.zeros((batch_size, seq_length), dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example.tokens) - 1
        tokens[row, :length] = torch.from_numpy(example.tokens[:-1])
        labels[row, :length] = torch.from_numpy(example.tokens[1:])
        loss_mask[row, :length] = torch.from_numpy(example.label_mask[1:])
    return MicroBatch(
        tokens=tokens,
        labels=labels,
        loss_mask=loss_mask,
        position_ids=torch.arange(seq_length).repeat(batch_size, 1),
        num_sequences=len(examples),
        num_tokens=sum(len(example.tokens) - 1 for example in examples),
    )


class BatchLoader:
    """Global batches as a pure function of the step: nothing to save but the step, nothing to lose on resume.

    The stream of records is one permutation of the set per epoch, one after the other; global batch i is its positions
    [i * global_batch_size, (i + 1) * global_batch_size) and may lie across an epoch's end. Data-parallel rank d has the
    d-th equal part of it, in micro-batches of consecutive rows. With `wrap` false the stream is a single epoch, and
    empty rows fill its last global batch: for evaluation, where each record counts once.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        shuffle: bool,
        seed: int,
        pad_to_multiple_of: int,
        pad_token_id: int,
        wrap: bool = True,
    ) -> None:
        if global_batch_size % (micro_batch_size * data_parallel_size):
            raise UserError(
                f"global_batch_size ({global_batch_size}) must be a multiple of micro_batch_size * data_parallel_size "
                f"({micro_batch_size} * {data_parallel_size}); change one of them"
            )
        assert 0 <= data_parallel_rank < data_parallel_size
        self._dataset = dataset
        self._lengths = dataset.lengths
        self._global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.rows_per_rank = global_batch_size // data_parallel_size
        self._first_row = data_parallel_rank * self.rows_per_rank
        self._shuffle = shuffle
        self._seed = seed
        self._pad_to_multiple_of = pad_to_multiple_of
        self._pad_token_id = pad_token_id
        self._wrap = wrap
        self._cached_epoch: tuple[int, NDArray[np.int64]] | None = None

    @property
    def num_batches(self) -> int:
        """Global batches that cover the set once."""
        return -(-len(self._dataset) // self._global_batch_size)

    def lengths(self, step: int) -> NDArray[np.int64]:
        """Tokens the model reads of each record of global batch `step`: all but the last, which is a label only."""
        return self._lengths[self._record_indices(step)] - 1

    def unpadded_length(self, step: int) -> int:
        """The longest of `lengths`: the same for every layout."""
        return int(self.lengths(step).max())

    def seq_length(self, step: int) -> int:
        """Padded length of global batch `step`: the same on every rank and micro-batch, as a pipeline needs."""
        return -(-self.unpadded_length(step) // self._pad_to_multiple_of) * self._pad_to_multiple_of

    def micro_batches(self, step: int, micro_batch_size: int | None = None) -> list[MicroBatch]:
        """This rank's part of global batch `step`, counted from 0, in micro-batches of the loader's size or of another;
        on the CPU."""
        micro_batch_size = micro_batch_size or self.micro_batch_size
        seq_length = self.seq_length(step)
        indices = self._record_indices(step)[self._first_row : self._first_row + self.rows_per_rank]
        return [
            collate(
                [self._dataset[int(index)] for index in indices[row : row + micro_batch_size]],
                batch_size=micro_batch_size,
                seq_length=seq_length,
                pad_token_id=self._pad_token_id,
            )
            for row in range(0, self.rows_per_rank, micro_batch_size)
        ]

    def _record_indices(self, step: int) -> NDArray[np.int64]:
        """Records of global batch `step`, int64 [global_batch_size]; fewer in the last one without `wrap`."""
        size = len(self._dataset)
        start, stop = step * self._global_batch_size, (step + 1) * self._global_batch_size
        if not self._wrap:
            stop = min(stop, size)
        if not 0 <= start < stop:
            raise IndexError(f"global batch {step} of {self.num_batches}")
        epochs = range(start // size, -(-stop // size))
        return np.concatenate(
            [self._order(epoch)[max(start - epoch * size, 0) : stop - epoch * size] for epoch in epochs]
        )

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The records of one epoch in order, int64 [records]."""
        if not self._shuffle:
            return np.arange(len(self._dataset))
        if self._cached_epoch is None or self._cached_epoch[0] != epoch:
            self._cached_epoch = (epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._dataset)))
        return self._cached_epoch[1]
