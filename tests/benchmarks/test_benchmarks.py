"""What the benchmarks compare computes the same, and what they print is a figure."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@contextmanager
def importable():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield
    finally:
        sys.path.remove(str(BENCHMARKS))


def _gradients_of(name: str, labels_percent: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from megatron_psft.config.schema import ParallelConfig
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import initialize_parallel, process_group

    with importable():
        import head
    spec = {"hidden": 16, "vocab_size": 512, "ranks": 1, "dtype": "float32"}
    place = detect(0)
    with process_group(place, 1):
        initialize_parallel(ParallelConfig(), virtual_size=None, seed=1, device=place.device)
        path = head.PATHS[name](spec)
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(40, 1, 16, generator=generator, requires_grad=True)
        weight = torch.nn.Parameter(torch.randn(512, 16, generator=generator))
        weight.main_grad = torch.zeros(512, 16)
        labels = torch.randint(512, (40,), generator=generator)
        loss = path(hidden, weight, labels, torch.arange(40) % 10 < labels_percent // 10)
        loss.backward()
        return loss.detach(), hidden.grad, weight.main_grad if weight.grad is None else weight.grad


@pytest.mark.slow
@pytest.mark.parametrize("labels_percent", [100, 30])
def test_the_heads_that_are_timed_compute_the_same(pool, labels_percent):
    (ours,) = pool.run(_gradients_of, 1, "ours", labels_percent)
    (theirs,) = pool.run(_gradients_of, 1, "megatron_unfused", labels_percent)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_figure_is_one_line_of_json(capsys):
    with importable():
        import common
    common.emit("head_peak_ratio", 0.0123456789, "ratio", tokens=8192)
    common.emit("head_seconds_liger", None, "s", does_not_run="no GPU")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {"name": "head_peak_ratio", "value": 0.012346, "unit": "ratio", "tokens": 8192},
        {"name": "head_seconds_liger", "value": None, "unit": "s", "does_not_run": "no GPU"},
    ]


def test_the_peak_is_that_of_the_block():
    """200 MB that are gone when the block ends are seen, and those before it are not."""
    with importable():
        import common
    earlier = torch.ones(2**26)
    del earlier
    with common.Meter() as meter:
        torch.ones(50 * 2**20)
    assert 190 * 2**20 < meter.peak_bytes < 260 * 2**20
    with common.Meter() as meter:
        torch.ones(2**10)
    assert meter.peak_bytes < 20 * 2**20
