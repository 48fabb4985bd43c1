"""Numbers in pages that are constants of the code are these."""

import math

import pytest

from megatron_psft import lock
from megatron_psft.cli.plan import ClusterConfig
from megatron_psft.config.schema import LoggingConfig, ObjectiveConfig
from megatron_psft.distributed import failure, orphans
from megatron_psft.head.chunked import CHUNK_BYTES
from megatron_psft.scoring.agreement import BOUNDS
from tests.support.cli import REPOSITORY

MEMORY = f"{CHUNK_BYTES['cuda'] >> 30} GiB on a GPU ({CHUNK_BYTES['cpu'] >> 20} MiB on a CPU)"
CLIP_PERCENT = f"{100 * ObjectiveConfig.clip_ratio_high:.0f} %"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("docs/resume.md", f"touches it every {lock.BEAT_SECONDS:.0f} seconds"),
        ("docs/resume.md", f"free {lock.STALE_SECONDS / 60:.0f} minutes after the last touch"),
        ("docs/resume.md", f"ends the process {failure._GRACE_SECONDS:.0f} seconds later"),
        ("docs/resume.md", f"takes no longer than {orphans.ORDERLY_SECONDS:.0f} seconds"),
        ("docs/parallelism.md", MEMORY),
        ("docs/parallelism.md", f"An H100 of 80 GB has {ClusterConfig.gpu_memory_gib} GiB"),
        ("docs/parallelism.md", f"would hold {round(32_768 * 152_064 * 4 / 1e9)} GB of fp32 logits"),
        ("docs/metrics.md", f"({math.log(1 + ObjectiveConfig.clip_ratio_high):.3f} by default)"),
        *(("docs/metrics.md", f"| {name} | {one.p99:g} | {one.largest:g} |") for name, one in BOUNDS.items()),
        *((page, f"already more than {CLIP_PERCENT} more probable") for page in ("README.md", "docs/index.md")),
        ("docs/method.md", f"`eps` = {CLIP_PERCENT}"),
        ("docs/tutorial.md", f"every {({10: 'ten'})[LoggingConfig.log_interval]} steps how it goes"),
    ],
)
def test_a_page_has_the_constants_of_the_code(page, text):
    assert text in " ".join((REPOSITORY / page).read_text(encoding="utf-8").split())
