"""Which records share a row: a plan made once from their lengths, and its order in each epoch. Pure NumPy.

A pack is a list of records whose tokens together fit into one row. The plan knows nothing of ranks or micro-batches, so
that packs are the same in every layout.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_psft.config.inputs import DataConfig
from megatron_psft.errors import counted


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """The packs of one epoch: pack p holds `records[offsets[packs[p]] : offsets[packs[p] + 1]]`."""

    records: NDArray[np.int64]
    offsets: NDArray[np.int64]
    packs: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        pack = self.packs[index]
        return self.records[self.offsets[pack] : self.offsets[pack + 1]]


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """Slots of packs, each for a record of a certain length; an epoch chooses which record of that length takes it.

    So every epoch has the same number of packs, equally full, although records and packs change places. A global batch
    is therefore known from its number alone, however many epochs lie before it.
    """

    lengths: NDArray[np.int64]
    """Tokens of each record that go through the model, int64 [records]."""
    capacity: int
    """Tokens that a pack may hold."""
    records: NDArray[np.int64]
    """The record of each slot in file order, pack after pack, int64 [records]; a pack's records are in file order, and
    so are packs by their first record."""
    offsets: NDArray[np.int64]
    """Pack p has the slots [offsets[p], offsets[p + 1]), int64 [packs + 1]."""
    first_lengths: NDArray[np.int64] | None = None
    """Where records are pairs, how much of `lengths` is the first sequence's, int64 [records]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def rows_per_record(self) -> int:
        """2 where records are pairs."""
        return 1 if self.first_lengths is None else 2

    def sequence_lengths(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens that go through the model of each sequence of `records`, one after the other."""
        lengths = self.lengths[records]
        if self.first_lengths is None:
            return lengths
        first = self.first_lengths[records]
        return np.stack([first, lengths - first], axis=1).ravel()

    @property
    def fill(self) -> float:
        """Share of the packs' room that holds tokens."""
        return float(self.lengths.sum()) / (len(self) * self.capacity)

    def file_order(self) -> EpochOrder:
        """Every epoch's order without shuffling. Where a pack holds one record, this is the order of the file."""
        return EpochOrder(records=self.records, offsets=self.offsets, packs=np.arange(len(self)))

    def shuffled(self, seed: int, epoch: int) -> EpochOrder:
        """A random order of packs, with records of equal length dealt anew; a pure function of `seed` and `epoch`."""
        random = np.random.default_rng([seed, epoch])
        drawn = random.permutation(len(self.lengths))
        records = np.empty_like(self.records)
        # The n-th shortest record goes to the n-th shortest slot: ties are broken at random, and by nothing else.
        shortest_slots = np.argsort(self.lengths[self.records], kind="stable")
        records[shortest_slots] = drawn[np.argsort(self.lengths[drawn], kind="stable")]
        return EpochOrder(records=records, offsets=self.offsets, packs=random.permutation(len(self)))

    def __str__(self) -> str:
        return (
            f"{counted(len(self), 'pack')} of at most {counted(self.capacity, 'token')}, {100 * self.fill:.2f} % full, "
            f"{counted(len(self.lengths) / len(self), 'record', '.1f')} each"
        )


def plan_of(sequence_lengths: NDArray[np.int64], config: DataConfig, *, packs_each_step: bool = False) -> PackPlan:
    """Which records share a row of a run; `sequence_lengths` counts all tokens, int64 [records, sequences of each].

    A pack has room for `seq_length` tokens, and where records are pairs for both sequences of the longest one.
    `packs_each_step`: the records of a step are packed when it comes (`dealing`), and are alone in the plan.
    """
    inputs = sequence_lengths - 1  # a sequence's last token is a label only
    make_plan = best_fit if config.packing and not packs_each_step else one_per_pack
    plan = make_plan(inputs.sum(axis=1), config.seq_length * inputs.shape[1])
    return plan if inputs.shape[1] == 1 else replace(plan, first_lengths=inputs[:, 0])


def one_per_pack(lengths: NDArray[np.int64], capacity: int) -> PackPlan:
    """The plan without packing: pack i is record i."""
    count = len(lengths)
    return PackPlan(lengths=lengths, capacity=capacity, records=np.arange(count), offsets=np.arange(count + 1))


def best_fit(lengths: NDArray[np.int64], capacity: int) -> PackPlan:
    """Packs by best-fit decreasing: the longest record first, each into the fullest pack that still has room for it.

    Its packs are at most 11/9 of the fewest possible, and on real lengths mostly full. Records of one length are placed
    together, which makes a million records a matter of seconds: the work in Python is by length and room, not by
    record.

    Args:
        lengths: int64 [records], each at least 1 and at most `capacity`.
        capacity: tokens that a pack may hold.
    """
    assert len(lengths) > 0
    assert lengths.min() >= 1
    assert lengths.max() <= capacity
    longest_first = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    pack_of_slot = np.concatenate(_place(values[::-1].tolist(), counts[::-1].tolist(), capacity))
    return _in_file_order(lengths, capacity, longest_first, pack_of_slot)


def _place(lengths: Sequence[int], counts: Sequence[int], capacity: int) -> list[NDArray[np.int64]]:
    """The pack of each record, for `counts[i]` records of `lengths[i]` tokens, lengths decreasing."""
    placed: list[NDArray[np.int64]] = []
    num_packs = 0
    packs_with: dict[int, list[int]] = defaultdict(list)  # room -> the packs that have it
    rooms: list[int] = []  # the keys of `packs_with`, ascending
    for length, count in zip(lengths, counts, strict=True):
        while count:
            at = bisect_left(rooms, length)
            room = rooms[at] if at < len(rooms) else capacity
            # The fullest pack stays the fullest with each record it takes: it takes as many as it can.
            each = min(room // length, count)
            wanted = count // each
            if at < len(rooms):
                packs = packs_with[room]
                taken = packs[-wanted:]
                del packs[-wanted:]
                if not packs:
                    del packs_with[room], rooms[at]
            else:
                taken = list(range(num_packs, num_packs + wanted))
                num_packs += wanted
            placed.append(np.repeat(np.array(taken), each))
            count -= each * len(taken)
            left = room - each * length
            if left:
                if left not in packs_with:
                    insort(rooms, left)
                packs_with[left] += taken
    return placed


def _in_file_order(
    lengths: NDArray[np.int64], capacity: int, records: NDArray[np.int64], packs: NDArray[np.int64]
) -> PackPlan:
    """The plan in which `records[i]` lies in pack `packs[i]`."""
    first_record = np.full(packs.max() + 1, len(records))
    np.minimum.at(first_record, packs, records)
    order = np.lexsort((records, first_record[packs]))
    sizes = np.bincount(packs)[np.argsort(first_record)]
    return PackPlan(
        lengths=lengths, capacity=capacity, records=records[order], offsets=np.concatenate([[0], np.cumsum(sizes)])
    )
