"""Fixtures for the data tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real records and tokenizers, which is no part of the repository."""
    beside = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("MEGATRON_PSFT_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data: neither MEGATRON_PSFT_DATA nor {beside} is a folder")
    return folder
