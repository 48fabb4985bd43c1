"""The commands of examples/nemo, as far as they go without Megatron-Bridge; test_recipes.py has the rest."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from examples.nemo import finetune_psft, launch_nemo_run
from tests.support.cli import REPOSITORY

SLURM = ["--executor", "slurm", "--account", "A", "--partition", "P"]


@pytest.mark.parametrize("command", [finetune_psft, launch_nemo_run])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(["--help"])
    assert exit.value.code == 0
    assert "examples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--executor", "local", "--nodes", "2"], "nodes (2) must be 1 with executor local; use slurm"),
        (["--executor", "slurm", "--account", "A"], "account and partition must be given with executor slurm"),
        (["--executor", "local", "--gpus-per-node", "0"], "gpus_per_node (0) must be at least 1"),
    ],
)
def test_launcher_refuses_what_cannot_run(capsys, argv, message):
    assert launch_nemo_run.main(argv) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.skipif(find_spec("nemo_run") is None, reason="nemo-run is not installed")
@pytest.mark.parametrize("where", [["--executor", "local", "--gpus-per-node", "2"], SLURM], ids=["local", "slurm"])
def test_dry_run_shows_the_command(where, tmp_path):
    argv = [*where, "--dry-run", "--", "--recipe", "qwen3_4b", "--overrides", "train.train_iters=5"]
    command = [sys.executable, "examples/nemo/launch_nemo_run.py", *argv]
    environment = {
        "COLUMNS": "400",  # what is shown is broken into lines
        "NEMORUN_HOME": str(tmp_path),
        "PYTHONPATH": str(REPOSITORY),
        "HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for shown in ("examples/nemo/finetune_psft.py", "--recipe", "qwen3_4b", "train.train_iters=5"):
        assert shown in done.stdout + done.stderr
