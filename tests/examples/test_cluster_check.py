"""The check of a node of GPUs: its verdicts, its frame, and a rehearsal of it on two ranks of a CPU."""

import importlib.util
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from megatron_psft.cli import plan
from megatron_psft.config.rules import validate
from megatron_psft.config.schema import parse_config
from tests.support.cli import REPOSITORY

FOLDER = REPOSITORY / "examples" / "cluster-check"


@pytest.fixture(scope="module")
def check():
    """The script as a module; its folder's name is no package's."""
    spec = importlib.util.spec_from_file_location("cluster_check", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def steps(*nll, norms=(2.0, 2.0)):
    return [{"step": at + 1, "nll": value, "grad_norm": norms[at]} for at, value in enumerate(nll)]


def test_runs_within_the_bound_agree(check):
    text = check.compare(steps(6.0, 5.0), steps(6.0, 5.0004), bound=1e-4)
    assert text == "NLL 8.0e-05 (bound 1e-04), grad norm 0.0e+00 (bound 1e-03) apart; NLL 6.0000 to 5.0000"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (steps(6.0, 5.01), "NLL 2.0e-03"),
        (steps(6.0, 4.99), "NLL 2.0e-03"),
        (steps(6.0, math.nan), "NLL nan"),
        (steps(6.0, 5.0, norms=(2.0, 2.01)), r"grad norm 5\.0e-03"),
        (steps(6.0), "1 steps beside 2"),
    ],
)
def test_runs_that_differ_fail(check, found, said):
    with pytest.raises(ValueError, match=said):
        check.compare(steps(6.0, 5.0), found, bound=1e-4)


def test_a_reference_that_learns_nothing_shows_nothing(check):
    with pytest.raises(ValueError, match="shows nothing"):
        check.compare(steps(6.0, 5.9), steps(6.0, 5.9), bound=5e-2)


def test_a_save_of_what_every_rank_holds_is_too_much(check):
    assert "(bound 6.60)" in check.judge_memory(6.5, planned_gib=2.6, ranks=8)
    with pytest.raises(ValueError, match=r"20\.80 GiB"):
        check.judge_memory(8 * 2.6, planned_gib=2.6, ranks=8)


@pytest.mark.parametrize(
    ("seconds", "code", "left", "device", "is_right"),
    [
        (31, 1, None, "cuda", True),
        (2, 1, "4", "cpu", True),
        (2, 1, None, "cpu", False),
        (2, 1, "1", "cuda", False),
        (61, 1, None, "cuda", False),
        (2, 0, None, "cuda", False),
    ],
)
def test_how_a_run_must_end_after_a_kill(check, seconds, code, left, device, is_right):
    if is_right:
        assert check.judge_end(seconds, code, left, device).startswith(f"{seconds}.0 s")
    else:
        with pytest.raises(ValueError, match="s until all had ended"):
            check.judge_end(seconds, code, left, device)


def test_a_check_that_fails_leaves_the_others(check, capsys):
    def failing(node):
        raise RuntimeError("exit code 1: error: no")

    def skipped(node):
        raise check.SkippedError("nothing to run on")

    assert check.run_checks(None, {"a": failing, "b": skipped, "c": lambda node: "fine"}) == 1
    lines = [re.sub(" +", " ", line) for line in capsys.readouterr().out.splitlines()]
    expected = ["FAIL a 0 s RuntimeError: exit code 1: error: no", "skip b 0 s nothing to run on", "ok c 0 s fine"]
    assert lines == expected
    assert check.run_checks(None, {"b": skipped, "c": lambda node: "fine"}) == 0


def test_a_run_that_failed_fails_in_each_check_that_needs_it_and_is_made_once(check, tmp_path, monkeypatch):
    calls = []

    def train(node, name, *flags):
        calls.append(name)
        raise RuntimeError("exit code 4: error: a peer is lost")

    monkeypatch.setattr(check.Node, "train", train)
    node = check.Node(gpus=2, device="cpu", folder=tmp_path, inputs=[])
    chosen = {name: it for name, it in check.checks(2).items() if name.startswith("layout")}
    assert check.run_checks(node, chosen) == 1
    assert calls == ["TP2-fp32", "TP2-bf16"]


@pytest.mark.parametrize("gpus", [2, 8])
def test_every_layout_is_one_that_the_trainer_takes(check, gpus, tmp_path):
    node = check.Node(gpus=gpus, device="cuda", folder=tmp_path, inputs=["--load-hf", "m", "--data", "d"])
    found = check.layouts(gpus)
    assert len(found) == {2: 4, 8: 6}[gpus]
    for flags in [*found.values(), check.SAVED_IN, check.RESUMED_IN]:
        validate(parse_config([*node.flags(flags, "--train-iters 6"), "--save", "s"]), gpus)


def test_each_check_is_explained(check):
    readme = (FOLDER / "README.md").read_text()
    for name in check.checks(8):
        explained = f"| `{name}`" in readme or f"`{' '.join(name.split()[:1])} " in readme
        assert explained, name


def test_a_save_is_judged_by_what_the_plan_says(check, tmp_path, monkeypatch, capsys):
    """The command that plans is run, the one that trains is not."""

    def psft(node, name, *words):
        assert (name, plan.main(words)) == ("plan", 0)
        return capsys.readouterr().out

    monkeypatch.setattr(check.Node, "psft", psft)

    def train(node, name, *flags, each):
        for num_steps in range(2):
            monkeypatch.setattr(check.Node, "steps", lambda node, name, num=num_steps: [{}] * num)
            each(SimpleNamespace(children=lambda recursive: [psutil.Process()]))

    monkeypatch.setattr(check.Node, "train", train)
    inputs = check.prepare(tmp_path, "cuda", None)
    node = check.Node(gpus=8, device="cuda", folder=tmp_path, inputs=inputs)
    assert "planned 2.4" in check.save(node)


@pytest.mark.slow
def test_a_rehearsal_on_two_ranks_of_a_cpu(tmp_path):
    argv = [FOLDER / "run.py", "--gpus", "2", "--device", "cpu", "--only", "fp8 delayed|kill", "--folder", tmp_path]
    done = subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["skip", "fp8"], ["ok", "kill"]], done.stdout + done.stderr
    assert "torchrun's code 1, the run's 4" in lines[1]
    assert done.returncode == 0


def test_a_folder_of_something_else_is_left_alone(check, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        check.main(["--gpus", "2", "--device", "cpu", "--only", "nothing", "--folder", str(tmp_path)])
    assert caught.value.code == 2
    assert "holds files of something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    for _ in range(2):  # its own, new and once more
        assert check.main(["--gpus", "2", "--device", "cpu", "--only", "nothing", "--folder", f"{tmp_path}/own"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "thesis.txt"]
