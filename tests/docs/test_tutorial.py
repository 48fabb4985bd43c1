"""The tutorial's commands, run in order as they are written, `make demo` among them; a tiny model takes the real one's
place."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.cli import REPOSITORY, importing
from tests.support.real_model import fetch

BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a stranger has, but for the virtual environment, which is the tests' own."""
    folder = tmp_path_factory.mktemp("clone") / "megatron_psft"
    skipped = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(REPOSITORY, folder, ignore=skipped)
    (folder / ".venv").symlink_to(sys.prefix)
    model = Path.home() / ".cache" / "megatron_psft" / "models" / fetch.FOLDER  # a home that tests have for themselves
    tiny.build_model(model, "llama", tied=True, vocab_size=200, max_position_embeddings=1024)
    tiny.build_tokenizer(model)
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            os.utime(path, (0, 0))  # else make might install this copy in the tests' own environment
    return folder


def interrupt_demo(checkout, environment):
    """Starts the demo and presses Ctrl-C while it trains; `make demo` is to go on from there."""
    command = [str(checkout / ".venv/bin/python"), "examples/demo/run.py"]
    out = checkout / "interrupted.txt"
    with out.open("w") as file:
        demo = subprocess.Popen(
            command, cwd=checkout, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        lines = checkout / "runs" / "demo" / "sft" / "metrics.jsonl"
        while not (lines.exists() and lines.read_text().count("\n") > 2):
            assert demo.poll() is None, out.read_text()
            time.sleep(0.05)
        os.killpg(demo.pid, signal.SIGINT)
        assert demo.wait() == 130, out.read_text()
    assert "the same command goes on" in out.read_text()


@pytest.mark.slow
@pytest.mark.alone
def test_the_commands_run_in_order_as_written(checkout):
    blocks = BLOCK.findall((checkout / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    assert {language for language, _ in blocks} == {"sh", "python"}
    environment = {**importing(checkout), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    interrupt_demo(checkout, environment)
    command = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [str(checkout / ".venv/bin/python"), "-c"]}
    for language, text in blocks:
        done = subprocess.run(
            [*command[language], text], cwd=checkout, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    demo, runs = checkout / "runs" / "demo", checkout / "runs" / "tutorial"
    page = (demo / "report.html").read_text(encoding="utf-8")
    assert page.count("<tr>") == 8 + (1 + 32) + (1 + 36)  # the table, tickets and general requests
    assert (demo / "curves" / "report.html").is_file()
    for objective in ("sft", "psft"):  # no step is missing where it was interrupted, and none was made twice
        steps = [json.loads(line)["step"] for line in (demo / objective / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(33))
    lines = [json.loads(line) for line in (runs / "psft" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(13))  # the first is what validation says before any step
    assert lines[-1]["nll"] < lines[1]["nll"]
    assert (runs / "report" / "report.html").is_file()
