"""The forgetting meter: on answers that `psft rollout` has drawn, against probabilities of transformers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_psft.checkpoint.folders import step_folder, step_folders
from megatron_psft.cli.rollout import main as rollout
from megatron_psft.config.inputs import DataConfig
from megatron_psft.metrics.drift import MAX_START_GAP, START_FILE, estimate_drift
from tests.support import tiny
from tests.support.cli import run_cli
from tests.support.gradients import ready
from tests.support.layouts import LAYOUTS
from tests.support.marks import slow
from tests.support.pool import WorkerError

NUM_PROMPTS = 40


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A model, its answers, and the same model with weights that have moved."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.build_tokenizer(folder / "tokenizer")
    tiny.build_model(folder / "model", "qwen3", num_hidden_layers=2)
    tiny.write_records(folder / "records.jsonl", 8)
    prompts = [{"prompt": " ".join(tiny.WORDS[start : start + 3])} for start in range(NUM_PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    flags = {"model": folder / "model", "tokenizer": folder / "tokenizer", "prompts": folder / "prompts.jsonl"}
    flags |= {"out": folder / "own.jsonl", "num-samples": 2, "max-new-tokens": 12, "engine": "transformers"}
    argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    assert rollout([*argv, "--drift-set"]) == 0
    moved = AutoModelForCausalLM.from_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.08 * parameter.std() * torch.randn(parameter.shape, generator=generator))
        moved.lm_head.weight.mul_(0.8)  # flatter, so that the two directions of the divergence differ
    moved.save_pretrained(folder / "moved")
    (folder / "moved" / "config.json").write_text((folder / "model" / "config.json").read_text())
    return folder


def rows_of(inputs: Path) -> list[dict]:
    return [json.loads(line) for line in (inputs / "own.jsonl").read_text().splitlines()]


@torch.no_grad()
def next_log_probs(model: torch.nn.Module, row: dict) -> torch.Tensor:
    """Over the whole vocabulary, at each token of the answer: `[tokens, vocabulary]`."""
    ids = torch.tensor([[*row["prompt_tokens"], *row["tokens"]]])
    return model(ids).logits[0, len(row["prompt_tokens"]) - 1 : -1].double().log_softmax(-1)


def of_answer(log_probs: torch.Tensor, row: dict) -> float:
    return float(log_probs.gather(1, torch.tensor(row["tokens"])[:, None]).sum())


@pytest.fixture(scope="module")
def plain(inputs) -> dict[str, list[float]]:
    """For each answer, by transformers: its log-probability under both models, and both divergences between them, over
    the whole vocabulary and summed over its tokens."""
    first, moved = (AutoModelForCausalLM.from_pretrained(inputs / name).eval() for name in ("model", "moved"))
    found: dict[str, list[float]] = {"first": [], "moved": [], "kl": [], "reverse": []}
    for row in rows_of(inputs):
        before, after = next_log_probs(first, row), next_log_probs(moved, row)
        found["first"].append(of_answer(before, row))
        found["moved"].append(of_answer(after, row))
        found["kl"].append(float((before.exp() * (before - after)).sum()))
        found["reverse"].append(float((after.exp() * (after - before)).sum()))
    return found


def test_every_answer_is_written_with_the_log_probabilities_that_it_was_drawn_by(inputs, plain):
    rows = rows_of(inputs)
    assert [row["group"] for row in rows] == [prompt for prompt in range(NUM_PROMPTS) for _ in range(2)]
    assert {len(row["tokens"]) == 12 for row in rows} == {True, False}, "cut ones are there, and ended ones"
    assert all(len(row["log_probs"]) == len(row["tokens"]) for row in rows)
    assert [math.fsum(row["log_probs"]) for row in rows] == pytest.approx(plain["first"], abs=1e-4)


def test_drift_is_the_divergence_over_the_whole_vocabulary(inputs, plain):
    tokens = np.array([len(row["tokens"]) for row in rows_of(inputs)])
    drift = estimate_drift(np.array(plain["first"]) - np.array(plain["moved"]), tokens)
    kl, reverse = (sum(plain[name]) / tokens.sum() for name in ("kl", "reverse"))
    assert 0 < 3 * drift.stderr < kl
    assert abs(drift.value - kl) < 2 * drift.stderr
    assert abs(kl - reverse) > 0.01 * kl, "which of both it is makes a difference"


def test_the_standard_error_is_that_of_draws():
    """Many sets of answers of uneven lengths: their drifts scatter as each says of itself."""
    generator = np.random.default_rng(0)
    drifts = []
    for _ in range(2000):
        tokens = generator.integers(1, 40, 50)
        drifts.append(estimate_drift(tokens * 0.1 + np.sqrt(tokens) * generator.normal(0, 0.3, 50), tokens))
    values = np.array([drift.value for drift in drifts])
    assert values.mean() == pytest.approx(0.1, abs=0.003)
    assert values.std() == pytest.approx(np.mean([drift.stderr for drift in drifts]), rel=0.08)


def _evaluate(layout: str, inputs: Path, model: str, folder: Path, *, before_training: bool = False):
    """The metrics of a drift set, by ranks of a pool."""
    from megatron_psft.data.drift_sets import read_drift_set
    from megatron_psft.data.loader import BatchLoader, Shard
    from megatron_psft.data.packing import plan_of
    from megatron_psft.train.evaluate import Evaluation

    answers = read_drift_set("own", [str(inputs / "own.jsonl")], sampled_from={}, vocab_size=211, seq_length=256)
    with ready(inputs / model, LAYOUTS[layout].parallel) as run:
        place = run.place
        loader = BatchLoader(
            answers.dataset,
            plan_of(answers.dataset.sequence_lengths, DataConfig(data=("unread",), seq_length=100)),
            global_batch_size=8,
            micro_batch_size=2,
            shard=Shard(
                data_rank=place.data_rank,
                data_size=place.data_size,
                context_rank=place.context_rank,
                context_size=place.context_size,
            ),
            shuffle_seed=None,
            one_row=True,
            wrap=False,
            pad_to_multiple_of=place.tensor_size,
            pad_token_id=0,
        )
        evaluation = Evaluation(
            valid={},
            drift={"own": (answers, loader)},
            eval_iters=1,
            pipeline=run.pipeline,
            parallel=place,
            folder=folder,
        )
        return evaluation.before_training() if before_training else evaluation()


@pytest.mark.parametrize("layout", ["one", "DP2", "PP2", "TP2-SP", slow("CP2")])
def test_any_layout_measures_what_one_process_does(pool, inputs, plain, tmp_path, layout):
    """In a folder where nothing was said before the first step, so that the file's log-probabilities count."""
    rows = rows_of(inputs)
    rise = np.array([math.fsum(row["log_probs"]) for row in rows]) - np.array(plain["moved"])
    wanted = estimate_drift(rise, np.array([len(row["tokens"]) for row in rows]))
    results = pool.run(_evaluate, LAYOUTS[layout].world_size, layout, inputs, "moved", tmp_path)
    assert results[0] == pytest.approx({"drift/own": wanted.value, "drift_stderr/own": wanted.stderr}, rel=1e-5)
    assert results[1:] == results[:1] * (len(results) - 1)


