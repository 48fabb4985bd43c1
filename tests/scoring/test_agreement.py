"""The ratio after a sync, where it should be 1: measured in every layout, and told when it clips."""

import json
import re
from dataclasses import replace

import pytest

from megatron_psft.config.schema import ObjectiveConfig
from megatron_psft.scoring.agreement import ScoringAgreement
from megatron_psft.train.assemble import _scoring_agreement
from tests.support import tiny
from tests.support.cli import Exit, run_cli
from tests.support.fp8 import make_config
from tests.support.layouts import LAYOUTS
from tests.support.marks import slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.build_model(folder / "model", "qwen2")
    tiny.build_tokenizer(folder / "tokenizer")
    tiny.write_records(folder / "records.jsonl", 16)
    return folder


def _run_noisily(argv: list[str], noise: float) -> Exit:
    """The command line as if its numbers were as coarse as fp8: scoring adds `noise` to every log-probability."""
    from megatron_psft.train import assemble
    from megatron_psft.train.pipeline import Pipeline

    score, find = Pipeline.score_labels, assemble._scoring_agreement

    def scored_elsewhere(self, micro_batches):
        return [stats._replace(log_probs=stats.log_probs - noise) for stats in score(self, micro_batches)]

    Pipeline.score_labels = scored_elsewhere
    assemble._scoring_agreement = lambda config, parallel: ScoringAgreement(config.objective.clip_ratio_high, parallel)
    try:
        return run_cli(argv)
    finally:
        Pipeline.score_labels, assemble._scoring_agreement = score, find


def command_line(inputs, save, *flags: str) -> list[str]:
    shared = f"""--load-hf {inputs / "model"} --tokenizer {inputs / "tokenizer"} --data {inputs / "records.jsonl"}
        --save {save} --train-iters 5 --sft-warmup-iters 1 --old-policy-interval 2 --global-batch-size 8 --lr 1e-4
        --seq-length 256"""
    return [*shared.split(), *flags]


@pytest.mark.parametrize("layout", ["one", "PP2-VPP1", slow("DP2"), slow("TP2")])
def test_each_window_says_what_precision_makes_of_the_ratio(pool, inputs, tmp_path, layout):
    """A scoring pass that is off by 0.1 makes every ratio exp(0.1), which is below the bound of the clip."""
    world_size, flags = LAYOUTS[layout].world_size, LAYOUTS[layout].flags
    exits = pool.run(_run_noisily, world_size, command_line(inputs, tmp_path, *flags), 0.1)
    assert [exit.code for exit in exits] == [0] * world_size, exits[0].err
    lines = re.findall("precision: after a sync.*", exits[0].err)
    assert len(lines) == 2, "two windows"
    for line in lines:
        assert "label tokens is 1.105171 in the mean, and at most 0.105 off 1" in line
        assert int(line.split("ratio of ")[1].split()[0]) > 5 * world_size
    assert "precision alone clips" not in exits[0].err
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["ratio_max"] == 1 for line in metrics] == [True, True, False, True, False], (
        "training is none the wiser"
    )


def test_noise_that_clips_is_warned_of(pool, inputs, tmp_path):
    (exit,) = pool.run(_run_noisily, 1, command_line(inputs, tmp_path, "--train-iters", "2"), 0.3)
    assert "precision alone clips 100 % of label tokens (clip_ratio_high 0.28)" in exit.err


def test_the_same_passes_have_no_noise(pool, inputs, tmp_path):
    (exit,) = pool.run(_run_noisily, 1, command_line(inputs, tmp_path, "--train-iters", "2"), 0.0)
    assert "label tokens is 1.000000 in the mean, and at most 0 off 1" in exit.err
    assert "precision alone clips" not in exit.err


def test_it_is_measured_with_fp8_where_the_ratio_counts():
    config = make_config("delayed")
    here = object()
    cases = {
        "psft": (ObjectiveConfig(), True),
        "window of one": (ObjectiveConfig(old_policy_interval=1), False),
        "fixed": (ObjectiveConfig(old_policy_interval="fixed"), True),
        "sft": (ObjectiveConfig(objective="sft"), False),
    }
    for objective, is_measured in cases.values():
        assert (_scoring_agreement(replace(config, objective=objective), here) is not None) is is_measured
    plain = replace(config, precision=replace(config.precision, fp8_format=None, fp8_recipe="delayed"))
    assert _scoring_agreement(plain, here) is None
