"""From PSFT over the exported folder to a step of TRL's trainers, and what a mistake costs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.cli import REPOSITORY, run_cli

sys.path.insert(0, str(REPOSITORY / "examples" / "rl_cold_start"))

from examples.rl_cold_start import convert_prompts, dpo, grpo

QUESTIONS = ["add one", "how many lemon", "x + y ="]
REPLIES = ["3", "17", "zero is 3", "when 42"]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def exported(pool, tmp_path_factory) -> Path:
    """A model that knows several replies, fine-tuned with PSFT for a few steps, as --export-hf leaves it."""
    folder = tmp_path_factory.mktemp("psft")
    tokenizer = tiny.build_tokenizer(folder / "tokenizer")
    model = tiny.build_model(folder / "model", "qwen2", num_hidden_layers=2)
    pairs = [(question, reply) for question in QUESTIONS for reply in REPLIES]
    tiny.teach(model, tokenizer, pairs)
    data = write_lines(folder / "data.jsonl", [{"prompt": question, "completion": reply} for question, reply in pairs])
    argv = ["--load-hf", model, "--tokenizer", tokenizer, "--data", data, "--save", folder / "run"]
    argv += ["--export-hf", folder / "hf", "--train-iters", "4", "--global-batch-size", "4", "--no-packing"]
    (exit,) = pool.run(run_cli, 1, [str(value) for value in [*argv, "--old-policy-interval", "2", "--lr", "1e-4"]])
    assert exit.code == 0, exit.err
    return folder / "hf"


def run_script(name: str, *flags: str | Path) -> None:
    command = [sys.executable, f"examples/rl_cold_start/{name}", *map(str, flags)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


def read_log(folder: Path) -> list[dict]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line for line in history if "loss" in line]


@pytest.mark.slow
def test_grpo_goes_on_from_psft_and_finds_the_right_answers(exported, tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": question, "answer": 3} for question in QUESTIONS])
    flags = ["--model", exported, "--prompts", prompts, "--out", tmp_path / "grpo", "--train-iters", "8"]
    flags += ["--global-batch-size", "24", "--micro-batch-size", "24", "--max-new-tokens", "8", "--lr", "1e-3"]
    run_script("grpo.py", *flags)
    rewards = [line["reward"] for line in read_log(tmp_path / "grpo")]
    assert len(rewards) == 8
    assert rewards[0] < 0.8  # two of the four replies are right
    assert sum(rewards[-3:]) / 3 > 0.9
    assert_trained(exported, tmp_path / "grpo")


@pytest.mark.slow
def test_dpo_goes_on_from_psft_and_prefers_what_was_chosen(exported, tmp_path):
    rows = [{"prompt": question, "chosen": "when 42", "rejected": "3"} for question in QUESTIONS]
    flags = ["--model", exported, "--pairs", write_lines(tmp_path / "pairs.jsonl", rows), "--out", tmp_path / "dpo"]
    flags += ["--train-iters", "4", "--global-batch-size", "3", "--micro-batch-size", "3", "--seq-length", "64"]
    run_script("dpo.py", *flags, "--lr", "1e-3")
    log = read_log(tmp_path / "dpo")
    assert log[0]["rewards/margins"] == 0  # the model is its own reference
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert log[-1]["rewards/margins"] > 0.1
    assert log[-1]["rewards/accuracies"] == 1
    assert_trained(exported, tmp_path / "dpo")


def assert_trained(before: Path, after: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    old, new = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (before, after))
    assert old.keys() == new.keys()
    assert any(not tensor.equal(new[name]) for name, tensor in old.items())
    assert AutoTokenizer.from_pretrained(after).chat_template == tiny.CHATML


def test_pairs_are_texts_or_messages(tmp_path):
    chosen, rejected = ({"role": "assistant", "content": text} for text in ("3", "17"))
    asked = {"role": "user", "content": "add"}
    rows = [
        {"prompt": "add", "chosen": "3", "rejected": "17"},
        {"prompt": [asked], "chosen": [chosen], "rejected": [rejected]},
    ]
    pair = {"prompt": [asked], "chosen": [chosen], "rejected": [rejected]}
    assert dpo.read_pairs([str(write_lines(tmp_path / "pairs.jsonl", rows))]) == [pair, pair]


def assert_refused(capsys, code: int, message: str) -> None:
    assert code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "add", "chosen": "3"}, ":1: no preference pair"),
        ({"prompt": "add", "chosen": "3", "rejected": ""}, ":1: empty content (rejected[0], assistant)"),
        ({"prompt": "add", "chosen": [{"role": "user", "content": "3"}], "rejected": "3"}, ":1: two different prompts"),
        (
            {
                "prompt": "add",
                "chosen": [{"role": "assistant", "content": "3"}, {"role": "user", "content": "?"}],
                "rejected": "4",
            },
            "pairs must differ in one assistant turn",
        ),
    ],
)
def test_a_bad_pair_is_named(tmp_path, capsys, row, message):
    path = write_lines(tmp_path / "pairs.jsonl", [row])
    code = dpo.main(["--model", "m", "--pairs", str(path), "--out", str(tmp_path / "out")])
    assert_refused(capsys, code, message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--global-batch-size", "12"],
            "global_batch_size (12) must be a multiple of micro_batch_size * number of proc",
        ),
        (["--num-samples", "7"], "global_batch_size (64) must be a multiple of num_samples (7)"),
        (["--num-samples", "1"], "num_samples (1) must be at least 2"),
        (["--lr", "0"], "lr (0.0) greater than 0"),
        (["--out", "/"], "out (/) must not exist"),
        (["--prompts", "none.jsonl"], "prompts (none.jsonl) does not exist"),
        (["--learning-rate", "1"], "unknown argument --learning-rate"),
    ],
)
def test_mistakes_are_one_line_and_code_2(tmp_path, capsys, flags, message):
    prompts = [] if "--prompts" in flags else ["--prompts", str(tmp_path)]
    code = grpo.main(["--model", "./none", *prompts, "--out", str(tmp_path / "out"), *flags])
    assert_refused(capsys, code, message)


def test_prompts_are_converted(tmp_path, capsys):
    import pyarrow.parquet as pq

    rows = [{"question": "add one", "answer": "1 + 1 = 2\n#### 2"}, {"question": "x", "answer": "\\frac{1}{2}"}]
    prompts = write_lines(tmp_path / "prompts.jsonl", rows)
    argv = ["--prompts", str(prompts), "--prompt-key", "question"]
    assert convert_prompts.main([*argv, "--framework", "nemo-rl", "--out", str(tmp_path / "p.jsonl")]) == 0
    written = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert written == [{"input": "add one", "output": "2"}, {"input": "x", "output": "\\frac{1}{2}"}]
    argv += ["--system-prompt", "sum"]
    assert convert_prompts.main([*argv, "--framework", "verl", "--out", str(tmp_path / "p.parquet")]) == 0
    first, _ = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert first == {
        "data_source": "lighteval/MATH",
        "prompt": [{"content": "sum", "role": "system"}, {"content": "add one", "role": "user"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"source": f"{prompts}:1"},
    }
    capsys.readouterr()
    code = convert_prompts.main([*argv, "--framework", "nemo-rl", "--out", str(tmp_path / "q.jsonl")])
    assert_refused(capsys, code, f"one user turn per prompt; {prompts}:1")
