"""The reference's log-probabilities are those of the model at the start, whatever the layout, and whatever happens."""

import errno
import json
import os
import pickle
import shutil
import signal
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from megatron_psft import sealed
from megatron_psft.checkpoint.folders import step_folders
from megatron_psft.scoring.reference import PROGRESS
from megatron_psft.scoring.values import VALUES, RecordValues
from tests.support import oracle, tiny
from tests.support.cli import Exit, run_cli
from tests.support.layouts import LAYOUTS
from tests.support.marks import slow
from tests.support.pool import WorkerError
from tests.support.reducers import Reducer
from tests.support.runs import CP2, DIST_OPT, TP2_SP

PACKED, SEPARATE = ("--packing",), ("--no-packing",)
PACKING = {"one": SEPARATE, "TP2-SP": SEPARATE, "PP2": PACKED, "CP2": PACKED, "DP2-overlap": PACKED}


@dataclass(frozen=True)
class Inputs:
    """What all runs of this module share."""

    model: Path
    data: Path
    tokenizer: Path
    expected: list[np.ndarray]
    """For each token of each record but the last: its successor's log-probability, zero where it is no label."""

    def argv(self, save: Path, *flags: str, objective: str = "sft-kl") -> list[str]:
        """Two steps; ten records, in an order that is not the file's, are less than three batches."""
        shared = f"""
            --load-hf {self.model} --tokenizer {self.tokenizer} --data {self.data} --save {save} --seq-length 256
            --train-iters 2 --global-batch-size 4 --lr 1e-3 --objective {objective}
        """
        return [*shared.split(), *flags]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    root = tmp_path_factory.mktemp("inputs")
    model = tiny.build_model(root / "model", "qwen3", tied=True)
    tokenizer = tiny.build_tokenizer(root / "tokenizer")
    data = tiny.write_records(root / "records.jsonl", 10)
    return Inputs(model=model, data=data, tokenizer=tokenizer, expected=list(log_probs_of(model, tokenizer, data)))


@torch.no_grad()
def log_probs_of(model: Path, tokenizer: Path, data: Path):
    hf_model = oracle.load_model(model)
    records = [json.loads(line)["messages"] for line in data.read_text().splitlines()]
    for messages in records:
        ids, label_mask = oracle.chatml_example(messages, AutoTokenizer.from_pretrained(tokenizer))
        values = np.zeros(len(ids) - 1, np.float32)
        values[label_mask[1:]] = oracle.label_statistics(hf_model, ids, label_mask)[0].numpy()
        yield values


@dataclass(frozen=True)
class Observed:
    """What a run did: how it ended, batches that it scored before training, and how far the reference was from the
    model's own log-probabilities in its first step."""

    exit: Exit
    scored: int
    difference: float | None


def run_with_reference(argv: list[str], *, per_mark: int = 1, fail_at: int = 0, signum: int = 0) -> Observed:
    """The command line. In scoring pass `fail_at` (from 1) it raises, or gets the signal, on the last rank."""
    from megatron_psft.scoring import reference as module
    from megatron_psft.train.pipeline import Pipeline

    score, train, kept = Pipeline.score, Pipeline.train, module.BATCHES_PER_MARK
    calls: list[int] = []
    differences: list[float] = []

    def counted(pipeline, micro_batches, **options):
        calls.append(len(micro_batches))
        assert all(batch.ref_log_probs is None for batch in micro_batches)
        if len(calls) == fail_at:
            if not signum:
                raise RuntimeError("killed")
            if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
                os.kill(os.getpid(), signum)
        return score(pipeline, micro_batches, **options)

    def compared(pipeline, micro_batches, *args, **kwargs):
        if not differences:
            now = score(pipeline, micro_batches)
            pairs = zip(now, micro_batches, strict=True) if now else ()
            differences.append(max((float((a.log_probs - b.ref_log_probs).abs().max()) for a, b in pairs), default=0.0))
            assert all(batch.ref_log_probs.shape == batch.tokens.shape for batch in micro_batches)
            assert all(batch.ref_log_probs.dtype == torch.float32 for batch in micro_batches)
        return train(pipeline, micro_batches, *args, **kwargs)

    Pipeline.score, Pipeline.train, module.BATCHES_PER_MARK = counted, compared, per_mark
    try:
        exit = run_cli(argv)
    finally:
        Pipeline.score, Pipeline.train, module.BATCHES_PER_MARK = score, train, kept
    return Observed(exit, len(calls), max(differences, default=None))


def _killed(argv: list[str], per_mark: int, fail_at: int) -> Exit:
    return run_with_reference(argv, per_mark=per_mark, fail_at=fail_at).exit


