"""Checkers of shell scripts and Dockerfiles that pip installs as programs."""

import shutil
import sys
from pathlib import Path

import pytest


def installed(program: str) -> str:
    """The path of a program of the `dev` extra, in this environment or elsewhere on the PATH; skips where it is absent,
    as its wheels are not there for every platform."""
    path = shutil.which(program, path=str(Path(sys.executable).parent)) or shutil.which(program)
    if path is None:
        pytest.skip(f"{program} of the dev extra is not installed")
    return path
