"""The scoring check: a pass that differs from training is found after the first sync, whatever precision and layout."""

import json
import logging
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from megatron_psft.config.schema import ObjectiveConfig
from megatron_psft.errors import UserError
from megatron_psft.metrics.run_log import METRICS_FILE
from megatron_psft.scoring.agreement import BOUNDS, ScoringAgreement
from tests.support import tiny
from tests.support.cli import REPOSITORY, Exit, run_cli
from tests.support.fp8 import make_config
from tests.support.layouts import LAYOUTS
from tests.support.marks import slow

GAPS = ("scoring_gap_max", "scoring_gap_p99")
DISAGREE = "the old policy's pass and training disagree about the same weights"
DIFFER = "the old policy's pass and training differ by more than"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.build_model(folder / "model", "qwen2")
    tiny.build_tokenizer(folder / "tokenizer")
    tiny.write_records(folder / "records.jsonl", 16)
    return folder


def command_line(inputs, save, *flags: str) -> list[str]:
    shared = f"""--load-hf {inputs / "model"} --tokenizer {inputs / "tokenizer"} --data {inputs / "records.jsonl"}
        --save {save} --train-iters 3 --sft-warmup-iters 1 --old-policy-interval 2 --global-batch-size 8 --lr 1e-4
        --seq-length 256"""
    return [*shared.split(), *flags]


def lines_of(save) -> list[dict[str, float]]:
    return [json.loads(line) for line in (save / METRICS_FILE).read_text().splitlines()]


def gaps_of(save, name: str = "scoring_gap_max") -> list[float | None]:
    return [line.get(name) for line in lines_of(save)]


@contextmanager
def scaled_attention(factor: float):
    """Attention scores are multiplied by `factor` where no gradient is wanted, as by another kernel."""
    from megatron_psft.model.layers import Attention

    forward = Attention.forward

    def scaled(self, query, *args, **kwargs):
        return forward(self, query if torch.is_grad_enabled() else query * factor, *args, **kwargs)

    Attention.forward = scaled
    try:
        yield
    finally:
        Attention.forward = forward


@contextmanager
def noisy_scores(noise: float):
    """The pass is off by `noise` nats at every label."""
    from megatron_psft.train.pipeline import Pipeline

    score = Pipeline.score_labels

    def scored(self, micro_batches):
        return [stats._replace(log_probs=stats.log_probs - noise) for stats in score(self, micro_batches)]

    Pipeline.score_labels = scored
    try:
        yield
    finally:
        Pipeline.score_labels = score


@contextmanager
def fp32_attention(_: float):
    """In the pass attention is computed in fp32, as by a kernel that rounds only at its end: no fault."""
    from megatron_psft.model.layers import Attention

    forward = Attention.forward

    def exact(self, query, key, value, *args, **kwargs):
        if torch.is_grad_enabled():
            return forward(self, query, key, value, *args, **kwargs)
        return forward(self, query.float(), key.float(), value.float(), *args, **kwargs).to(query.dtype)

    Attention.forward = exact
    try:
        yield
    finally:
        Attention.forward = forward


@contextmanager
def shifted_attention(_: float):
    """In the pass each position gets the attention of the one before it."""
    from megatron_psft.model.layers import Attention

    forward = Attention.forward

    def shifted(self, query, key, value, *args, **kwargs):
        output = forward(self, query, key, value, *args, **kwargs)
        return output if torch.is_grad_enabled() else output.roll(1, dims=0)

    Attention.forward = shifted
    try:
        yield
    finally:
        Attention.forward = forward


FAULTS = {
    "attention scale": scaled_attention,
    "noise": noisy_scores,
    "positions": shifted_attention,
    "rounding": fp32_attention,
}


def _run_with(fault: str, size: float, argv: list[str]) -> Exit:
    with FAULTS[fault](size):
        return run_cli(argv)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["one", "TP2"])
def test_another_attention_scale_in_the_pass_is_warned_of(pool, inputs, tmp_path, precision, layout):
    world_size, flags = LAYOUTS[layout].world_size, LAYOUTS[layout].flags
    flags = [*flags, *(["--bf16"] if precision == "bf16" else [])]
    exits = pool.run(_run_with, world_size, "attention scale", 1.05, command_line(inputs, tmp_path, *flags))
    assert [exit.code for exit in exits] == [0] * world_size, exits[0].err
    assert exits[0].err.count(f"WARNING: step 2: {DIFFER} {precision} allows: scoring_gap_max") == 1
    _, line, _ = lines_of(tmp_path)
    assert BOUNDS[precision].p99 < line["scoring_gap_p99"] < line["scoring_gap_max"] < 1
    assert [gap is None for gap in gaps_of(tmp_path)] == [True, False, True], "once, after the warm-up"


@pytest.mark.slow
def test_rounding_of_another_kernel_is_within_what_bf16_allows(pool, inputs, tmp_path):
    argv = command_line(inputs, tmp_path, "--bf16", "--train-iters", "2")
    (exit,) = pool.run(_run_with, 1, "rounding", 0.0, argv)
    assert exit.code == 0, exit.err
    assert lines_of(tmp_path)[1]["scoring_gap_p99"] > BOUNDS["fp32"].p99, "it is seen, and more than fp32 would allow"
    assert "WARNING" not in exit.err


@pytest.mark.parametrize(
    ("fault", "size", "layout", "flags"),
    [
        ("attention scale", 0.5, "TP2", ["--bf16"]),
        ("positions", 0.0, "one", []),
        slow("noise", 0.3, "one", []),
        slow("noise", 0.3, "PP2-VPP1", []),
        slow("attention scale", 1.5, "one", []),
    ],
)
def test_a_difference_beyond_the_clip_ends_the_run(pool, inputs, tmp_path, fault, size, layout, flags):
    world_size = LAYOUTS[layout].world_size
    argv = command_line(inputs, tmp_path, *LAYOUTS[layout].flags, *flags)
    exits = pool.run(_run_with, world_size, fault, size, argv)
    assert [exit.code for exit in exits] == [2] * world_size
    assert f"error: step 2: {DISAGREE}: scoring_gap_p99 (" in exits[0].err
    assert len(lines_of(tmp_path)) == 1, "the step was not made"


