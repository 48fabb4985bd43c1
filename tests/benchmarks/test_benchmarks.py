"""What the benchmarks compare computes the same, and what they print is a figure."""

import json
import sys
import warnings
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


KERNEL = "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, at::native::" + 60 * "x"
TRACE = [  # microseconds, as torch.profiler writes them on a GPU
    {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 1000.0, "dur": 300.0, "tid": 7, "args": {"stream": 7}},
    {"ph": "X", "cat": "kernel", "name": KERNEL, "ts": 1200.0, "dur": 200.0, "tid": 20, "args": {"stream": 20}},
    {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 1250.0, "dur": 50.0, "tid": 7, "args": {"stream": 7}},
    {
        "ph": "X",
        "cat": "gpu_memcpy",
        "name": "Memcpy HtoD (Pageable -> Device)",
        "ts": 1900.0,
        "dur": 60.0,
        "args": {"bytes": 4096, "memory bandwidth (GB/s)": 0.07},
    },
    {
        "ph": "X",
        "cat": "gpu_memcpy",
        "name": "Memcpy DtoH (Device -> Pinned)",
        "ts": 1960,
        "dur": 20,
        "args": {"bytes": 8},
    },
    {"ph": "X", "cat": "gpu_memset", "name": "Memset (Device)", "ts": 1980.0, "dur": 20.0, "args": {"bytes": 1}},
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0.0, "dur": 5000.0},
    {"ph": "X", "cat": "gpu_user_annotation", "name": "a step", "ts": 0.0, "dur": 5000.0},
    {"ph": "f", "cat": "kernel", "name": "an arrow", "ts": 3000.0},
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
]


def test_a_profile_is_what_the_gpu_did():
    with importable():
        import profiled
    found = profiled.read_trace(TRACE)
    assert found.span_milliseconds == 1.0
    assert found.idle_share == pytest.approx(0.5)  # from 1400 on until 1900: kernels side by side count once
    kernels = [(profiled.short_name(work.name), work.milliseconds, work.count) for work in found.kernels]
    short = "vectorized_layer_norm_kernel<float, " + 24 * "x"
    assert kernels == [("gemm", pytest.approx(0.35), 2), (short, pytest.approx(0.2), 1)]
    copies = [(work.name, work.count, work.num_bytes) for work in found.copies]
    assert copies == [("HtoD (Pageable -> Device)", 1, 4096), ("DtoH (Device -> Pinned)", 1, 8)]
    with pytest.raises(ValueError, match="no events of kernel"):
        profiled.read_trace(TRACE[-4:-3])


def test_waits_are_counted_by_line(monkeypatch):
    """As torch warns of them on a GPU; other warnings are none."""
    with importable():
        import profiled
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    text = "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:154.)"
    with profiled.counted_waits() as waits:
        for path, line, said in [("head/layer.py", 7, text), ("loop.py", 9, text), ("loop.py", 9, "deprecated")] * 2:
            warnings.warn_explicit(said, UserWarning, f"{profiled.ROOT}/megatron_psft/{path}", line)
    assert waits == {"megatron_psft/head/layer.py:7": 2, "megatron_psft/loop.py:9": 2}
    assert modes == ["warn", 0]


@pytest.mark.slow
def test_what_a_fresh_process_prints_is_passed_on(capfd, monkeypatch):
    """And what cannot be measured is a line, too: the second configuration needs a GPU's library."""
    with importable():
        import throughput
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--size", "tiny"])
    throughput.main()
    figures = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    missing = [(figure["name"], figure["does_not_run"]) for figure in figures if figure["value"] is None]
    assert missing == [("sft_step_seconds", "transformer_engine is not installed")]
    found = {figure["name"]: figure["value"] for figure in figures}
    assert 0 < found["head_share"] < 1
    assert 0 <= found["gpu_idle_share"] < 1
    assert any(figure.get("kernel") == "aten::mm" for figure in figures)
    assert found["psft_over_sft"] > 0
