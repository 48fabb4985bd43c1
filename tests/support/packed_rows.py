"""Records in packed rows, and the layouts in which they are compared."""

import numpy as np

from megatron_psft.config.schema import ParallelConfig
from megatron_psft.data.dataset import TokenizedDataset
from megatron_psft.data.loader import BatchLoader, Shard
from megatron_psft.data.packing import PackPlan
from tests.support.datasets import dataset_of

CAPACITY = 64
PACKED_LAYOUTS = (
    *("one", "TP2", "TP2-SP", "PP2", "PP2-VPP1", "DP2"),
    *("CP2", "CP4", "PP2-CP2", "TP2-SP-CP2", "CP2-DP2-reduce"),
)
"""In which packs are compared with their records one at a time."""
# Lengths and label tokens. In packs of 64: 60 + 3 | 33 + 22 + 9 | 31 + 25 + 7 + 1 | 20 + 15 + ... ; the shortest record
# is one token and its label.
RECORDS = {
    "uneven": (
        (61, 40),
        (34, 1),
        (32, 30),
        (26, 3),
        (23, 9),
        (21, 20),
        (16, 1),
        (10, 0),
        (8, 7),
        (4, 2),
        (2, 1),
        (2, 1),
    ),
    "one label": (
        (61, 0),
        (34, 0),
        (32, 0),
        (26, 1),
        (23, 0),
        (21, 0),
        (16, 0),
        (10, 0),
        (8, 0),
        (4, 0),
        (2, 0),
        (2, 0),
    ),
}


def make_dataset(tokens: list[np.ndarray], label_masks: list[np.ndarray]) -> TokenizedDataset:
    return dataset_of(
        tokens=np.concatenate(tokens).astype(np.int32),
        label_mask=np.concatenate(label_masks),
        offsets=np.cumsum([0, *map(len, tokens)]),
    )


def make_loader(
    dataset: TokenizedDataset, place, config: ParallelConfig, plan: PackPlan, micro_batch_size: int
) -> BatchLoader:
    return BatchLoader(
        dataset,
        plan,
        global_batch_size=len(plan),
        micro_batch_size=micro_batch_size,
        shard=Shard(
            data_rank=place.data_rank,
            data_size=place.data_size,
            context_rank=place.context_rank,
            context_size=place.context_size,
        ),
        shuffle_seed=3,
        one_row=True,
        pad_to_multiple_of=place.tensor_size if config.sequence_parallel else 1,
        pad_token_id=7,
    )
