"""Mixing by hand-made groups, the order of a loop's prompts, and the loop itself through its commands."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from examples.mixed import grpo, mix
from megatron_psft.cli.rollout import RolloutConfig, main
from megatron_psft.config.flags import parse_flags
from megatron_psft.config.schema import parse_config
from megatron_psft.data.records import read_records
from tests.support import tiny
from tests.support.cli import REPOSITORY

QUESTIONS = ["add one", "how many lemon", "x + y ="]
REPLIES = ["3", "17", "zero is 3", "when 42"]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def chat(question: str, reply: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


@pytest.fixture
def mixed(tmp_path, capsys):
    """Three prompts with a demonstration: two of three answers right, none, all; and one without rollouts."""
    names = ["some", "none", "all", "alone"]
    demonstrations = write_lines(
        tmp_path / "demonstrations.jsonl", [{"prompt": name, "completion": "shown"} for name in names]
    )
    rewards = {"some": [1.0, 0.0, 1.0], "none": [0.0, 0.0, 0.0], "all": [1.0, 1.0, 1.0]}
    advantages = {"some": [0.5, -1.0, 0.5], "none": [0.0] * 3, "all": [0.0] * 3}
    rows = [
        {"messages": chat(name, f"said {place}"), "reward": reward, "advantage": advantages[name][place]}
        for name in rewards
        for place, reward in enumerate(rewards[name])
    ]
    rollouts = write_lines(tmp_path / "rollouts.jsonl", rows)

    def run(*flags: str) -> tuple[int, list[tuple[str, str, float]], str]:
        out = tmp_path / "mixed.jsonl"
        given = {"--demonstrations": demonstrations, "--rollouts": rollouts}
        files = [word for name, path in given.items() if name not in flags for word in (name, str(path))]
        argv = [*files, "--out", str(out), *flags]
        code = mix.main(argv)
        records = read_lines(out) if out.exists() else []
        read = [(row["messages"][0]["content"], row["messages"][1]["content"], row["advantage"]) for row in records]
        return code, read, "".join(capsys.readouterr())

    return run


def test_all_keeps_everything_as_it_is(mixed):
    code, records, out = mixed("--method", "all")
    assert code == 0
    assert records[:4] == [(name, "shown", 1.0) for name in ("some", "none", "all", "alone")]
    assert [advantage for *_, advantage in records[4:]] == [0.5, -1.0, 0.5, *[0.0] * 6]
    assert "4 demonstrations, 3 of them with rollouts" in out
    assert ": 4 demonstrations, 9 rollouts" in out


def test_a_demonstration_that_is_written_again_is_the_same_record(tmp_path):
    turns = [*chat("a", "b"), {**chat("a", "c")[1], "weight": 0}, *chat("d", "e")]
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"prompt": turns[:4], "completion": "e", "tools": tools, "enable_thinking": False, "system": "Be brief."}
    row["advantage"] = 0.5
    (record,), _ = read_records([str(write_lines(tmp_path / "a.jsonl", [row]))], field="data")
    (again,), _ = read_records([str(write_lines(tmp_path / "a.jsonl", [mix.as_demonstration(record)]))], field="data")
    assert again == replace(record, prompt_length=0, unlearned={2, 3})


def test_luffy_compares_the_demonstration_with_the_answers(mixed):
    _, records, _ = mixed("--method", "luffy")
    # Rewards 1 0 1 and 1: mean 3/4, sample deviation 1/2. Rewards 0 0 0 and 1: mean 1/4, 1/2. Nothing of "all".
    assert [row[:2] for row in records] == [
        (name, reply) for name in ("some", "none") for reply in ("shown", "said 0", "said 1", "said 2")
    ]
    expected = [0.5, 0.5, -1.5, 0.5, 1.5, -0.5, -0.5, -0.5]
    assert [advantage for *_, advantage in records] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("rate", "shown"), [("0", ["none", "alone"]), ("0.7", ["some", "none", "alone"])])
def test_hpt_demonstrates_what_the_model_fails(mixed, rate, shown):
    _, records, _ = mixed("--method", "hpt", "--pass-rate", rate)
    assert [question for question, reply, _ in records if reply == "shown"] == shown
    said = [advantage for _, reply, advantage in records if reply != "shown"]
    assert said == ([] if "some" in shown else [0.5, -1.0, 0.5])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "luffy", "--pass-rate", "0.5"], "pass_rate (0.5) has no effect with method luffy"),
        (["--pass-rate", "1"], "pass_rate (1.0) must be at least 0 and below 1"),
        (["--system-prompt", "sum"], "needs rollouts on the prompts of the demonstrations, and none is"),
        (["--demonstrations", "none.jsonl"], "demonstrations (none.jsonl) does not exist"),
        (["--rollouts", "none.jsonl"], "rollouts (none.jsonl) does not exist"),
        (["--out", "/"], "out (/) must not exist"),
    ],
)
def test_mistakes_are_one_line_and_code_2(mixed, flags, message):
    code, records, printed = mixed(*flags)
    assert (code, records) == (2, [])
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert message in line


def test_rows_without_reward_are_no_rollouts(mixed, tmp_path):
    path = write_lines(tmp_path / "plain.jsonl", [{"messages": chat("some", "said")}])
    code, _, printed = mixed("--rollouts", str(path))
    assert code == 2
    assert f"{path}:1 has no reward" in printed


def test_every_prompt_is_asked_once_before_any_is_asked_again(tmp_path):
    loop = grpo.LoopConfig(rounds=5, prompts_per_round=4, out=str(tmp_path), seed=3)
    rows = [{"prompt": str(number), "answer": "1"} for number in range(10)]
    asked = []
    for number in range(1, 6):
        grpo.write_prompts(rows, number, loop, tmp_path / "prompts.jsonl")
        asked += [row["prompt"] for row in read_lines(tmp_path / "prompts.jsonl")]
    assert sorted(asked[:10]) == sorted(asked[10:]) == [str(number) for number in range(10)]
    assert asked[:10] != asked[10:]


def test_the_shipped_settings_are_flags_of_their_commands():
    folder = REPOSITORY / "examples" / "mixed"
    config = parse_config(["--config", str(folder / "train.yaml"), "--load-hf", "m", "--data", "d", "--save", "s"])
    assert config.objective.old_policy_interval == "fixed"
    argv = ["--config", str(folder / "rollout.yaml"), "--model", "m", "--prompts", "p", "--out", "none"]
    assert parse_flags(RolloutConfig, argv).sampling.num_samples == 8


@pytest.mark.slow
def test_two_rounds_of_grpo_raise_the_reward_and_are_not_done_again(tmp_path):
    tokenizer = tiny.build_tokenizer(tmp_path / "tokenizer")
    model = tiny.build_model(tmp_path / "model", "qwen2", num_hidden_layers=2)
    tiny.teach(model, tokenizer, [(question, reply) for question in QUESTIONS for reply in REPLIES])
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": question, "answer": 3} for question in QUESTIONS])
    (tmp_path / "rollout.yaml").write_text("num_samples: 24\nmax_new_tokens: 8\nengine: transformers\n")
    settings = (REPOSITORY / "examples" / "mixed" / "train.yaml").read_text()
    settings = settings.replace("global_batch_size: 64", "global_batch_size: 16").replace("lr: 1e-6", "lr: 1e-3")
    (tmp_path / "train.yaml").write_text(settings)
    command = [sys.executable, "examples/mixed/grpo.py", "--model", model, "--tokenizer", tokenizer]
    command += ["--prompts", prompts, "--rounds", "2", "--prompts-per-round", "3", "--out", tmp_path / "grpo"]
    command += ["--rollout-config", tmp_path / "rollout.yaml", "--train-config", tmp_path / "train.yaml"]
    run_loop(command)
    first, second = (tmp_path / "grpo" / f"round_000{number}" for number in (1, 2))
    # Answers that are all right leave a group without records: what is left says less than what was asked.
    means = [mean_reward(folder, model_of) for folder, model_of in ((first, model), (second, second / "hf"))]
    assert means[0] < 0.8 < means[1]
    stamps = [path.stat().st_mtime_ns for path in (first / "rollouts.jsonl", first / "hf", second / "hf")]
    assert "2 rounds are done" in run_loop(command)
    assert [path.stat().st_mtime_ns for path in (first / "rollouts.jsonl", first / "hf", second / "hf")] == stamps


def run_loop(command: list) -> str:
    argv = list(map(str, command))
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def mean_reward(folder: Path, model: Path) -> float:
    """Share of right answers to the round's prompts, sampled anew from `model`."""
    argv = ["--model", model, "--prompts", folder / "prompts.jsonl", "--out", folder / "measured.jsonl"]
    argv += ["--tokenizer", folder.parents[1] / "tokenizer", "--num-samples", "48", "--max-new-tokens", "8"]
    argv += ["--engine", "transformers", "--keep-flat-groups", "--keep-unfinished"]
    assert main([str(value) for value in argv]) == 0
    rewards = [row["reward"] for row in read_lines(folder / "measured.jsonl")]
    return sum(rewards) / len(rewards)
