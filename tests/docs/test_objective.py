"""docs/extending.md, followed to the letter: its files are put where it says and used by its flags."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.support import tiny
from tests.support.cli import REPOSITORY, importing

FILE = re.compile(r"^`(\S+\.py)`:\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:PYTHONPATH=\. )?python (pretrain_psft\.py .*--objective .*)$", re.MULTILINE)

EVALUATE = """
import math, torch
from megatron_psft.config.schema import ObjectiveConfig
from megatron_psft.objectives.objective import Objective
from megatron_psft.objectives.labels import LabelInputs, LabelStats
log_probs = torch.tensor([math.log(0.25)], requires_grad=True)
objective = Objective(config=ObjectiveConfig(objective="focal", focal_gamma=2.0))
loss = objective.token_loss(LabelStats(log_probs, torch.zeros(1)), LabelInputs())
loss.backward()
print(loss.item(), log_probs.grad.item())
"""


@pytest.fixture(scope="module")
def page() -> str:
    return (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, page):
    """A copy of the package to which the page's files are added."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(REPOSITORY / "megatron_psft", folder / "megatron_psft")
    shutil.copy(REPOSITORY / "pretrain_psft.py", folder)
    files = dict(FILE.findall(page))
    assert list(files) == ["megatron_psft/objectives/builtin/focal.py", "my_objectives.py"]
    for path, text in files.items():
        (folder / path).write_text(text, encoding="utf-8")
    return folder


def run(checkout, *arguments) -> subprocess.CompletedProcess:
    environment = {**importing(checkout), "COLUMNS": "1000", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)


def test_the_new_setting_is_a_flag_with_its_help(checkout):
    text = run(checkout, "pretrain_psft.py", "--help").stdout
    assert re.search(r"--focal-gamma F +focal: exponent of 1 - p, .* is cross-entropy. \(default: 2.0\)", text)
    assert "|focal|" in text
    assert "focal: focal loss, its weight held constant" in text


def test_the_new_setting_is_refused_with_another_objective(checkout):
    paths = ["--load-hf", "model", "--data", "records.jsonl", "--save", "run", "--train-iters", "1"]
    done = run(checkout, "pretrain_psft.py", *paths, "--objective", "sft", "--focal-gamma", "1.5")
    assert done.returncode == 2
    assert "error: focal_gamma (1.5) has no effect with objective sft; change one of them" in done.stderr


def test_the_new_loss_is_its_formula(checkout):
    loss, gradient = map(float, run(checkout, "-c", EVALUATE).stdout.split())
    assert loss == pytest.approx(0.75**2 * 1.3862944, rel=1e-6)
    assert gradient == pytest.approx(-(0.75**2), rel=1e-6)


@pytest.mark.slow
def test_the_commands_of_the_page_train(checkout, page, tmp_path):
    tiny.build_model(tmp_path / "model", "qwen2", tied=False)
    tiny.build_tokenizer(tmp_path / "tokenizer")
    tiny.write_records(tmp_path / "train.jsonl", 8)
    commands = COMMAND.findall(page)
    assert len(commands) == 2
    for command in commands:
        save = tmp_path / f"run{commands.index(command)}"
        words = {"MODEL": tmp_path / "model", "train.jsonl": tmp_path / "train.jsonl", "100": 2}
        arguments = [words.get(word, word) for word in command.split()]
        arguments[arguments.index("--save") + 1] = save
        small = ["--global-batch-size", "1", "--seq-length", "256"]
        done = run(checkout, *arguments, "--tokenizer", tmp_path / "tokenizer", *small)
        assert done.returncode == 0, done.stderr[-2000:]
        assert len([json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]) == 2
        assert f"objective: {arguments[arguments.index('--objective') + 1]}" in (save / "config.yaml").read_text()
