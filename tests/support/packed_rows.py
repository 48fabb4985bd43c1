"""Records in packed rows, and the layouts in which they are compared."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_psft.config.schema import ParallelConfig
from megatron_psft.data.dataset import TokenizedDataset
from megatron_psft.data.loader import BatchLoader, Shard
from megatron_psft.data.packing import PackPlan
from tests.support import oracle, tiny
from tests.support.datasets import dataset_of
from tests.support.gradients import by_autograd

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


@dataclass(frozen=True)
class Data:
    """Records, and what is due for a global batch of all of them."""

    dataset: TokenizedDataset
    old_log_probs: list[Tensor]
    """Of each record, for each of its tokens but the first; NaN where there is no label."""
    gradients: dict[str, Tensor]
    sums: dict[str, float]


def make_data(model: torch.nn.Module, records: tuple[tuple[int, int], ...], seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    tokens, label_masks, old_log_probs, wanted = [], [], [], []
    for length, num_labels in records:
        # Without the padding token, for which transformers' embedding has no gradient wherever it stands.
        tokens.append(torch.randint(1, tiny.VOCAB_SIZE, (length,), generator=generator).numpy())
        label_masks.append(np.zeros(length, dtype=bool))
        label_masks[-1][1 + torch.randperm(length - 1, generator=generator)[:num_labels].numpy()] = True
        ids, label_mask = tokens[-1].tolist(), label_masks[-1].tolist()
        with torch.no_grad():
            now, _ = oracle.label_statistics(model, ids, label_mask)
        before = now + 0.4 * torch.randn(now.shape, generator=generator)
        old_log_probs.append(torch.full((length - 1,), torch.nan))
        old_log_probs[-1][torch.tensor(label_mask[1:])] = before
        wanted.append((ids, label_mask, before))
    gradients, sums = by_autograd(model, wanted, "psft")
    return Data(make_dataset(tokens, label_masks), old_log_probs, gradients, sums)


def old_of(data: Data, loader: BatchLoader, plan: PackPlan, place) -> list[Tensor]:
    """The old log-probabilities of this rank's positions, from those of the records."""
    order = plan.shuffled(3, 0)
    rows = torch.full((len(plan), loader.unpadded_length(0)), torch.nan)
    for row in range(len(plan)):
        values = torch.cat([data.old_log_probs[record] for record in order[row]])
        rows[row, : len(values)] = values
    return loader.from_packs(0, rows[loader.own_numbers(0)])
