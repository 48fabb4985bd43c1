"""Runs Megatron-Bridge on the CPU."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.nemo import cpu
from tests.support.pool import Pool

SEQ_LENGTH = 256

needs_bridge = pytest.mark.skipif(find_spec("megatron.bridge") is None, reason="megatron-bridge is not installed")


def run_bridge(
    pool: Pool,
    save: Path,
    *,
    model: Path,
    tokenizer: Path,
    data: Path,
    overrides: list[str],
    nproc: int = 1,
    **planted: Any,
) -> list[dict[str, Any]]:
    """Fine-tunes as run_bridge.py does and returns what the last rank's steps report, since the start of the run."""
    job = {"model": str(model), "tokenizer": str(tokenizer), "data": str(data), "save": str(save), **planted}
    save.mkdir(parents=True, exist_ok=True)
    path = save / "job.json"
    path.write_text(json.dumps({**job, "seq_length": SEQ_LENGTH, "overrides": overrides}))
    for exit in pool.run(cpu.run, nproc, "tests.nemo.run_bridge", [str(path)]):
        assert exit.code == 0, exit.out[-2000:] + exit.err[-8000:]
    lines = (save / f"bridge_{nproc - 1}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
