"""What the reference keeps of a label token: its log-probability and, where asked for, the most probable tokens there.

In one fp32 row each, in which any id of a vocabulary is exact: log-probability of the label, of all but the top tokens
together, ids of these, their log-probabilities.
"""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_psft.objectives.labels import LabelInputs, LabelStats


def num_columns(top_k: int) -> int:
    """Numbers in a row."""
    return 2 + 2 * top_k if top_k else 1


def to_rows(stats: LabelStats) -> Tensor:
    """`[..., columns]` from statistics `[...]`; without a last dimension where there is one number."""
    if stats.top_ids is None:
        return stats.log_probs
    assert stats.top_log_probs is not None
    assert stats.rest_log_probs is not None
    alone = torch.stack([stats.log_probs, stats.rest_log_probs], dim=-1)
    return torch.cat([alone, stats.top_ids.float(), stats.top_log_probs], dim=-1)


def with_top(given: LabelInputs, columns: Tensor) -> LabelInputs:
    """What is given with all columns of the label tokens but the label's own, `[n, 1 + 2 k]`."""
    ids, log_probs = columns[:, 1:].chunk(2, dim=1)
    return replace(given, ref_top_ids=ids.long(), ref_top_log_probs=log_probs, ref_rest_log_probs=columns[:, 0])
