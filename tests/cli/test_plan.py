"""The command that plans, through its command line."""

import json
import re

import pytest

from megatron_psft.cli.plan import main
from tests.support.cli import Exit
from tests.support.recipes import SHAPES

MODEL = SHAPES["Qwen/Qwen2.5-7B-Instruct"]
SPLIT = ("--tensor-model-parallel-size", "4", "--sequence-parallel", "--use-distributed-optimizer")


@pytest.fixture
def show(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))

    def run(*flags: str) -> Exit:
        always = ["--load-hf", str(tmp_path), "--gpus", "8", "--seq-length", "32768"]
        code = main([*always, "--global-batch-size", "8", *flags])
        return Exit(code, *capsys.readouterr())

    return run


def table(out: str) -> dict[str, float]:
    rows = re.findall(r"^  (.+?)  +([\d.]+)$", out, re.MULTILINE)
    return {name: float(size) for name, size in rows}


def test_a_layout_that_fits(show):
    exit = show(*SPLIT)
    assert exit.code == 0
    assert "qwen2, TP 4 x PP 1 x CP 1 x DP 2 on 8 GPUs" in exit.out
    assert "8 sequences of 32,768 tokens = 2 replicas x 4 micro-batches x 1" in exit.out
    assert "of 79.6 GiB, 6 kept free: fits" in exit.out
    rows = table(exit.out)
    assert rows.pop("sum") == pytest.approx(sum(rows.values()), abs=0.04)
    # 7.6e9 parameters over four ranks, gradients in fp32 twice as large as weights in bf16.
    assert rows["weights (1.9e9)"] == pytest.approx(7.6e9 / 4 * 2 / 2**30, rel=0.01)
    assert rows["gradients, fp32"] == pytest.approx(2 * rows["weights (1.9e9)"], abs=0.02)
    assert "PSFT over SFT: 1.292 times the operations at most" in exit.out
    assert "smallest layout that fits: TP 4 x PP 1 x CP 1 x DP 2," in exit.out


def test_a_step_of_records_takes_as_many_rows_as_its_longest_would(show):
    exit = show(*SPLIT, "--global-batch-unit", "records", "--global-batch-size", "9", "--micro-batch-size", "2")
    assert exit.code in (0, 1)
    assert "9 records of at most 32,768 tokens, evened out over 2 replicas" in exit.out
    assert "in at most 3 rows of 65,536 each" in exit.out


def test_bf16_is_planned_for_unless_it_is_false(show):
    weights = [table(show(*SPLIT, *flags).out)["weights (1.9e9)"] for flags in ((), ("--bf16",), ("--bf16", "false"))]
    assert weights[0] == weights[1] == pytest.approx(weights[2] / 2, abs=0.01)


def test_a_layout_that_does_not_fit_ends_with_1_and_a_better_one(show):
    exit = show()
    assert exit.code == 1
    assert "does not fit" in exit.out
    assert "smallest layout that fits: TP 4 x" in exit.out


def test_where_none_fits_it_says_what_else_to_do(show):
    exit = show("--gpu-memory-gib", "10")
    assert exit.code == 1
    assert "smallest layout that fits: none; recompute activations" in exit.out


def test_the_cluster_counts(show):
    assert "of 141 GiB, 6 kept free: fits" in show(*SPLIT, "--gpu-memory-gib", "141").out
    assert show(*SPLIT, "--reserve-gib", "30").code == 1
    assert "TP 1 x" in show("--gpus-per-node", "1").out.splitlines()[-1]
    plain = table(show(*SPLIT, "--no-transformer-engine").out)
    assert plain["activations kept"] > table(show(*SPLIT).out)["activations kept"]


def test_the_old_policy_is_left_out_where_there_is_none(show):
    out = show(*SPLIT, "--objective", "sft").out
    assert "PSFT over SFT" not in out
    assert "old log-probabilities" not in out
    assert "reference" not in out


def test_what_an_objective_computes_and_keeps_besides_is_said(show):
    reference = "reference: a pass over the data before the first step, and"
    assert f"{reference} 4 bytes on disk for each token of the" in show(*SPLIT, "--objective", "dpo").out
    out = show(*SPLIT, "--objective", "sft-kl", "--kl-top-k", "64").out
    assert f"{reference} 520 bytes on disk for each token of the data, 0.484 GiB for a million" in out
    assert "before its step: 1.333 times the operations" in show(*SPLIT, "--objective", "cadft").out


def test_what_a_fixed_old_policy_keeps_grows_with_the_run(show):
    out = show(*SPLIT, "--old-policy-interval", "fixed").out
    assert "for each step of the run" in out


def test_what_training_refuses_is_an_error(show):
    exit = show("--tensor-model-parallel-size", "3")
    assert exit == Exit(
        2,
        "",
        "error: world_size (8) must be a multiple of tensor_model_parallel_size * pipeline_model_parallel_size * "
        "context_parallel_size (3); change one of them\n",
    )
