"""Runs Megatron-Bridge on the CPU."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.nemo import cpu
from tests.support.layouts import LAYOUTS
from tests.support.pool import Pool

SEQ_LENGTH = 256

COMPARED = {"lm loss": "loss", **{name: name for name in ("nll", "entropy", "grad_norm", "clip_fraction")}}
COMPARED |= {name: name for name in ("ratio_mean", "approx_kl")}
IN_MODEL = (
    *("tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size"),
    "expert_model_parallel_size",
)

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


def overrides_of(layout: str) -> list[str]:
    """What Bridge's configuration is told of a layout: all that differs from one rank's."""
    parallel, one = LAYOUTS[layout].parallel, LAYOUTS["one"].parallel
    sections = {name: ("model",) for name in IN_MODEL}
    sections |= {"use_distributed_optimizer": ("ddp", "optimizer")}
    sections |= {"overlap_grad_reduce": ("ddp",), "overlap_param_gather": ("ddp",)}
    found = [
        f"{section}.{name}={getattr(parallel, name)}".lower()
        for name, places in sections.items()
        for section in places
        if getattr(parallel, name) != getattr(one, name)
    ]
    # The stages of a pipeline exchange rows of one length.
    return [*found, "dataset.dataset_kwargs.pad_to_max_length=true"] if layout == "PP2" else found


def assert_same_run(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for line, wanted_line in zip(found, wanted, strict=True):
        for bridge_name, name in COMPARED.items():
            if name not in wanted_line:  # of an old policy
                assert bridge_name not in line
                continue
            assert line[bridge_name] == pytest.approx(wanted_line[name], rel=1e-4), (line["step"], name)
