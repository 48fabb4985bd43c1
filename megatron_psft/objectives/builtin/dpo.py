"""Direct preference optimization (arXiv 2305.18290) over pairs that lie side by side in a micro-batch, pure tensors.

Record 2p of a micro-batch is the chosen sequence of pair p and record 2p + 1 the rejected one. The loss of a pair is
written as losses of its label tokens, so that it takes the way of every other objective, in every layout: what a token
needs of others are sums that carry no gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from megatron_psft.objectives.declare import Setting, Settings, objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_psft.objectives.labels import LabelInputs, LabelStats

DPO_BETA = Setting(
    name="dpo_beta",
    default=0.1,
    range="positive",
    help="factor of the margin between chosen and rejected sequence; the higher, the closer to the initial model.",
)


class PairMetrics(NamedTuple):
    """One value per pair, `[pairs]`, without a gradient."""

    margin: Tensor
    """dpo_beta * (sum of l - f over chosen labels - the same over rejected ones): by how much more than the initial
    model the policy prefers the chosen sequence. The loss is -log sigmoid of it."""
    accuracy: Tensor
    """1 where the margin is positive, 0 elsewhere."""
    chosen_log_probs: Tensor
    """Log-probability of the chosen sequence's labels, nats."""
    rejected_log_probs: Tensor
    """The same of the rejected one's."""


def pair_metrics(stats: LabelStats, given: LabelInputs, config: Settings) -> PairMetrics:
    """Compares the sequences of each pair; collective over context-parallel ranks, all of which get the same."""
    assert given.records is not None
    assert given.ref_log_probs is not None
    log_probs = stats.log_probs.detach()
    chosen, rejected = given.records.sums(log_probs).view(-1, 2).unbind(dim=1)
    ref_chosen, ref_rejected = given.records.sums(given.ref_log_probs).view(-1, 2).unbind(dim=1)
    margin = config.dpo_beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return PairMetrics(margin, (margin > 0).to(margin.dtype), chosen, rejected)


@objective(
    title="direct preference optimization, of pairs",
    formula="of a pair: -log sigmoid(dpo_beta ((sum of l - f over the chosen labels) - (the same over the rejected)))",
    source="arXiv 2305.18290",
    needs={"reference", "pairs"},
    settings=(DPO_BETA,),
)
def dpo_loss(stats: LabelStats, given: LabelInputs, config: Settings) -> Tensor:
    """-log sigmoid(dpo_beta * ((l_c - f_c) - (l_r - f_r))) with sums over the labels of the chosen and the rejected
    sequence (arXiv 2305.18290, equation 7).

    Each label token has an equal share of its pair's loss as its value, and as its gradient -/+ dpo_beta * sigmoid(-
    margin) grad l: the pair's own gradient, by the chain rule through the sums.
    """
    from torch.nn.functional import logsigmoid

    assert given.records is not None
    pairs = given.records.ids // 2
    is_chosen = given.records.ids % 2 == 0
    margin = pair_metrics(stats, given, config).margin
    counts = given.records.label_counts.view(-1, 2).sum(dim=1).clamp(min=1)
    slope = config.dpo_beta * (-margin).sigmoid()[pairs]
    zero = stats.log_probs - stats.log_probs.detach()
    return (-logsigmoid(margin) / counts)[pairs] + (-slope).where(is_chosen, slope) * zero
