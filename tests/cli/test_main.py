"""The command `psft` itself: what it lists and refuses, and the scripts of a checkout that are the same commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_psft.cli.main import COMMANDS, main
from tests.support.cli import REPOSITORY, run_torchrun

SCRIPTS = {
    "pretrain_psft.py": "train",
    "tools/show_data.py": "data",
    "tools/plot_run.py": "plot",
    "tools/convert_checkpoint.py": "convert",
    "tools/evaluate.py": "evaluate",
    "tools/compare.py": "compare",
    "tools/rollout.py": "rollout",
    "tools/plan.py": "plan",
    "tools/doctor.py": "doctor",
}


def run_python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_psft_without_a_command_lists_all_commands(capsys, words):
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("commands:") + 1
    assert [line.split()[0] for line in lines[first : first + len(COMMANDS)]] == list(COMMANDS)
    assert all(len(line) <= 120 for line in lines)


def test_psft_help_imports_neither_torch_nor_the_commands():
    done = run_python("-X", "importtime", "-m", "megatron_psft", "--help")
    assert done.returncode == 0
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "megatron_psft.cli.main" in imported
    assert not imported & {"torch", "numpy", "yaml", "argcomplete", *(f"megatron_psft.cli.{name}" for name in COMMANDS)}


def test_psft_with_a_mistyped_command_names_the_nearest(capsys):
    assert main(["evaluates", "--tasks", "x"]) == 2
    error = "error: unknown command evaluates; did you mean evaluate?; psft --help lists all\n"
    assert capsys.readouterr() == ("", error)


def test_psft_with_a_leading_flag_trains(capsys):
    assert main(["--global-batch-sizes", "4"]) == 2
    error = "error: unknown argument --global-batch-sizes; did you mean --global-batch-size?\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_of_a_checkout_are_the_commands(script):
    assert set(SCRIPTS.values()) == set(COMMANDS)
    ours, theirs = run_python(script, "--help"), run_python("-m", "megatron_psft", SCRIPTS[script], "--help")
    assert (ours.returncode, ours.stderr) == (0, "")
    assert ours.stdout == theirs.stdout
    assert ours.stdout.startswith(f"usage: psft {SCRIPTS[script]} ")
    assert "# PYTHON_ARGCOMPLETE_OK" in (REPOSITORY / script).read_text()[:1024]
    assert len((REPOSITORY / script).read_text().splitlines()) <= 16


def test_tools_evaluate_does_not_hide_the_library_of_its_name():
    code = "import runpy, sys; sys.argv[1:] = ['--help']; sys.path.insert(0, 'tools')\n"
    code += "try: runpy.run_path('tools/evaluate.py', run_name='__main__')\nexcept SystemExit: pass\n"
    code += "import importlib.util; spec = importlib.util.find_spec('evaluate')\n"
    code += "print('hidden' if spec and 'tools' in str(spec.origin) else 'free')"
    assert run_python("-c", code).stdout.endswith("free\n")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("psft ", set(COMMANDS)),
        ("psft pl", {"plot", "plan"}),
        ("psft plan --gpu-m", {"--gpu-memory-gib"}),
        ("psft rollout --engine v", {"vllm"}),
        ("psft --old-policy-m", {"--old-policy-micro-batch-size"}),
        ("python -m megatron_psft train --old-policy-m", {"--old-policy-micro-batch-size"}),
    ],
)
def test_a_shell_completes_commands_and_their_flags(tmp_path: Path, typed: str, offered: set[str]) -> None:
    answer = tmp_path / "answer"
    shell = {"_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_IFS": "\n"}
    shell |= {"COMP_LINE": typed, "COMP_POINT": str(len(typed)), "_ARGCOMPLETE": "3" if "-m" in typed.split() else "1"}
    run_python("-m", "megatron_psft", **shell)
    assert {text.strip() for text in answer.read_text().splitlines()} == offered


@pytest.mark.slow
def test_torchrun_m_with_a_mistyped_command_shows_it_once():
    done = run_torchrun(["-m", "megatron_psft", "trains"], 2)
    assert done.returncode != 0
    assert done.stderr.count("error: unknown command trains; did you mean train?") == 1
    assert "exitcode  : 2" in done.stderr
