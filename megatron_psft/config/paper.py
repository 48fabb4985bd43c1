"""The paper's settings (arXiv 2508.17784), kept once: recipes, examples and presets take them or are tested by them.

Sources: its author in issues 6, 7, 18 and 19 of github.com/zwhong714/PSFT, and the script there with batches of 256
(`verl/recipe/psft/run_psft.sh`, commit 52f4c7e). verl calls a batch of 256 records a step; here a step is an optimizer
step. Imports no torch.
"""

from collections.abc import Mapping

Values = Mapping[str, str | int | float]
"""Fields of the configuration and their values."""

PROMPT_TOKENS = 2048
"""Longest prompt, in tokens; records with longer ones are left out of the paper's data."""
ANSWER_TOKENS = 6144
"""Longest answer, in tokens, likewise."""

_SHARED: Values = {
    "loss_aggregation": "token-mean",
    "global_batch_unit": "records",
    "seq_length": PROMPT_TOKENS + ANSWER_TOKENS,
    "epochs": 10,
    "lr_decay_style": "constant",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
}
# One update for each of verl's batches of 256, which its warm-up of 10 counts.
_BASELINE: Values = {**_SHARED, "global_batch_size": 256, "lr": 2e-5, "lr_warmup_iters": 10}

RUNS: Mapping[str, Values] = {
    "psft": {
        **_SHARED,
        "objective": "psft",
        "clip_ratio_high": 0.28,
        "global_batch_size": 32,
        # verl's batch of 256 has 8 mini-batches of 32: one old policy for each batch, and 8 times 10 steps of warm-up.
        "old_policy_interval": 8,
        "lr": 1e-6,
        "lr_warmup_iters": 80,
        "sft_warmup_iters": 0,
    },
    "sft": {**_BASELINE, "objective": "sft"},
    # No source says the batch and the rate of this one: they are taken to be those of the other baseline.
    "sft-kl": {**_BASELINE, "objective": "sft-kl", "kl_coef": 0.5},
}
"""Training, by objective."""

EVALUATED_STEPS: Mapping[str, int] = {"sft": 700, "sft-kl": 900, "psft": 1300 * 8}
"""The optimizer step whose checkpoint the paper evaluates, by objective; verl's 700, 900 and 1,300."""

EVALUATION: Values = {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 10240, "num_samples": 32}
"""Sampling of the answers to maths questions."""
