"""Objectives as others write them, outside of the package, for the tests beside."""

from megatron_psft.objectives.builtin.iw_sft import IW_LEVEL, iw_sft_loss
from megatron_psft.objectives.builtin.psft import psft_loss
from megatron_psft.objectives.builtin.sft_kl import KL_TOP_K
from megatron_psft.objectives.declare import Setting, objective
from megatron_psft.objectives.ratio import top_divergence


@objective(needs={"old"}, takes_advantages=True)
def psft_again(stats, given, config):
    return psft_loss(stats, given, config)


def sft_again(stats, given, config):
    return -stats.log_probs


@objective(needs={"reference", "records"}, settings=(IW_LEVEL,))
def iw_sft_again(stats, given, config):
    return iw_sft_loss(stats, given, config)


@objective(needs={"ref_top"}, settings=(KL_TOP_K,))
def from_top(stats, given, config):
    return top_divergence(stats, given)


@objective(needs={"ref_top", "records"}, settings=(KL_TOP_K,))
def from_top_of_records(stats, given, config):
    return top_divergence(stats, given)


@objective(needs={"crystal ball"})
def needs_too_much(stats, given, config):
    return -stats.log_probs


@objective(settings=(Setting(name="gamma", default=1.0, help="a flag that nobody knows."),))
def has_a_flag(stats, given, config):
    return -stats.log_probs


def mean(stats, given, config):
    return -stats.log_probs.mean()


no_function = 3
