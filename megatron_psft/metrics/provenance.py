"""What code a run or an evaluation was made with. Imports no library, so that it also works where one is missing."""

import subprocess
from importlib import metadata
from pathlib import Path

from megatron_psft import __version__

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


def versions() -> dict[str, str | None]:
    """Version of this package, with its commit, and of each of `LIBRARIES`, None where it is not installed."""
    found = commit()
    own = __version__ if found is None else f"{__version__} (commit {found})"
    return {"megatron_psft": own, **{name: installed_version(name) for name in LIBRARIES}}


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