def _signalled(argv: list[str], signum: int) -> Observed:
    return run_with_reference(argv, per_mark=100, fail_at=2, signum=signum)


def train(pool, world_size: int, argv: list[str]) -> Observed:
    """Runs to the end; what rank 0 did, and the largest difference of any rank."""
    observed = pool.run(run_with_reference, world_size, argv)
    assert [one.exit.code for one in observed] == [0] * world_size, observed[0].exit.err
    assert all(one.difference is not None for one in observed)
    return Observed(observed[0].exit, observed[0].scored, max(one.difference for one in observed))


def refuse(pool, argv: list[str]) -> str:
    (observed,) = pool.run(run_with_reference, 1, argv)
    assert observed.exit.code == 2, observed.exit.err
    (line,) = [line for line in observed.exit.err.splitlines() if line.startswith("error: ")]
    return line


def values_of(save: Path) -> bytes:
    return (save / "ref_log_probs" / VALUES).read_bytes()


def forget_steps(save: Path) -> None:
    for folder in step_folders(save):
        shutil.rmtree(folder)


@torch.no_grad()
def top_of(inputs: Inputs, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities of the most probable tokens at each label of the set, `[labels, top_k]`."""
    hf_model, tokenizer = oracle.load_model(inputs.model), AutoTokenizer.from_pretrained(inputs.tokenizer)
    records = [json.loads(line)["messages"] for line in inputs.data.read_text().splitlines()]
    examples = [oracle.chatml_example(messages, tokenizer) for messages in records]
    top = torch.cat([oracle.label_distributions(hf_model, *example)[0] for example in examples]).topk(top_k, dim=1)
    return top.indices.numpy(), top.values.numpy()


@pytest.mark.parametrize(
    ("layout", "top_k"), [slow("one", 0), slow("TP2-SP", 3), ("PP2", 3), slow("CP2", 3), slow("DP2-overlap", 0)]
)
def test_every_record_has_the_log_probabilities_that_transformers_gives(pool, tmp_path, inputs, layout, top_k):
    """In the file in the order of the records; in a shuffled training batch of the layout at each label."""
    world_size, flags = LAYOUTS[layout].world_size, (*LAYOUTS[layout].flags, *PACKING[layout])
    flags += ("--kl-top-k", str(top_k))
    done = train(pool, world_size, inputs.argv(tmp_path / "run", *flags))
    found = np.frombuffer(values_of(tmp_path / "run"), "<f4")
    expected = np.concatenate(inputs.expected)
    if top_k:
        found, rest, ids, log_probs = np.split(found.reshape(-1, 2 + 2 * top_k), [1, 2, 2 + top_k], axis=1)
        found, is_label = found[:, 0], expected != 0
        wanted_ids, wanted = top_of(inputs, top_k)
        np.testing.assert_allclose(log_probs[is_label], wanted, atol=1e-4)
        assert (ids[is_label] == wanted_ids).mean() > 0.99  # two tokens may be as probable as each other
        mass = np.exp(wanted).sum(axis=1) + np.exp(rest[is_label][:, 0])
        np.testing.assert_allclose(mass, 1, atol=1e-5)
        first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
        assert first["loss"] == pytest.approx(first["nll"], rel=1e-6), "the initial model is 0 from itself"
    assert found.shape == expected.shape
    assert ((found == 0) == (expected == 0)).all()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert done.difference < 1e-5
    assert done.scored >= 1


@pytest.mark.parametrize(
    "layout",
    ["CP2", slow("one"), slow("DP2-overlap")],
)
def test_the_sequences_of_a_pair_have_the_log_probabilities_that_they_have_alone(pool, tmp_path, inputs, layout):
    """A pair's chosen sequence, then its rejected one."""
    answers = [json.loads(line)["messages"][-1] for line in inputs.data.read_text().splitlines()]
    ask = [{"role": "user", "content": "three plus four"}]
    pairs = [(chosen, rejected) for chosen, rejected in pairwise(answers) if chosen != rejected]
    rows = [{"prompt": ask, "chosen": [chosen], "rejected": [rejected]} for chosen, rejected in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sides = [{"messages": [*ask, answer]} for pair in pairs for answer in pair]
    (tmp_path / "sides.jsonl").write_text("".join(json.dumps(side) + "\n" for side in sides))
    world_size, flags = LAYOUTS[layout].world_size, (*LAYOUTS[layout].flags, *PACKING[layout])
    argv = replace(inputs, data=tmp_path / "pairs.jsonl").argv(tmp_path / "run", *flags, objective="dpo")
    assert train(pool, world_size, argv).difference < 1e-5
    expected = np.concatenate(list(log_probs_of(inputs.model, inputs.tokenizer, tmp_path / "sides.jsonl")))
    found = np.frombuffer(values_of(tmp_path / "run"), "<f4")
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_more_tokens_than_the_vocabulary_has_are_refused(pool, tmp_path, inputs):
    line = refuse(pool, inputs.argv(tmp_path / "run", "--kl-top-k", str(tiny.VOCAB_SIZE + 1)))
    assert f"kl_top_k ({tiny.VOCAB_SIZE + 1}) must not exceed the {tiny.VOCAB_SIZE} tokens of the" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_one_layout_wrote_another_reads(pool, tmp_path, inputs):
    run = tmp_path / "run"
    train(pool, 1, inputs.argv(run, *PACKED))
    written = values_of(run)
    forget_steps(run)
    for world_size, layout in ((2, CP2), (2, TP2_SP), (2, DIST_OPT)):
        flags = (*layout, *PACKED, "--no-use-distributed-optimizer")
        found = train(pool, world_size, inputs.argv(run, *flags))
        assert (found.scored, values_of(run)) == (0, written)
        assert found.difference < 1e-4
        forget_steps(run)


@pytest.mark.parametrize(("per_mark", "left"), [(2, 1), slow(1, 1), slow(3, 3)])
@pytest.mark.slow
def test_a_pass_that_is_killed_goes_on_to_the_same_bits(pool, tmp_path, inputs, per_mark, left):
    """Killed in the third of three batches: what was marked counts."""
    flags = (*DIST_OPT, *SEPARATE)
    if per_mark == 1:
        whole = train(pool, 2, inputs.argv(tmp_path / "whole", *flags))
        assert whole.scored == 3
    argv = inputs.argv(tmp_path / "run", *flags)
    exits = pool.run(_killed, 2, argv, per_mark, 3)
    assert [exit.code for exit in exits] == [1, 1]
    assert "RuntimeError: killed" in exits[0].err + exits[1].err
    partial = tmp_path / "run" / "ref_log_probs.partial"
    assert json.loads((partial / PROGRESS).read_text())["batches"] == 3 - left
    # What was written and not marked is nobody's, and may be anything.
    done = np.concatenate(inputs.expected[: 4 * (3 - left)] or [np.empty(0, np.float32)])
    with (partial / VALUES).open("r+b") as file:
        file.seek(done.nbytes)
        file.write(b"\x7f" * (np.concatenate(inputs.expected).nbytes - done.nbytes))
    assert train(pool, 2, argv).scored == left
    found = np.frombuffer(values_of(tmp_path / "run"), "<f4")
    np.testing.assert_allclose(found, np.concatenate(inputs.expected), atol=1e-4)
    if per_mark == 1:
        assert values_of(tmp_path / "run") == values_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_ends_the_pass_in_good_order(pool, tmp_path, inputs):
    argv = inputs.argv(tmp_path / "run", *DIST_OPT, *SEPARATE)
    observed = pool.run(_signalled, 2, argv, signal.SIGTERM)
    assert [one.exit.code for one in observed] == [128 + signal.SIGTERM] * 2, observed[0].exit.err
    assert not step_folders(tmp_path / "run")
    found = train(pool, 2, argv)
    assert found.scored == 1
    assert "reference: 2 of 3 batches done" in found.exit.err
    np.testing.assert_allclose(
        np.frombuffer(values_of(tmp_path / "run"), "<f4"), np.concatenate(inputs.expected), atol=1e-4
    )


def _run_with_a_full_disk(argv: list[str]) -> Observed:
    """The last rank cannot write the second batch."""
    from megatron_psft.scoring.reference import ReferencePass

    write = ReferencePass._write

    def fail(self, batch, rows, file):
        if batch == 1 and int(os.environ["RANK"]) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, batch, rows, file)

    ReferencePass._write = fail
    try:
        return run_with_reference(argv)
    finally:
        ReferencePass._write = write


@pytest.mark.slow
def test_a_disk_that_fails_one_rank_ends_the_run_on_all(pool, tmp_path, inputs):
    argv = inputs.argv(tmp_path / "run", *DIST_OPT, *SEPARATE)
    observed = pool.run(_run_with_a_full_disk, 2, argv)
    assert [one.exit.code for one in observed] == [4, 4]
    assert "error: save: " in observed[0].exit.err
    assert "No space left on device" in observed[0].exit.err
    assert train(pool, 2, argv).scored == 2


@pytest.fixture(scope="module")
def finished(pool, inputs, tmp_path_factory) -> Path:
    """A run with checkpoints of both steps."""
    save = tmp_path_factory.mktemp("finished") / "run"
    train(pool, 1, inputs.argv(save, *SEPARATE, "--save-interval", "1"))
    return save


def resumable(finished: Path, copy: Path) -> Path:
    """A copy of the run that was killed after its first step."""
    shutil.copytree(finished, copy)
    shutil.rmtree(step_folders(copy)[-1])
    return copy


def test_a_resumed_run_reads_what_the_weights_at_its_start_have_said(pool, tmp_path, inputs, finished):
    run = resumable(finished, tmp_path / "run")
    found = train(pool, 1, inputs.argv(run, *SEPARATE))
    assert (found.scored, values_of(run)) == (0, values_of(finished))
    assert found.difference > 1e-3, "the weights of step 1 are not those of the start"


@pytest.mark.parametrize("harm", [slow("truncated"), "flipped", slow("gone"), slow("no folder"), slow("of other data")])
def test_a_damaged_file_is_an_error_that_names_it(pool, tmp_path, inputs, finished, harm):
    run = resumable(finished, tmp_path / "run")
    folder = run / "ref_log_probs"
    data = bytearray(values_of(run))
    data[100] ^= 1
    if harm == "truncated":
        (folder / VALUES).write_bytes(data[:-4])
        expected = f"{folder / VALUES} has {len(data) - 4} bytes, {len(data)} were written"
    elif harm == "flipped":
        (folder / VALUES).write_bytes(data)
        expected = f"{folder / VALUES} is not as it was written"
    elif harm == "gone":
        (folder / VALUES).unlink()
        expected = f"{folder / VALUES} is missing"
    elif harm == "no folder":
        shutil.rmtree(folder)
        expected = f"there is no {folder}"
    else:
        shutil.rmtree(folder)
        other = tiny.write_records(tmp_path / "other.jsonl", 10, seed=1)
        train(pool, 1, replace(inputs, data=other).argv(tmp_path / "other", *SEPARATE))
        shutil.copytree(tmp_path / "other" / "ref_log_probs", folder)
        expected = f"{folder} is of a run with training data ("
    line = refuse(pool, inputs.argv(run, *SEPARATE))
    assert expected in line
    assert f"put a copy of {folder} back, or start anew in another save folder" in line
    forget_steps(run)  # then the weights at the start are at hand
    assert train(pool, 1, inputs.argv(run, *SEPARATE)).scored == 3
    assert values_of(run) == values_of(finished)


def test_weights_that_give_no_numbers_are_refused(pool, tmp_path, inputs):
    model = shutil.copytree(inputs.model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    line = refuse(pool, [*inputs.argv(tmp_path / "run", *SEPARATE), "--load-hf", str(model)])
    assert "load_hf: the model at the start gives log-probabilities that are no numbers, for batch 0" in line


@pytest.mark.slow
def test_other_weights_at_the_start_are_another_reference(pool, tmp_path, inputs):
    run = tmp_path / "run"
    train(pool, 1, inputs.argv(run, *SEPARATE))
    before = values_of(run)
    forget_steps(run)
    found = train(pool, 1, [*inputs.argv(run, *SEPARATE), "--random-init"])
    assert found.scored == 3
    assert found.difference < 1e-5
    assert values_of(run) != before


@pytest.mark.slow
def test_the_reference_of_a_run_that_starts_from_a_checkpoint_is_its_model(pool, tmp_path, inputs, finished):
    source = resumable(finished, tmp_path / "source")
    argv = inputs.argv(tmp_path / "run", *SEPARATE, "--load", str(source))
    with pytest.raises(WorkerError, match="killed"):
        pool.run(_killed, 1, argv, 1, 3)
    found = train(pool, 1, argv)
    assert found.scored == 1
    assert found.difference < 1e-5
    assert values_of(tmp_path / "run") != values_of(finished)


def test_nothing_in_a_file_of_the_reference_is_run(tmp_path):
    """Its values are read as floats and all else as JSON, also where the folder's marker vouches for them."""
    marker, folder = tmp_path / "marker", tmp_path / "reference"
    planted = pickle.dumps(Reducer(marker))
    planted += b"\0" * (-len(planted) % 4)
    staging = sealed.begin(folder)
    (staging / VALUES).write_bytes(planted)
    sealed.seal(folder, {"a": 1})
    assert sealed.first_damage(folder, part=0, parts=1) is None
    values = RecordValues(folder / VALUES, np.array([len(planted) // 4]))
    values.open()
    assert values(0).tobytes() == planted
    (folder / sealed.MARKER).write_bytes(planted)
    with pytest.raises(sealed.DamageError):
        sealed.read_content(folder)
    assert not marker.exists()
