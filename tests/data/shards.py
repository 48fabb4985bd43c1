"""What the loaders of all data-parallel ranks read together."""

import torch
from hypothesis import strategies as st

from megatron_psft.data.dataset import TokenizedDataset
from megatron_psft.data.loader import Shard
from megatron_psft.data.micro_batch import MicroBatch

PAD = 0


def shards(data_size: int, context_size: int) -> list[Shard]:
    """Of all ranks that have different tokens."""
    return [
        Shard(data_rank=data_rank, data_size=data_size, context_rank=context_rank, context_size=context_size)
        for data_rank in range(data_size)
        for context_rank in range(context_size)
    ]


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
