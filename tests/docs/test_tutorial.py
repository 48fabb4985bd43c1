"""The tutorial's commands, run in order as they are written."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.support.cli import REPOSITORY, importing

BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a stranger has, but for the virtual environment, which is the tests' own."""
    folder = tmp_path_factory.mktemp("clone") / "megatron_psft"
    skipped = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(REPOSITORY, folder, ignore=skipped)
    (folder / ".venv").symlink_to(sys.prefix)
    for name in ("base", "target"):  # the demo's models, in a third of their steps
        recipe = folder / "examples" / "demo" / f"{name}.yaml"
        recipe.write_text(
            re.sub(r"(?<=^train_iters: )\d+", lambda steps: str(int(steps[0]) // 3), recipe.read_text(), flags=re.M)
        )
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            os.utime(path, (0, 0))  # else make might install this copy in the tests' own environment
    return folder


@pytest.mark.slow
@pytest.mark.alone
def test_the_commands_run_in_order_as_written(checkout):
    blocks = BLOCK.findall((checkout / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    assert {language for language, _ in blocks} == {"sh", "python"}
    environment = {**importing(checkout), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [str(checkout / ".venv/bin/python"), "-c"]}
    for language, text in blocks:
        done = subprocess.run(
            [*command[language], text], cwd=checkout, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert re.search(r"\d", done.stdout)  # the model's reply is about numbers
    runs = checkout / "runs" / "tutorial"
    lines = [json.loads(line) for line in (runs / "psft" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(73))  # the first is what validation says before any step
    assert lines[-1]["nll"] < lines[1]["nll"] / 2
    assert (runs / "report" / "report.html").is_file()
