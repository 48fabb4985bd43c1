"""Anchored SFT: dft with the penalty of sft-kl."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_psft.objectives.builtin.dft import dft_loss
from megatron_psft.objectives.builtin.sft_kl import KL_COEF
from megatron_psft.objectives.declare import Settings, objective
from megatron_psft.objectives.ratio import k3

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_psft.objectives.labels import LabelInputs, LabelStats


@objective(
    title="anchored SFT, dft with the penalty of sft-kl",
    formula="-sg(p) l + kl_coef k3",
    source="arXiv 2509.23753",
    needs={"reference"},
    settings=(KL_COEF,),
)
def asft_loss(stats: LabelStats, given: LabelInputs, config: Settings) -> Tensor:
    """dft + kl_coef * k3(l, f) (arXiv 2509.23753).

    The paper anchors by KL(initial model || pi) over the full vocabulary, which would need the logits of both; this is
    k3 on label tokens, and the paper's coefficients do not carry over.
    """
    assert given.ref_log_probs is not None
    divergence: Tensor = config.kl_coef * k3(stats.log_probs, given.ref_log_probs)
    return dft_loss(stats, given, config) + divergence
