"""Loaders of small data sets, and what those of all data-parallel ranks read together."""

import numpy as np
import torch
from hypothesis import strategies as st

from megatron_psft.data.dataset import TokenizedDataset
from megatron_psft.data.loader import BatchLoader, Shard
from megatron_psft.data.micro_batch import MicroBatch
from megatron_psft.data.packing import PackPlan, one_per_pack
from tests.support.datasets import dataset_of

PAD = 0


def shards(data_size: int, context_size: int) -> list[Shard]:
    """Of all ranks that have different tokens."""
    return [
        Shard(data_rank=data_rank, data_size=data_size, context_rank=context_rank, context_size=context_size)
        for data_rank in range(data_size)
        for context_rank in range(context_size)
    ]


def make_dataset(lengths: list[int], *, has_advantages: bool = False) -> TokenizedDataset:
    """Record i has the tokens 1000 * (i + 1), 1000 * (i + 1) + 1, ...; about the second half of them are labels. Its
    advantage is i / 2, or 1."""
    masks = [[position >= min(length // 2 + 1, length - 1) for position in range(length)] for length in lengths]
    advantages = np.arange(len(lengths), dtype=np.float32) / 2 if has_advantages else None
    return dataset_of(
        tokens=np.concatenate([1000 * (i + 1) + np.arange(n, dtype=np.int32) for i, n in enumerate(lengths)]),
        label_mask=np.concatenate([np.array(mask) for mask in masks]),
        offsets=np.cumsum([0, *lengths]),
        advantages=advantages,
    )


def make_loader(dataset: TokenizedDataset, plan: PackPlan | None = None, **changes: object) -> BatchLoader:
    settings = {
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "shard": Shard(),
        "shuffle_seed": 7,
        "one_row": False,
        "pad_to_multiple_of": 1,
        "pad_token_id": PAD,
    }
    return BatchLoader(dataset, plan or one_per_pack(dataset.lengths - 1, 100), **(settings | changes))


CAPACITY = 16


datasets = st.lists(st.integers(2, 12), min_size=1, max_size=30).map(make_dataset)
context_sizes = st.sampled_from([1, 2, 3, 4])
layouts = st.tuples(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)
)  # ranks, rows of a micro-batch, micro-batches


def assert_right_where_real(batch: MicroBatch, dataset: TokenizedDataset) -> list[int]:
    """Checks label, mask and position of each token that is no padding; returns these tokens."""
    is_real = batch.tokens != PAD
    tokens, labels = batch.tokens[is_real], batch.labels[is_real]
    assert torch.equal(labels, tokens + 1), "the label is not the record's next token"
    assert torch.equal(batch.position_ids[is_real], tokens % 1000), "positions do not restart with the record"
    examples = [dataset[index] for index in range(len(dataset))]
    masks = {
        int(token): bool(mask)
        for example in examples
        for token, mask in zip(example.tokens, example.label_mask, strict=True)
    }
    assert batch.label_mask[is_real].tolist() == [masks[int(label)] for label in labels]
    assert not batch.label_mask[~is_real].any()
    owners = dict(zip(batch.record_ids[is_real].tolist(), (tokens // 1000).tolist(), strict=True))
    assert [owners[record] for record in batch.record_ids[is_real].tolist()] == (tokens // 1000).tolist()
    assert {record: int(batch.label_counts[record]) for record in owners} == {
        record: int(dataset[owner - 1].label_mask[1:].sum()) for record, owner in owners.items()
    }
    return tokens.tolist()
