"""Cross-entropy with a penalty on the distance from the initial model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_psft.objectives.declare import Requirement, Setting, Settings, objective
from megatron_psft.objectives.ratio import k3, top_divergence

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_psft.objectives.labels import LabelInputs, LabelStats

KL_COEF = Setting(
    name="kl_coef",
    default=0.5,
    range="non-negative",
    help="factor of the divergence from the initial model, or of its estimate.",
)
KL_TOP_K = Setting(
    name="kl_top_k",
    default=0,
    range="non-negative",
    help="0 estimates the divergence on label tokens; k > 0 takes KL(initial model || model) over the vocabulary, of "
    "the initial model's k most probable tokens and the rest as one, and stores 8 k + 8 bytes per token.",
)


def anchor_needs(config: Settings) -> frozenset[Requirement]:
    """What `anchor` needs."""
    return frozenset({"ref_top"} if config.kl_top_k else {"reference"})


def anchor(stats: LabelStats, given: LabelInputs, config: Settings) -> Tensor:
    """kl_coef times the distance from the initial model: k3 on the label, or the divergence over the vocabulary."""
    if config.kl_top_k:
        divergence = top_divergence(stats, given)
    else:
        assert given.ref_log_probs is not None
        divergence = k3(stats.log_probs, given.ref_log_probs)
    penalty: Tensor = config.kl_coef * divergence
    return penalty


@objective(
    title="cross-entropy and a penalty on the divergence from the initial model",
    formula="-l + kl_coef D, D = k3 or, with kl_top_k, KL(initial model || model)",
    source="baseline of arXiv 2508.17784",
    needs=anchor_needs,
    settings=(KL_COEF, KL_TOP_K),
)
def sft_kl_loss(stats: LabelStats, given: LabelInputs, config: Settings) -> Tensor:
    """-l + kl_coef D: the baseline SFT-KL of arXiv 2508.17784, of which no source says how it takes the divergence."""
    return -stats.log_probs + anchor(stats, given, config)
