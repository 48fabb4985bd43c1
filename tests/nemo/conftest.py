"""The pool for Megatron-Bridge."""

from collections.abc import Iterator

import pytest

from tests.support.pool import Pool


@pytest.fixture(scope="session")
def bridge_pool() -> Iterator[Pool]:
    """Ranks of their own: Bridge, on a CPU, changes torch for good (cpu.py), and takes long to import."""
    workers = Pool()
    yield workers
    workers.close()
