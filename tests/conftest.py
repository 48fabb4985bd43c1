"""Settings of the whole suite, and the pool of ranks."""

import atexit
import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.cli import REPOSITORY
from tests.support.pool import Pool
from tests.support.start import sitecustomize

# Half the time that collecting tests takes was Python's collector's, which walked all that they import again and again.
gc.disable()

# Before torch is imported, and inherited by all processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
# They import this checkout, and first what has them wait for no disk.
START = Path(sitecustomize.__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(START), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
# Where memory has room for them, their files wait for no disk in other ways either.
MEMORY = Path(os.environ.get("TESTS_MEMORY") or "/dev/shm")
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 8 * 2**30:
    os.environ["TMPDIR"] = str(MEMORY)
    tempfile.tempdir = None
# Tokenized records are kept below the user's home: no test reads what another run has left, nor leaves any.
os.environ["HOME"] = tempfile.mkdtemp(prefix="megatron_psft_home_")
atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# Ranks that share a core hand it to each other; across cores every message has to wake one. So each test that runs at a
# time keeps to a core, and one more takes what is left of any: a fifth of the cores waits.
cores = sorted(os.sched_getaffinity(0))
worker = None if "PYTEST_CURRENT_TEST" in os.environ else os.environ.get("PYTEST_XDIST_WORKER")  # None in tests' own
if worker is not None:
    # The tests of a whole suite import it, where a few may do without.
    from megatron_psft.distributed.megatron_import import import_megatron

    import_megatron()
    number, count = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    if count in (len(cores), len(cores) + 1):
        if number < len(cores):
            os.sched_setaffinity(0, {cores[number]})
        else:
            os.nice(10)

# How long an example takes says more about the machine than about the code.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    gc.freeze()
    atexit.register(gc.unfreeze)  # else Triton, as the process ends, tells of each object that it has left
    gc.enable()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Up to eight ranks on this machine: `pool.run(function, world_size, *args)`."""
    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture(autouse=True)
def _log_levels() -> None:
    """Those of a new process: a command called in this one, be it by a fixture of a whole module, sets others, and
    `caplog` would miss lines."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("megatron_psft").setLevel(logging.NOTSET)
