"""Settings of the whole suite, and the pool of ranks."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pool import Pool

# Before torch is imported, and inherited by all processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Up to eight ranks on this machine: `pool.run(function, world_size, *args)`."""
    workers = Pool()
    yield workers
    workers.close()
