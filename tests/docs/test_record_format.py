"""How to add a record format by docs/extending.md, followed as it is written in a copy of the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli import REPOSITORY

BLOCK = re.compile(r"^```(diff|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def checkout(tmp_path):
    skipped = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "__pycache__", ".*_cache", ".hypothesis")
    return Path(shutil.copytree(REPOSITORY, tmp_path / "megatron_psft", ignore=skipped))


def run(command: list[str], folder: Path, given: str | None = None) -> str:
    """What a command prints in `folder`, where `python` is this one and imports what lies there."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(folder), "PATH": path}
    done = subprocess.run(
        command, cwd=folder, env=environment, input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def follow(checkout: Path, section: str) -> None:
    """Applies the changes of a section and runs its commands, in order."""
    page = (checkout / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = BLOCK.findall(page.split(f"\n## {section}\n")[1].split("\n## ")[0])
    assert {language for language, _ in blocks} == {"diff", "sh"}
    for language, text in blocks:
        if language == "diff":
            run(["git", "apply", "-"], checkout, given=text)
        else:
            run(["bash", "-euo", "pipefail", "-c", text], checkout)


def test_a_record_format_is_added_in_one_place(checkout):
    follow(checkout, "A record format")
    assert "| dialog | `dialog` |" in (checkout / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [{"dialog": ["Hi?", "Yes."]}, {"dialog": ["Hi?", 7]}, {"dialogs": []}]
    (checkout / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = "from megatron_psft.data.records import read_records; print(*read_records(['a.jsonl']), sep='\\n')"
    records, bad = run([sys.executable, "-c", code], checkout).splitlines()
    assert "{'role': 'assistant', 'content': 'Yes.'}" in records
    assert "dialog[1] has content of type int" in bad
    assert "instruction and output; dialog; did you mean dialog?" in bad
