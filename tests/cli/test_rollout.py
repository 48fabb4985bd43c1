"""The command that samples answers, through its command line; a model that was taught several replies answers."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest

from megatron_psft.cli.rollout import main
from tests.support import tiny
from tests.support.cli import REPOSITORY, Exit

QUESTIONS = ["add one", "how many lemon", "x + y ="]
REPLIES = ["3", "17", "zero is 3", "when 42"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = tiny.build_tokenizer(folder / "tokenizer")
    model = tiny.build_model(folder / "model", "qwen2", num_hidden_layers=2)
    tiny.teach(model, tokenizer, [(question, reply) for question in QUESTIONS for reply in REPLIES])
    write_lines(folder / "prompts.jsonl", [{"prompt": question, "answer": 3} for question in QUESTIONS])
    return folder


@pytest.fixture
def sample(inputs, tmp_path, capsys):
    """Runs the command; a flag replaces one given here. Returns how it ended, and the records it has written."""

    def run(*flags: str | Path) -> tuple[Exit, list[dict]]:
        argv = ["--model", inputs / "model", "--tokenizer", inputs / "tokenizer"]
        argv += [] if "--prompts" in flags else ["--prompts", inputs / "prompts.jsonl"]
        argv += ["--out", tmp_path / "new" / "out.jsonl", "--engine", "transformers", "--max-new-tokens", "16", *flags]
        code = main([str(value) for value in argv])
        out = tmp_path / "new" / "out.jsonl"
        return Exit(code, *capsys.readouterr()), read_lines(out) if out.exists() else []

    return run


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_records_carry_the_advantage_within_their_group(sample):
    exit, records = sample("--num-samples", "12", "--keep-flat-groups")
    assert exit.code == 0, exit.err
    assert "3 prompts, 36 answers: mean reward 0." in exit.out
    assert [record["group"] for record in records] == sorted(record["group"] for record in records)
    for group, question in enumerate(QUESTIONS):
        members = [record for record in records if record["group"] == group]
        assert [record["messages"][0] for record in members] == [{"role": "user", "content": question}] * 12
        rewards = [float(record["messages"][1]["content"] in ("3", "zero is 3")) for record in members]
        assert [record["reward"] for record in members] == rewards
        assert 0 < fmean(rewards) < 1
        expected = [(reward - fmean(rewards)) / (stdev(rewards) + 1e-6) for reward in rewards]
        assert [record["advantage"] for record in members] == pytest.approx(expected)
        assert {record["answer"] for record in members} == {"3"}


def test_verifier_and_advantage_are_chosen(sample, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "out.jsonl.partial").write_text("somebody else's")
    _, records = sample("--num-samples", "12", "--verifier", "exact", "--advantage", "drgrpo")
    rewards = [float(record["messages"][1]["content"] == "3") for record in records]
    assert [record["reward"] for record in records] == rewards
    first = [record for record in records if record["group"] == records[0]["group"]]
    mean = fmean(record["reward"] for record in first)
    assert [record["advantage"] for record in first] == pytest.approx([record["reward"] - mean for record in first])
    assert (tmp_path / "new" / "out.jsonl.partial").read_text() == "somebody else's"


def test_groups_without_spread_are_left_out_and_counted(sample, tmp_path):
    rows = [{"prompt": QUESTIONS[0], "answer": "3"}, {"prompt": QUESTIONS[1], "answer": "1/7"}]
    exit, records = sample("--prompts", write_lines(tmp_path / "p.jsonl", rows), "--num-samples", "12")
    assert {record["group"] for record in records} == {0}
    assert "groups of equal rewards: 1, of which 0 all right\n" in exit.out
    assert "left out: 12 answers in groups of equal rewards\n" in exit.out
    (tmp_path / "new" / "out.jsonl").unlink()
    _, records = sample("--prompts", tmp_path / "p.jsonl", "--num-samples", "12", "--keep-flat-groups")
    assert {record["advantage"] for record in records if record["group"] == 1} == {0.0}


def test_unfinished_answers_count_in_the_mean_and_are_left_out(sample, tmp_path):
    flags = ["--num-samples", "24", "--max-new-tokens", "2", "--keep-flat-groups"]
    exit, records = sample(*flags)
    finished = {record["messages"][1]["content"] for record in records}
    assert "3" in finished
    assert all(len(text) <= 2 for text in finished)  # a token, and the end
    left_out = 72 - len(records)
    assert f"left out: {left_out} answers unfinished\n" in exit.out
    (tmp_path / "new" / "out.jsonl").unlink()
    _, everything = sample(*flags, "--keep-unfinished")
    assert len(everything) == 72
    assert [record for record in everything if record in records] == records


def test_prompts_are_texts_or_messages_and_answers_may_lie_in_an_object(sample, tmp_path):
    question = {"role": "user", "content": QUESTIONS[0]}
    rows = [
        {"problem": QUESTIONS[0], "reward_model": {"ground_truth": 3}},
        {"problem": [question], "reward_model": {"ground_truth": "3"}},
        {
            "messages": [question, {"role": "assistant", "content": "17"}],
            "reward_model": {"ground_truth": "\\frac{6}{2}"},
        },
        {"messages": [{"role": "system", "content": "sum"}, question], "reward_model": {"ground_truth": "#### 3"}},
    ]
    flags = ["--prompt-key", "problem", "--answer-key", "reward_model.ground_truth", "--system-prompt", "add"]
    exit, records = sample("--prompts", write_lines(tmp_path / "p.jsonl", rows), *flags, "--keep-flat-groups")
    assert exit.code == 0, exit.err
    assert {record["group"] for record in records} == {0, 1, 2, 3}
    asked = [{"role": "system", "content": "add"}, question]
    assert all(record["messages"][:-1] == asked for record in records)


def test_records_are_what_training_takes(sample, inputs, tmp_path):
    """But for the advantage, which training reads or refuses by its own rules."""
    from transformers import AutoTokenizer

    from megatron_psft.data.chat import render_record
    from megatron_psft.data.records import read_records

    sample("--keep-flat-groups")
    written = read_lines(tmp_path / "new" / "out.jsonl")
    write_lines(tmp_path / "plain.jsonl", [{"messages": record["messages"]} for record in written])
    records, bad = read_records([str(tmp_path / "plain.jsonl")], field="data")
    assert (len(records), bad) == (24, [])
    tokenizer = AutoTokenizer.from_pretrained(inputs / "tokenizer")
    example = render_record(records[0], tokenizer, "assistant")
    expected = written[0]["messages"][1]["content"] + "<|im_end|>"
    assert tokenizer.decode(example.tokens[example.label_mask].tolist()) == expected


BAD_PROMPTS = {
    "no prompt": (
        {"question": "add one", "answer": "3"},
        "no prompt (wanted: a text or a list under prompt, or messages)",
    ),
    "no answer": ({"prompt": "add one", "Answer": "3"}, "no answer (wanted: a text or a number under answer)"),
    "no maths": ({"prompt": "add one", "answer": " "}, "' ' is no mathematical expression"),
    "role": ({"prompt": [{"role": "usr", "content": "x"}], "answer": "3"}, "unknown role"),
    "tools": ({"prompt": "add one", "answer": "3", "tools": [{"name": "f"}]}, "tools are not supported in prompts"),
}


@pytest.mark.parametrize("kind", BAD_PROMPTS)
def test_a_bad_prompt_is_named(sample, tmp_path, kind):
    row, message = BAD_PROMPTS[kind]
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "add one", "answer": "3"}, row])
    exit, _ = sample("--prompts", path)
    assert_refused(exit, "1 of 2 are not", f"{path}:2: ", message)


def assert_refused(exit: Exit, *parts: str) -> None:
    assert exit.code == 2
    (line,) = [line for line in exit.err.splitlines() if line.startswith("error: ")]
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-sample", "4"], "unknown argument --num-sample; did you mean --num-samples?"),
        (["--verifier", "code"], "verifier ('code') must be one of math, exact"),
        (["--prompts", "none.jsonl"], "prompts (none.jsonl) does not exist"),
        (["--model", "./none"], "model (./none) must be an existing folder"),
        (["--max-new-tokens", "4096"], "max_position_embeddings (512)"),
        (["--out", "/dev/null/out.jsonl"], "out (/dev/null/out.jsonl) must be a file that can be written"),
    ],
)
def test_mistakes_are_one_line_and_code_2(sample, flags, message):
    exit, records = sample(*flags)
    assert_refused(exit, message)
    assert records == []


@pytest.mark.parametrize("flags", [("--tokenizer", "sparse"), ("--max-new-tokens", "4096")])
def test_what_is_refused_leaves_nothing_behind(sample, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    tiny.build_sparse_tokenizer(tmp_path / "sparse", 10_000)
    exit, _ = sample(*flags)
    assert_refused(exit, "tokenizer (sparse) has ids up to 10000 (" if "sparse" in flags else "max_position_embeddings")
    assert [*tmp_path.glob("new/*"), *tmp_path.glob("new/.*")] == []


def test_an_existing_file_is_not_replaced(sample, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "out.jsonl").write_text('{"kept": true}\n')
    exit, records = sample()
    assert_refused(exit, "out.jsonl) must not exist")
    assert records == [{"kept": True}]


def test_nothing_to_train_on_is_an_error_and_leaves_no_file(sample, tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": QUESTIONS[0], "answer": "1/7"}])
    exit, _ = sample("--prompts", path)
    assert_refused(exit, "no answer is left to train on")
    assert "mean reward 0.0000" in exit.out
    assert list((tmp_path / "new").iterdir()) == []


def test_help_has_an_example_and_needs_no_torch():
    command = [sys.executable, "-X", "importtime", "-m", "megatron_psft", "rollout", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "    psft rollout --model runs/first/hf --prompts gsm8k/train.jsonl" in done.stdout
    assert "Longest answer, in tokens" in done.stdout
    assert " torch\n" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "0.7"], "temperature (0.7) must be 1 with drift_set"),
        (["--top-p", "0.9"], "top_p (0.9) must be 1 with drift_set"),
        (["--verifier", "exact"], "verifier (exact) has no effect with drift_set"),
        (["--keep-unfinished"], "keep_unfinished (True) has no effect with drift_set"),
        (["--answer-key", "a"], "answer_key (a) has no effect with drift_set"),
    ],
)
def test_a_drift_set_is_of_the_model_as_it_is(sample, flags, message):
    exit, records = sample("--drift-set", *flags)
    assert (exit.code, records) == (2, [])
    (line,) = exit.err.splitlines()
    assert line.startswith(f"error: {message}")
