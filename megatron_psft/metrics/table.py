"""The metrics of metrics.jsonl: what each is, what it is a mean over, how it is shown. Imports no torch.

A metric that is a mean over label tokens has an entry here and a line in `sums.py`; the reduction over ranks,
metrics.jsonl, the progress bar, Megatron-Bridge's log, charts and docs/metrics.md follow from the entry.
"""

from collections.abc import Collection, Mapping, Sequence

from megatron_psft.metrics.metric import ChartSpec, Metric
from megatron_psft.metrics.set_names import metric_of_set
from megatron_psft.objectives.declare import Requirement

_TABLE = (
    Metric(
        name="step",
        unit="from 1",
        help="Optimizer step. The line of step 0 has what was evaluated before the first one.",
    ),
    Metric(
        name="nll",
        unit="nats per label token",
        help="-log pi of the labels, before the update: the curve to watch.",
        over="label_tokens",
        is_by_source=True,
        is_printed=True,
        is_on_bar=True,
        chart=ChartSpec(
            section="learning", title="Negative log-likelihood", note="Of the labels, before the step's update."
        ),
    ),
    Metric(
        name="valid_nll",
        unit="nats per label token",
        help="`nll` of `--valid-data`, after the update, on steps with an evaluation, and before the first step in the "
        "line of step 0; sum over all its label tokens by their number. `valid_nll/NAME` of a set with a name.",
        is_printed=True,
        chart=ChartSpec(
            section="learning",
            title="Validation: negative log-likelihood",
            note="Rising while the one of training falls: the demonstrations are being memorized.",
            over_steps="none",
        ),
    ),
    Metric(
        name="drift",
        unit="nats per token",
        help="On `--drift-data`, the initial model's own answers: how much higher their negative "
        "log-likelihood is than before the first step, an estimate of KL(initial, current), the divergence whose "
        "draws are the initial model's. `drift/NAME` of a set with a name.",
        is_printed=True,
        chart=ChartSpec(
            section="forgetting",
            title="Drift from the initial model",
            note="KL(initial || current) on the initial model's own answers, which goes with how much is forgotten. "
            "The band is a standard error to each side.",
            stderr="drift_stderr",
            over_steps="none",
        ),
    ),
    Metric(
        name="drift_stderr",
        unit="nats per token",
        help="Its standard error, over the answers of the set.",
    ),
    Metric(
        name="loss",
        unit="value of the objective",
        help="What is optimized, under its aggregation; about -1 for `psft`, whatever the model has learned.",
        over="denominator",
        is_printed=True,
        is_on_bar=True,
        chart=ChartSpec(
            section="learning",
            title="Loss",
            note="What the optimizer lowers: nats with cross-entropy, minus the clipped ratio with PSFT. Compare it "
            "only between runs of one objective.",
        ),
    ),
    Metric(
        name="entropy",
        unit="nats per label token",
        help="Entropy of the next-token distribution, over the whole vocabulary.",
        over="label_tokens",
        is_by_source=True,
        is_printed=True,
        is_on_bar=True,
        chart=ChartSpec(
            section="learning",
            title="Entropy",
            note="Of the next-token distribution. A collapse leaves reinforcement learning little to explore.",
            from_zero=True,
        ),
    ),
    Metric(
        name="valid_entropy",
        unit="nats per label token",
        help="`entropy` on `--valid-data`, as `valid_nll`; `valid_entropy/NAME` of a set with a name.",
        chart=ChartSpec(
            section="learning",
            title="Validation: entropy",
            note="The same on held-out records.",
            over_steps="none",
            from_zero=True,
        ),
    ),
    Metric(
        name="window_step",
        unit="steps since the sync",
        needs="old",
        help="Place of the step in the old policy's window: 0 on the step after a sync. Steps of warm-up have none.",
    ),
    Metric(
        name="clip_fraction",
        unit="share of label tokens",
        needs="old",
        help="Label tokens whose ratio is beyond the bound of the clip, so that they have no gradient.",
        over="label_tokens",
        is_by_source=True,
        is_printed=True,
        is_on_bar=True,
        chart=ChartSpec(
            section="old policy",
            title="Clip fraction",
            note="They add no gradient in their step. Near 0 PSFT acts like SFT; steadily above 50 %, most of the "
            "epoch's gradient is thrown away: lower the learning rate or shorten the window.",
            unit="% of label tokens",
            factor=100,
            from_zero=True,
        ),
    ),
    Metric(
        name="ratio_mean",
        unit="pi / pi_old",
        needs="old",
        help="Ratio of the label tokens; exactly 1 on the first step of a window, and in warm-up.",
        over="label_tokens",
        chart=ChartSpec(
            section="old policy",
            title="Ratio, mean",
            note="1 right after a sync.",
            unit="π / π_old, mean over label tokens",
            may_be_log=True,
        ),
    ),
    Metric(
        name="ratio_p05",
        unit="pi / pi_old",
        needs="old",
        help="5th percentile of the ratio over the label tokens, by nearest rank, from a histogram: within 0.1 % "
        "of the ratio of one of them for ratios from 0.5 to 2, and within 0.3 % up to e^2.",
        ratio_percentile=5,
        chart=ChartSpec(
            section="old policy",
            title="Ratio, 5th percentile",
            note="5 % of the label tokens have become less likely than by this factor.",
            unit="π / π_old of a label token",
        ),
    ),
    Metric(
        name="ratio_p50",
        unit="pi / pi_old",
        needs="old",
        help="Its median.",
        ratio_percentile=50,
        chart=ChartSpec(
            section="old policy",
            title="Ratio, median",
            note="At 1 half of the label tokens hardly move: most of them are learned, or never get a gradient.",
            unit="π / π_old of a label token",
        ),
    ),
    Metric(
        name="ratio_p95",
        unit="pi / pi_old",
        needs="old",
        help="Its 95th percentile.",
        ratio_percentile=95,
        chart=ChartSpec(
            section="old policy",
            title="Ratio, 95th percentile",
            note="Beyond the bound of the clip, more than 5 % of the label tokens are clipped.",
            unit="π / π_old of a label token",
            may_be_log=True,
        ),
    ),
    Metric(
        name="ratio_max",
        unit="pi / pi_old",
        needs="old",
        help="Its largest value, exactly.",
        is_printed=True,
        chart=ChartSpec(
            section="old policy",
            title="Ratio, largest",
            note="A single token's; of several steps the largest.",
            unit="π / π_old, largest of a label token",
            over_steps="max",
            may_be_log=True,
        ),
    ),
    Metric(
        name="scoring_gap_max",
        unit="nats per label token",
        needs="old",
        help="By how much the old policy's pass and training differ about a label token on the same weights, at most: "
        "the scoring check, on the first step after the first sync of each start, or after every sync.",
    ),
    Metric(
        name="scoring_gap_p99",
        unit="nats per label token",
        needs="old",
        help="The same for all but 1 % of the label tokens, from a histogram: within 0.14 % + 2e-7.",
    ),
    Metric(
        name="approx_kl",
        unit="nats per label token",
        needs="old",
        help="Mean of r - 1 - log r with r the ratio: how far the model is from the old policy.",
        over="label_tokens",
        chart=ChartSpec(
            section="old policy",
            title="Divergence from the old policy",
            note="Estimated as r - 1 - log r; 0 right after a sync.",
            may_be_log=True,
            from_zero=True,
        ),
    ),
    Metric(
        name="margin",
        unit="nats times dpo_beta",
        needs="pairs",
        help="By how much more than the initial model the policy prefers the chosen sequence.",
        over="pairs",
        chart=ChartSpec(
            section="pairs",
            title="Margin",
            note="By how much more than the initial model the policy prefers the chosen sequence.",
            unit="nats times dpo_beta, mean over pairs",
        ),
    ),
    Metric(
        name="accuracy",
        unit="share of pairs",
        needs="pairs",
        help="Pairs whose margin is above 0.",
        over="pairs",
        chart=ChartSpec(
            section="pairs",
            title="Accuracy",
            note="Pairs with a margin above 0.",
            unit="% of pairs",
            factor=100,
            from_zero=True,
        ),
    ),
    Metric(
        name="chosen_log_probs",
        unit="nats per sequence",
        needs="pairs",
        help="Log-probability of the labels of the chosen sequence.",
        over="pairs",
        chart=ChartSpec(section="pairs", title="Log-probability of the chosen", note="Sum over its labels."),
    ),
    Metric(
        name="rejected_log_probs",
        unit="nats per sequence",
        needs="pairs",
        help="Log-probability of the labels of the rejected sequence.",
        over="pairs",
        chart=ChartSpec(section="pairs", title="Log-probability of the rejected", note="Sum over its labels."),
    ),
    Metric(name="tokens", unit="tokens", help="Tokens that went through the model, without padding."),
    Metric(name="label_tokens", unit="tokens", help="Tokens that the loss is of.", former_name="loss_tokens"),
    Metric(
        name="records",
        unit="records",
        help="Demonstrations; of preference pairs both sequences.",
        former_name="sequences",
    ),
    Metric(
        name="grad_norm",
        unit="L2 norm over all parameters",
        help="Of the gradient, before clipping.",
        is_printed=True,
        chart=ChartSpec(section="optimizer", title="Gradient norm", note="Before clipping.", may_be_log=True),
    ),
    Metric(
        name="lr",
        unit="step size of AdamW",
        help="Learning rate of the step.",
        is_printed=True,
        chart=ChartSpec(
            section="optimizer", title="Learning rate", note="Of the step's update.", over_steps="none", from_zero=True
        ),
    ),
    Metric(
        name="tokens_per_second",
        unit="tokens per second, all ranks",
        help="`tokens` divided by `step_seconds`, so with the old policy's pass in the time.",
        is_printed=True,
        is_on_bar=True,
        chart=ChartSpec(
            section="speed",
            title="Throughput",
            note="Padding is not counted.",
            metric="tokens",
            per="step_seconds",
            from_zero=True,
        ),
    ),
    Metric(
        name="step_seconds",
        unit="seconds",
        help="The step from its data to its update, with the old policy's pass; without evaluation and checkpoint.",
        chart=ChartSpec(
            section="speed", title="Step time", note="With the old policy's pass where a window begins.", from_zero=True
        ),
    ),
    Metric(
        name="old_policy_seconds",
        unit="seconds",
        needs="old",
        help="The part of `step_seconds` that scored a window ahead.",
        chart=ChartSpec(
            section="old policy",
            name="old_policy_share",
            title="Old policy's share of the time",
            note="The forward-only pass at the start of each window.",
            unit="% of step time",
            per="step_seconds",
            factor=100,
            from_zero=True,
        ),
    ),
    Metric(
        name="tflops_per_gpu",
        unit="TFLOP/s per GPU",
        help="On GPUs: operations of forward and backward passes, three times those of a forward pass, divided by "
        "`step_seconds` less `old_policy_seconds` and by the number of GPUs.",
        chart=ChartSpec(
            section="speed", title="Arithmetic throughput", note="Of forward and backward passes.", from_zero=True
        ),
    ),
    Metric(
        name="mfu",
        unit="share of the GPU's peak",
        help="On GPUs whose peak is known: `tflops_per_gpu` divided by the GPU's dense bf16 peak, in fp8 runs too.",
        chart=ChartSpec(
            section="speed",
            title="Model FLOP utilization",
            note="Of forward and backward passes.",
            unit="% of the GPU's peak",
            factor=100,
            from_zero=True,
        ),
    ),
    Metric(
        name="max_memory_gib",
        unit="GiB",
        help="On GPUs: memory allocated by PyTorch on rank 0, the largest since the process began.",
        chart=ChartSpec(
            section="speed",
            title="GPU memory",
            note="Allocated on rank 0.",
            unit="GiB, largest so far",
            over_steps="none",
            from_zero=True,
        ),
    ),
)

METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _TABLE}
"""All metrics by name."""


def metrics_for(needs: Collection[Requirement]) -> dict[str, Metric]:
    """The metrics that runs of an objective with these needs may have, by name."""
    return {metric.name: metric for metric in _TABLE if metric.needs is None or metric.needs in needs}


def means(needs: Collection[Requirement], sources: Sequence[str] = ()) -> dict[str, str]:
    """What each mean of a step is over (`Over`), by the metric's name, with an objective of these needs; with several
    sources also what each has by itself."""
    over: dict[str, str] = {}
    for name, metric in metrics_for(needs).items():
        if metric.over is not None:
            over[name] = metric.over
            named = sources if metric.is_by_source else ()
            over |= {metric_of_set(name, source): metric_of_set(metric.over, source) for source in named}
    return over
