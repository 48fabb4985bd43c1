"""What code a run or an evaluation was made with, and how it was started each time. Imports no library, so that it also
works where one is missing."""

import functools
import json
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_psft import __version__
from megatron_psft.atomic import replace_file

STARTS_FILE = "starts.jsonl"

LIBRARIES = (
    "torch",
    "megatron-core",
    "transformers",
    "tokenizers",
    "numpy",
    "transformer-engine",
    "apex",
    "triton",
    "vllm",
    "math-verify",
    "lm-eval",
    "megatron-bridge",
)
"""Those that results depend on, by the name that pip knows."""

_BUILT_FROM = Path(__file__).with_name("commit.txt")  # written by setup.py, and by docker/Dockerfile


@functools.cache
def versions() -> dict[str, str | None]:
    """Version of this package, with its commit, and of each of `LIBRARIES`, None where it is not installed. As found by
    the first call: a process goes on with what it has imported, whatever becomes of the files."""
    found = commit()
    own = __version__ if found is None else f"{__version__} (commit {found})"
    return {"megatron_psft": own, **{name: installed_version(name) for name in LIBRARIES}}


def record_start(folder: Path, **facts: Any) -> None:
    """Adds a line to starts.jsonl of a run's folder, with the time (UTC), `facts` (JSON values) and the versions."""
    path = folder / STARTS_FILE
    earlier = path.read_text(encoding="utf-8") if path.is_file() else ""
    line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **facts, "versions": versions()}
    replace_file(path, f"{earlier}{json.dumps(line)}\n")


def installed_version(name: str) -> str | None:
    """The version of a library by the name that pip knows; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit that this package is of, `-dirty` where files differ from it: as git says in a checkout, or as a wheel
    or an image was built from it; None if neither is known."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return _BUILT_FROM.read_text(encoding="utf-8").strip() if _BUILT_FROM.is_file() else None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout of another user, which git does not read
        return None
