"""Compatibility-aware dynamic fine-tuning: dft that trusts records less that the model finds improbable."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_psft.objectives.builtin.dft import dft_loss
from megatron_psft.objectives.declare import Setting, Settings, objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_psft.objectives.labels import LabelInputs, LabelStats

CADFT_BETA = Setting(
    name="cadft_beta",
    default=1.0,
    range="non-negative",
    help="how fast the weight of a record falls with its NLL above the mean of its batch, in standard deviations.",
)


@objective(
    title="dft with less weight on records that are improbable among those of their batch",
    formula="-sg(w p) l, per record w = exp(-cadft_beta max(0, z)), z its NLL in standard deviations above the batch's",
    source="arXiv 2606.11206",
    needs={"nll_z"},
    settings=(CADFT_BETA,),
)
def cadft_loss(stats: LabelStats, given: LabelInputs, config: Settings) -> Tensor:
    """sg(exp(-cadft_beta max(0, z))) times dft (arXiv 2606.11206, its compatibility-aware objective).

    z is of the token's record. The paper's other half, in which the model rewrites records that stay improbable,
    changes the data and is no loss.
    """
    assert given.nll_z is not None
    weight: Tensor = (-config.cadft_beta * given.nll_z.clamp(min=0.0)).exp()
    return weight * dft_loss(stats, given, config)
