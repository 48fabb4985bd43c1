"""What code a run is made of."""

import subprocess
from importlib.metadata import version
from pathlib import Path

from megatron_psft import __version__

_LIBRARIES = ("megatron-core", "torch", "transformers")


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that results depend on, by their names."""
    commit = _commit()
    own = __version__ if commit is None else f"{__version__} (commit {commit})"
    return {"megatron_psft": own, **{name: version(name) for name in _LIBRARIES}}


def _commit() -> str | None:
    """The commit of the checkout that this package is in, `-dirty` where files differ from it; None elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout of another user, which git does not read
        return None
