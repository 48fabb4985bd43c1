"""The pools for Megatron-Bridge."""

from collections.abc import Iterator

import pytest

from tests.support.pool import Pool


@pytest.fixture(scope="session")
def bridge_pool() -> Iterator[Pool]:
    """Ranks of their own: Bridge, on a CPU, changes torch for good (cpu.py), and takes long to import."""
    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def source_pool() -> Iterator[Pool]:
    """Ranks that import Bridge as a source of models, and see no CUDA that is not there."""
    workers = Pool()
    yield workers
    workers.close()