def test_the_drift_of_the_untouched_model_is_zero(pool, inputs, tmp_path):
    (values,) = pool.run(_evaluate, 1, "one", inputs, "model", tmp_path)
    assert abs(values["drift/own"]) < 1e-5, "also by the sampler's numbers alone, up to rounding"
    for function in (_before, _evaluate):  # the second finds what the first has left in the folder
        results = pool.run(function, 2, "DP2", inputs, "model", tmp_path)
        assert results == [{"drift/own": 0.0, "drift_stderr/own": 0.0}] * 2
    assert (tmp_path / START_FILE).is_file()


def _before(*args):
    return _evaluate(*args, before_training=True)


def test_a_run_cannot_start_from_a_model_that_has_not_drawn_the_answers(pool, inputs, plain, tmp_path):
    """Where weights are a checkpoint's, no file tells."""
    rows = rows_of(inputs)
    gap = (sum(plain["first"]) - sum(plain["moved"])) / sum(len(row["tokens"]) for row in rows)
    assert gap > MAX_START_GAP
    with pytest.raises(WorkerError, match=rf"drift_data own must be answers of the model.*differ by {gap:.3g} nats"):
        pool.run(_before, 1, "one", inputs, "moved", tmp_path)
    assert not (tmp_path / START_FILE).exists()


def argv_of(inputs: Path, save: Path, *flags: object) -> list[str]:
    given = {"load-hf": inputs / "model", "tokenizer": inputs / "tokenizer", "data": inputs / "records.jsonl"}
    given |= {"save": save, "seq-length": 256, "train-iters": 5, "global-batch-size": 2, "lr": 1e-3}
    given |= {"eval-interval": 2, "drift-data": f"own={inputs / 'own.jsonl'}"}
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)] + [str(flag) for flag in flags]


@pytest.mark.slow
def test_a_run_ends_at_the_drift_and_says_so_again(pool, inputs, tmp_path):
    save = tmp_path / "run"
    argv = argv_of(inputs, save, "--stop-at-drift", 1e-4, "--export-hf", save / "hf")
    (first,) = pool.run(run_cli, 1, argv)
    assert first.code == 0, first.err
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("drift/own") for line in lines][:2] == [0, None]
    assert [line["step"] for line in lines] == [0, 1, 2]
    reached = f"drift/own ({lines[2]['drift/own']:.4g}) has reached stop_at_drift (0.0001)"
    assert f"ended after step 2 of 5: {reached}" in first.err
    assert step_folders(save) == [step_folder(save, 2)]
    assert (save / "hf" / "config.json").is_file()
    (second,) = pool.run(run_cli, 1, argv)
    assert second.code == 0
    assert f"nothing to do: {reached} at step 2 of 5" in second.err
    assert step_folders(save) == [step_folder(save, 2)]
    (third,) = pool.run(run_cli, 1, [*argv, "--stop-at-drift", "1e3"])
    assert third.code == 0, third.err
    assert step_folders(save)[-1] == step_folder(save, 5)
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "drift/own" in line] == [0, 2, 4]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load-hf", "{}/moved"], "own.jsonl:1 was sampled from another model than the run's"),
        (["--drift-data", "x={}/records.jsonl"], "records.jsonl:1 has no prompt_tokens; `psft rollout --drift-set`"),
    ],
)
def test_a_set_of_another_model_and_one_without_log_probabilities_are_refused(pool, inputs, tmp_path, flags, message):
    argv = argv_of(inputs, tmp_path / "run", *(flag.format(inputs) for flag in flags))
    (exit,) = pool.run(run_cli, 1, argv)
    assert exit.code == 2
    (line,) = [line for line in exit.err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: drift_data must hold the initial model's own answers: ")
    assert message in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
