"""What is drawn of runs: charts of metrics over steps, and what they tell."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A metric, or one divided by another, over the steps."""

    name: str
    """Of the PNG, and of the metric where `metric` is absent."""
    title: str
    unit: str
    note: str
    """What to read from it."""
    metric: str | None = None
    per: str | None = None
    """Metric to divide by; a mean over steps is of sum by sum."""
    factor: float = 1.0
    over_steps: Literal["mean", "max", "none"] = "mean"
    """What is drawn of several steps: their mean or largest value, or each of them."""
    may_be_log: bool = False
    """Whether the axis is logarithmic where values differ much; it has no place for 0."""
    from_zero: bool = False
    """Whether the axis begins at 0, unless it is logarithmic."""

    @property
    def key(self) -> str:
        return self.metric or self.name


@dataclass(frozen=True, kw_only=True)
class Section:
    """Charts that answer one question."""

    title: str
    note: str
    charts: tuple[Chart, ...]
    of_old_policy: bool = False
    """Whether it is left out where no run has one; its syncs are marked."""


SECTIONS = (
    Section(
        title="What is learned",
        note="Nats per label token, on the batches of training and on held-out records.",
        charts=(
            Chart(
                name="loss",
                title="Loss",
                unit="value of the objective",
                note="What the optimizer lowers: nats with cross-entropy, minus the clipped ratio with PSFT. Compare "
                "it only between runs of one objective.",
            ),
            Chart(
                name="nll",
                title="Negative log-likelihood",
                unit="nats per label token",
                note="Of the labels, before the step's update.",
            ),
            Chart(
                name="valid_nll",
                title="Validation: negative log-likelihood",
                unit="nats per label token",
                note="Rising while the one of training falls: the demonstrations are being memorized.",
                over_steps="none",
            ),
            Chart(
                name="entropy",
                title="Entropy",
                unit="nats per label token",
                note="Of the next-token distribution. A collapse leaves reinforcement learning little to explore.",
                from_zero=True,
            ),
            Chart(
                name="valid_entropy",
                title="Validation: entropy",
                unit="nats per label token",
                note="The same on held-out records.",
                over_steps="none",
                from_zero=True,
            ),
        ),
    ),
    Section(
        title="The old policy and its clip",
        note="How far the policy goes from the old one between two syncs.",
        of_old_policy=True,
        charts=(
            Chart(
                name="clip_fraction",
                title="Clip fraction",
                unit="% of label tokens",
                note="They have no gradient until the next sync. Near 0 PSFT acts like SFT; steadily above 50 %, a "
                "smaller learning rate or a shorter interval makes use of them.",
                factor=100,
                from_zero=True,
            ),
            Chart(
                name="ratio_mean",
                title="Ratio, mean",
                unit="π / π_old, mean over label tokens",
                note="1 right after a sync.",
                may_be_log=True,
            ),
            Chart(
                name="ratio_p05",
                title="Ratio, 5th percentile",
                unit="π / π_old of a label token",
                note="5 % of the label tokens have become less likely than by this factor.",
            ),
            Chart(
                name="ratio_p50",
                title="Ratio, median",
                unit="π / π_old of a label token",
                note="At 1 half of the label tokens hardly move: most of them are learned, or never get a gradient.",
            ),
            Chart(
                name="ratio_p95",
                title="Ratio, 95th percentile",
                unit="π / π_old of a label token",
                note="Beyond the bound of the clip, more than 5 % of the label tokens are clipped.",
                may_be_log=True,
            ),
            Chart(
                name="ratio_max",
                title="Ratio, largest",
                unit="π / π_old, largest of a label token",
                note="A single token's; of several steps the largest.",
                over_steps="max",
                may_be_log=True,
            ),
            Chart(
                name="approx_kl",
                title="Divergence from the old policy",
                unit="nats per label token",
                note="Estimated as r - 1 - log r; 0 right after a sync.",
                may_be_log=True,
                from_zero=True,
            ),
            Chart(
                name="old_policy_share",
                title="Old policy's share of the time",
                unit="% of step time",
                note="The forward-only pass at the start of each window.",
                metric="old_policy_seconds",
                per="step_seconds",
                factor=100,
                from_zero=True,
            ),
        ),
    ),
    Section(
        title="Preference pairs",
        note="Chosen against rejected sequence of a pair.",
        charts=(
            Chart(
                name="margin",
                title="Margin",
                unit="nats times dpo_beta, mean over pairs",
                note="By how much more than the initial model the policy prefers the chosen sequence.",
            ),
            Chart(
                name="accuracy",
                title="Accuracy",
                unit="% of pairs",
                note="Pairs with a margin above 0.",
                factor=100,
                from_zero=True,
            ),
            Chart(
                name="chosen_log_probs",
                title="Log-probability of the chosen",
                unit="nats per sequence",
                note="Sum over its labels.",
            ),
            Chart(
                name="rejected_log_probs",
                title="Log-probability of the rejected",
                unit="nats per sequence",
                note="Sum over its labels.",
            ),
        ),
    ),
    Section(
        title="Optimizer",
        note="What an update is made of.",
        charts=(
            Chart(
                name="grad_norm",
                title="Gradient norm",
                unit="L2 norm over all parameters",
                note="Before clipping.",
                may_be_log=True,
            ),
            Chart(
                name="lr",
                title="Learning rate",
                unit="step size of AdamW",
                note="Of the step's update.",
                over_steps="none",
                from_zero=True,
            ),
        ),
    ),
    Section(
        title="Speed and memory",
        note="Of whole steps, with the old policy's pass.",
        charts=(
            Chart(
                name="tokens_per_second",
                title="Throughput",
                unit="tokens per second, all ranks",
                note="Padding is not counted.",
                metric="tokens",
                per="step_seconds",
                from_zero=True,
            ),
            Chart(
                name="step_seconds",
                title="Step time",
                unit="seconds",
                note="With the old policy's pass where a window begins.",
                from_zero=True,
            ),
            Chart(
                name="tflops_per_gpu",
                title="Arithmetic throughput",
                unit="TFLOP/s per GPU",
                note="Of forward and backward passes.",
                from_zero=True,
            ),
            Chart(
                name="mfu",
                title="Model FLOP utilization",
                unit="% of the GPU's peak",
                note="Of forward and backward passes.",
                factor=100,
                from_zero=True,
            ),
            Chart(
                name="max_memory_gib",
                title="GPU memory",
                unit="GiB, largest so far",
                note="Allocated on rank 0.",
                over_steps="none",
                from_zero=True,
            ),
        ),
    ),
)