@pytest.mark.slow
def test_the_clip_of_the_run_is_the_measure(pool, inputs, tmp_path):
    """0.3 nats are beyond a clip of 0.28, and within one of 0.4."""
    argv = command_line(inputs, tmp_path, "--clip-ratio-high", "0.4", "--train-iters", "2")
    (exit,) = pool.run(_run_with, 1, "noise", 0.3, argv)
    assert exit.code == 0
    assert DIFFER in exit.err


@pytest.mark.parametrize("layout", ["PP2-VPP1", slow("TP2"), slow("CP2")])
def test_the_gap_is_what_it_is_in_any_layout(pool, inputs, tmp_path, layout):
    world_size = LAYOUTS[layout].world_size
    argv = command_line(inputs, tmp_path, *LAYOUTS[layout].flags, "--check-scoring", "--train-iters", "5")
    exits = pool.run(_run_with, world_size, "noise", 0.125, argv)
    assert [exit.code for exit in exits] == [0] * world_size, exits[0].err
    for name in GAPS:
        assert gaps_of(tmp_path, name)[::2] == [None] * 3, "steps without a sync before them"
        assert gaps_of(tmp_path, name)[1::2] == pytest.approx([0.125] * 2, rel=1e-3)
    ratios = [line["ratio_max"] for line in lines_of(tmp_path)]
    assert [ratio == 1 for ratio in ratios] == [True, True, False, True, False], "training takes no notice"


@pytest.mark.slow
@pytest.mark.both
def test_it_is_measured_once_per_start_and_changes_nothing(pool, inputs, tmp_path):
    argv = command_line(inputs, tmp_path / "run")
    for train_iters in (5, 8):
        (exit,) = pool.run(run_cli, 1, [*argv, "--train-iters", str(train_iters)])
        assert exit.code == 0, exit.err
    assert gaps_of(tmp_path / "run") == [None, 0, None, None, None, 0, None, None], "the same passes: exactly 0"
    assert "WARNING" not in exit.err
    (exit,) = pool.run(run_cli, 1, command_line(inputs, tmp_path / "checked", "--train-iters", "5", "--check-scoring"))
    once, always = lines_of(tmp_path / "run")[:5], lines_of(tmp_path / "checked")
    timings = {"step_seconds", "old_policy_seconds", "tokens_per_second"}
    for line, checked in zip(once, always, strict=True):
        assert {name: checked[name] for name in line.keys() - timings - {*GAPS}} == {
            name: line[name] for name in line.keys() - timings - {*GAPS}
        }


@pytest.mark.parametrize("flags", [["--objective", "sft"], ["--old-policy-interval", "1"]])
def test_without_another_policy_there_is_nothing_to_measure(pool, inputs, tmp_path, flags):
    shared = command_line(inputs, tmp_path, "--train-iters", "2")
    removed = {"--sft-warmup-iters", "--old-policy-interval"}
    argv = [word for place, word in enumerate(shared) if word not in removed and shared[place - 1] not in removed]
    (exit,) = pool.run(_run_with, 1, "noise", 9.0, [*argv, *flags])
    assert exit.code == 0, exit.err
    assert gaps_of(tmp_path) == [None, None]


def test_fp8_is_measured_after_every_sync():
    from megatron_psft.train.assemble import _scoring_agreement

    class Place:
        device = torch.device("cpu")

    config = make_config("delayed")
    plain = replace(config, precision=replace(config.precision, fp8_format=None))
    checked = replace(plain, logging=replace(plain.logging, check_scoring=True))
    for case, is_repeated in ((config, True), (plain, False), (checked, True)):
        agreement = _scoring_agreement(case, Place)
        assert agreement.is_due
        agreement._is_done = True
        assert agreement.is_due is is_repeated
    for objective in (ObjectiveConfig(old_policy_interval=1), ObjectiveConfig(objective="dft")):
        assert _scoring_agreement(replace(config, objective=objective), Place) is None


@pytest.mark.parametrize("precision", BOUNDS)
def test_the_documented_bounds_are_those_of_the_code(precision):
    bounds = BOUNDS[precision]
    row = f"| {precision} | {bounds.p99:g} | {bounds.largest:g} |"
    assert row in (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize(("largest", "p99"), [(0.9, 0.9), (1.1, 0.9), (0.9, 1.1)])
def test_each_bound_of_a_precision_is_its_own(caplog, precision, largest, p99):
    bounds = BOUNDS[precision]
    place = type("Place", (), {"device": torch.device("cpu")})
    agreement = ScoringAgreement(precision=precision, clip_ratio_high=0.28, parallel=place, after_every_sync=False)
    with caplog.at_level(logging.WARNING):
        agreement._judge(3, largest * bounds.largest, p99 * bounds.p99)
    assert (f"WARNING: step 3: {DIFFER} {precision} allows" in caplog.text) == (max(largest, p99) > 1)


@pytest.mark.parametrize("largest", [math.inf, math.nan])
def test_a_difference_that_is_not_finite_is_refused(largest):
    place = type("Place", (), {"device": torch.device("cpu")})
    agreement = ScoringAgreement(precision="bf16", clip_ratio_high=0.28, parallel=place, after_every_sync=False)
    with pytest.raises(UserError, match=DISAGREE):
        agreement._judge(3, largest, 0.0)
