"""The command that shows data, through its command line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_psft.cli.data import main, records_of
from megatron_psft.config.schema import ObjectiveConfig
from megatron_psft.data.micro_batch import MicroBatch
from tests.support import tiny
from tests.support.cli import REPOSITORY, Exit
from tests.support.recipes import SHAPES

RECORD = '{"prompt": "add one", "completion": "two"}\n'
SHOWN = "<|im_start|>user\nadd one<|im_end|>\n<|im_start|>assistant\n⟦two<|im_end|>⟧\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny.build_tokenizer(folder / "tokenizer")
    (folder / "a.jsonl").write_text(RECORD * 3)
    return folder


@pytest.fixture
def show(inputs, capsys):
    def run(*flags: str) -> Exit:
        data = [] if "--data" in flags else ["--data", str(inputs / "a.jsonl")]
        code = main(["--tokenizer", str(inputs / "tokenizer"), *data, *flags])
        return Exit(code, *capsys.readouterr())

    return run


@pytest.mark.slow
def test_the_command_prints_statistics_and_marked_records(inputs):
    command = [sys.executable, "-m", "megatron_psft", "data", "--tokenizer", str(inputs / "tokenizer")]
    done = subprocess.run(
        [*command, "--data", str(inputs / "a.jsonl"), "--no-packing", "--rows", "2", "--global-batch-size", "3"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count(SHOWN) == 2
    assert done.stdout.splitlines()[1].split()[:3] == [str(inputs / "a.jsonl"), "1", "3"]
    assert "── step 1, row 2: 1 record, " in done.stdout
    assert "\x1b[" not in done.stdout  # a pipe is no terminal


def test_passes_over_the_records_are_said_as_far_as_the_flags_tell(show):
    small = ("--no-packing", "--global-batch-size", "2")
    assert "passes over" not in show(*small).out
    assert "2 steps of 2 records make 1.333 passes over the 3 records of an epoch" in show(*small, "--epochs", "1").out
    assert "the last global batch begins another pass: 1 record more" in show(*small, "--epochs", "1").out
    assert "an epoch is less than a global batch, 1 of 64 packs" in show().out


def test_colour_comes_when_asked_for(show):
    exit = show("--color", "always")
    assert "assistant\n\x1b[32mtwo<|im_end|>\x1b[0m\n" in exit.out
    assert "⟦" not in exit.out
    assert SHOWN in show("--color", "never").out


def test_tokens_are_listed_with_position_id_and_label(show, inputs):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inputs / "tokenizer")
    lines = show("--tokens", "--rows", "1", "--no-packing").out.splitlines()
    header = lines.index("position       id  label  text")
    listed = [line.split(maxsplit=3) for line in lines[header + 1 :]]
    text = SHOWN.replace("⟦", "").replace("⟧", "")
    assert [int(token) for _, token, _, _ in listed] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [int(position) for position, *_ in listed] == list(range(len(listed)))
    labels = [token for _, token, is_label, _ in listed if is_label == "1"]
    assert tokenizer.decode([int(token) for token in labels]) == "two<|im_end|>"


def test_records_of_a_pack_are_told_by_their_lengths():
    """Two records of 3 and 2 tokens, whose last tokens are labels only, and padding."""
    row = MicroBatch(
        tokens=torch.tensor([[1, 2, 4, 0]]),
        labels=torch.tensor([[2, 3, 5, 0]]),
        label_mask=torch.tensor([[False, True, True, False]]),
        position_ids=torch.tensor([[0, 1, 0, 0]]),
        record_ids=torch.tensor([[0, 0, 1, 0]]),
        label_counts=torch.tensor([1, 1]),
        num_tokens=3,
        segments=(2, 1, 1),
    )
    first, second = records_of(row, [2, 1])
    assert (first.tokens.tolist(), first.label_mask.tolist()) == ([1, 2, 3], [False, False, True])
    assert (second.tokens.tolist(), second.label_mask.tolist()) == ([4, 5], [False, True])
    assert first.tokens.dtype == np.int32


def test_advantages_other_than_1_are_shown(show, inputs):
    rows = [json.loads(RECORD) | {"advantage": advantage} for advantage in (0.5, 1, -2)]
    (inputs / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exit = show("--data", str(inputs / "b.jsonl"), "--no-shuffle", "--rows", "1")
    headers = [line for line in exit.out.splitlines() if line.startswith("── record")]
    assert [line.partition("labels")[2] for line in headers] == [", advantage 0.5", "", ", advantage -2"]
    assert "advantage" not in show().out


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_both_sequences_of_a_pair_are_shown(show, inputs, monkeypatch, packing):
    monkeypatch.setattr(ObjectiveConfig, "needs_pairs", property(lambda _: True))
    rows = [{"prompt": "add one", "chosen": "two", "rejected": word} for word in ("three", "x")]
    (inputs / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exit = show(
        "--data", str(inputs / "pairs.jsonl"), "--no-shuffle", "--rows", "2", "--global-batch-size", "2", packing
    )
    assert exit.code == 0, exit.err
    headers = [line.split()[1] for line in exit.out.splitlines() if line.startswith(("── chosen", "── rejected"))]
    assert headers[:4] == ["chosen", "rejected"] * 2
    assert exit.out.count(SHOWN) >= 2
    assert all(SHOWN.replace("two", word) in exit.out for word in ("three", "x"))


def test_a_pack_is_shown_record_by_record(show):
    exit = show("--rows", "1")
    assert "── step 1, row 1: 3 records, " in exit.out
    assert exit.out.count(SHOWN) == 3


def test_a_step_of_records_is_shown_as_it_is_packed(show):
    exit = show("--global-batch-unit", "records", "--global-batch-size", "2", "--step", "2", "--epochs", "2")
    assert "packing: the 2 records of a step among themselves, " in exit.out
    assert "3 steps of 2 records make 2 passes over the 3 records of an epoch" in exit.out
    assert "── step 2, row 1: 2 records, " in exit.out
    assert exit.out.count(SHOWN) == 2


def test_records_beyond_the_positions_of_the_model_are_named_as_by_a_run(show, tmp_path):
    config = SHAPES["Qwen/Qwen2.5-7B-Instruct"] | {"max_position_embeddings": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "WARNING" not in show().out
    exit = show("--load-hf", str(tmp_path))
    assert "WARNING: data: beyond max_position_embeddings (3) of the model's config.json are 3 of 3 records" in exit.out
    assert SHOWN in exit.out


def test_a_training_command_and_its_config_are_taken(show, tmp_path):
    (tmp_path / "config.yaml").write_text("lr: 1e-5\nsave: runs/first\nload_hf: model\nshuffle: false\n")
    exit = show("--config", str(tmp_path / "config.yaml"), "--bf16", "--step", "2")
    assert exit.code == 0, exit.err
    assert "── step 2, row 4" in exit.out


def test_help_has_examples_and_needs_no_torch():
    command = [sys.executable, "-X", "importtime", "-m", "megatron_psft", "data", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "    psft data --config runs/first/config.yaml\n" in done.stdout
    assert "--prompt-key" in done.stdout
    assert " torch\n" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "0"], "rows (0) must be at least 1"),
        (["--colour", "never"], "unknown argument --colour; did you mean --color?"),
        (["--tokenizer", "./none"], "tokenizer (./none) must be an existing folder"),
        (["--data", "none.jsonl"], "data (none.jsonl) does not exist"),
        (["--seq-length", "3"], "data must hold no record of more than seq_length (3)"),
        (["--global-batch-unit", "records"], "global_batch_size (64) must be at most the 3 records of data"),
    ],
)
def test_mistakes_are_one_line_and_code_2(show, flags, message):
    exit = show(*flags)
    assert exit.code == 2
    (line,) = [line for line in exit.err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_tokenizer_has_to_be_named(inputs, capsys):
    assert main(["--data", str(inputs / "a.jsonl")]) == 2
    assert "missing --tokenizer or --load-hf" in capsys.readouterr().err
    assert main(["--data", str(inputs / "a.jsonl"), "--load-hf", "./none"]) == 2
    assert "error: load_hf (./none) must be an existing folder" in capsys.readouterr().err


def test_the_cache_is_listed_and_pruned(show, inputs, tmp_path, capsys):
    cache = ["--data-cache-dir", str(tmp_path / "cache")]
    path = tmp_path / "c.jsonl"
    path.write_text(RECORD * 3)
    assert show("--data", str(path), *cache).code == 0
    assert main(["--cache", "list", *cache]) == 0
    line, total = capsys.readouterr().out.splitlines()
    assert line.endswith(f"    0 days  {path}")
    assert total.startswith(f"1 folder in {tmp_path / 'cache'}, 0.00 GiB")
    path.unlink()
    assert main(["--cache", "prune", *cache]) == 0
    removed, total = capsys.readouterr().out.splitlines()
    assert removed.startswith("removed ")
    assert removed.endswith(f"{path} (gone)")
    assert total.startswith("removed 1 of 1 folder in ")
    assert main(["--cache", "prune", *cache]) == 0
    assert capsys.readouterr().out.startswith("removed 0 of 0 folders in ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "missing --data; give it as a flag or in the --config file"),
        (["--cache", "empty"], "cache ('empty') must be one of list, prune"),
        (["--older-than-days", "3"], "older_than_days (3) has no effect without --cache prune; remove it"),
        (["--cache", "prune", "--older-than-days", "-1"], "older_than_days (-1) must be at least 0"),
    ],
)
def test_mistakes_about_the_cache_are_one_line_and_code_2(capsys, flags, message):
    assert main(flags) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
