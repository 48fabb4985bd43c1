"""What a run writes where nobody watches: lines with what matters, no bars, the same keys for every step."""

import json

import pytest

from tests.support import tiny
from tests.support.cli import run_cli
from tests.support.marks import slow

OF_SOME_STEPS = {"valid_nll", "valid_entropy", "scoring_gap_max", "scoring_gap_p99", "window_step"}
OF_SOME_STEPS |= {"valid_nll/kept", "valid_entropy/kept"}
OF_SOURCES = {
    f"{name}/{source}" for name in ("nll", "entropy", "clip_fraction") for source in ("records", "more-records")
}
"""On the steps whose batch has label tokens of them."""
OF_AN_OLD_POLICY = {"clip_fraction", "ratio_mean", "ratio_p05", "ratio_p50", "ratio_p95", "ratio_max", "approx_kl"}
OF_AN_OLD_POLICY |= {"old_policy_seconds"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.build_model(folder / "model", "qwen2", num_hidden_layers=2)
    tiny.build_tokenizer(folder / "tokenizer")
    tiny.write_records(folder / "records.jsonl", 16)
    tiny.write_records(folder / "more records.jsonl", 8, seed=1)
    return folder


def train(pool, inputs, save, *flags: str):
    shared = f"""--load-hf {inputs / "model"} --tokenizer {inputs / "tokenizer"}
        --save {save} --train-iters 5 --global-batch-size 2 --lr 1e-4 --seq-length 256 --export-hf {save / "hf"}
        --valid-data {inputs / "records.jsonl"} kept={inputs / "records.jsonl"} --eval-interval 3
        --data-cache-dir {save / "cache"}"""
    data = ["--data", str(inputs / "records.jsonl"), f"{inputs / 'more records.jsonl'}=0.75"]
    (exit,) = pool.run(run_cli, 1, [*shared.split(), *data, *flags])
    assert exit.code == 0, exit.err
    return exit, [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("flags", "has_old_policy"),
    [
        (["--old-policy-interval", "2", "--sft-warmup-iters", "1"], True),
        (["--objective", "sft"], False),
        slow(["--objective", "sft-kl"], False),
    ],
    ids=["psft", "sft", "sft-kl"],
)
def test_a_log_has_the_lines_that_matter_and_the_keys_of_its_objective(pool, inputs, tmp_path, flags, has_old_policy):
    exit, lines = train(pool, inputs, tmp_path, *flags)
    printed = [line for line in exit.out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in printed] == ["step 0 of 5", "step 1 of 5", "step 3 of 5", "step 5 of 5"]
    assert ["valid_nll " in line for line in printed] == [True, False, True, False]
    assert all(line.split(": ")[1].startswith("nll ") for line in printed[1:])
    assert "\r" not in exit.out + exit.err
    assert "%|" not in exit.err, "no bar of any pass"
    for line in lines:
        assert line.get("valid_nll") == line.get("valid_nll/kept")
    (keys,) = {frozenset(line.keys() - OF_SOME_STEPS - OF_SOURCES) for line in lines[1:]}
    assert keys & OF_AN_OLD_POLICY == (OF_AN_OLD_POLICY if has_old_policy else set())
    of_some = set().union(*lines) & (OF_SOME_STEPS | OF_SOURCES)
    assert has_old_policy or not {name for name in of_some if name.startswith(("scoring", "window", "clip"))}
    whole = [line for line in lines if {"nll/records", "nll/more-records"} <= line.keys()]
    assert whole
    for line in whole:
        low, high = sorted([line["nll/records"], line["nll/more-records"]])
        assert low < line["nll"] < high
