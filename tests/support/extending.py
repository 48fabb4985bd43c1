"""Follows a section of docs/extending.md as it is written, in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.cli import REPOSITORY, importing

BLOCK = re.compile(r"^```(diff|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def copy_repository(folder: Path) -> Path:
    """A copy without what is not part of the repository, in a new folder below `folder`."""
    skipped = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "__pycache__", ".*_cache", ".hypothesis")
    return Path(shutil.copytree(REPOSITORY, folder / "megatron_psft", ignore=skipped))


def run(command: list[str], folder: Path, given: str | None = None) -> str:
    """What a command prints in `folder`, where `python` is this one and imports what lies there."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**importing(folder), "PATH": path}
    done = subprocess.run(
        command, cwd=folder, env=environment, input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def follow(checkout: Path, section: str) -> None:
    """Applies the changes of a section and runs its commands, in order."""
    page = (checkout / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = BLOCK.findall(page.split(f"\n## {section}\n")[1].split("\n## ")[0])
    assert "diff" in {language for language, _ in blocks}
    for language, text in blocks:
        if language == "diff":
            run(["git", "apply", "-"], checkout, given=text)
        else:
            run(["bash", "-euo", "pipefail", "-c", text], checkout)
