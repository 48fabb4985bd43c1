"""Data sets of arrays in memory, without files or a tokenizer."""

import hashlib
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_psft.data.cache import TokenizedSource
from megatron_psft.data.dataset import SourceRecords, TokenizedDataset
from megatron_psft.data.example import Example
from megatron_psft.data.statistics import count_records
from megatron_psft.data.tokenizing import make_index


def dataset_of(
    *,
    tokens: NDArray[np.int32],
    label_mask: NDArray[np.bool_],
    offsets: NDArray[np.int64],
    advantages: NDArray[np.float32] | None = None,
    second_starts: NDArray[np.int64] | None = None,
) -> TokenizedDataset:
    """All records of the arrays, once: record i is [offsets[i], offsets[i + 1]) of `tokens` (int32 [total]) and
    `label_mask` (bool [total], true where a token is to be predicted; never at a record's first). `offsets`: int64
    [records + 1]; `advantages`: fp32 [records], all 1 where None; `second_starts`: int64 [records], of the records as
    pairs."""
    advantages = np.ones(len(offsets) - 1, np.float32) if advantages is None else advantages
    second_starts = np.zeros(len(offsets) - 1, np.int64) if second_starts is None else second_starts
    examples = [
        Example(
            tokens=tokens[start:stop],
            label_mask=label_mask[start:stop],
            advantage=float(advantage),
            second_start=int(second_start) or None,
        )
        for (start, stop), advantage, second_start in zip(pairwise(offsets), advantages, second_starts, strict=True)
    ]
    digest = hashlib.sha256()
    for array in (offsets, tokens, label_mask, advantages, second_starts):
        digest.update(np.ascontiguousarray(array).data)
    source = TokenizedSource(
        name="memory",
        folder=None,
        tokens=tokens,
        label_mask=label_mask,
        index=make_index(range(1, len(examples) + 1), examples),
        file_names=("memory",),
        content=digest.hexdigest(),
        bad_counts={},
    )
    lengths = source.index["length"].astype(np.int64)
    statistics = count_records(
        "memory",
        weight=1.0,
        lengths=lengths,
        label_tokens=int(source.index["labels"].sum()),
        truncated=0,
        dropped={},
    )
    records = SourceRecords(source=source, records=np.arange(len(source)), lengths=lengths, statistics=statistics)
    return TokenizedDataset([records])
