"""Anchored SFT: dft with the penalty of sft-kl."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_psft.objectives.builtin.dft import dft_loss
from megatron_psft.objectives.builtin.sft_kl import KL_COEF, KL_TOP_K, anchor, anchor_needs
from megatron_psft.objectives.declare import Settings, objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_psft.objectives.labels import LabelInputs, LabelStats


@objective(
    title="anchored SFT, dft with the penalty of sft-kl",
    formula="-sg(p) l + kl_coef D, D as for sft-kl",
    source="arXiv 2509.23753, its code",
    needs=anchor_needs,
    settings=(KL_COEF, KL_TOP_K),
)
def asft_loss(stats: LabelStats, given: LabelInputs, config: Settings) -> Tensor:
    """dft + kl_coef D (arXiv 2509.23753).

    The authors' code anchors by KL(initial model || pi) over the full vocabulary, as with `kl_top_k`. Their
    coefficients do not carry over to k3 on label tokens.
    """
    return dft_loss(stats, given, config) + anchor(stats, given, config)
