"""What is said of a run that is out of memory, on each kind of device."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from megatron_psft.config.schema import parse_config
from megatron_psft.diagnostics import out_of_memory
from megatron_psft.diagnostics.out_of_memory import explain
from megatron_psft.distributed.collective import is_out_of_memory, naming_lost_peers
from megatron_psft.distributed.device import Platform
from megatron_psft.errors import RankError
from tests.support import tiny

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.32 GiB. GPU 0 has a total capacity of 79.10 GiB")
HOST = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes. Error code 12")
NCCL = RuntimeError("NCCL error in: x.cpp:1, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'")
KINDS = [
    CUDA,
    HOST,
    NCCL,
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]
GPU = Platform(device=torch.device("cuda", 0), backend="nccl", has_transformer_engine=True)


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    return [*tiny.run_flags(folder), "--save", str(folder / "run"), "--train-iters", "1"]


@pytest.fixture
def gpu(monkeypatch) -> None:
    """What CUDA says of a GPU that is nearly full."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 70 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 74 * 2**30)
    properties = SimpleNamespace(total_memory=int(79.1 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize("error", KINDS, ids=lambda error: str(error)[:30])
def test_a_lack_of_memory_is_known_and_is_no_lost_peer(error):
    assert is_out_of_memory(error)

    def broadcast() -> None:
        raise error

    # As if it came out of a collective, which asks for memory, too.
    code = broadcast.__code__.replace(co_filename="/torch/distributed/distributed_c10d.py")
    broadcast.__code__ = code
    with pytest.raises(type(error)), naming_lost_peers("step 3"):
        broadcast()


def test_other_errors_of_a_collective_are_still_a_lost_peer():
    def broadcast() -> None:
        raise RuntimeError("Connection closed by peer")

    broadcast.__code__ = broadcast.__code__.replace(co_filename="/torch/distributed/distributed_c10d.py")
    with pytest.raises(RankError, match="step 3: broadcast failed"), naming_lost_peers("step 3"):
        broadcast()


def test_a_full_gpu_is_told_with_the_plan_and_what_takes_less(gpu, flags):
    text = explain(CUDA, parse_config([*flags, "--micro-batch-size", "2", "--bf16"]), GPU, rank=1, world_size=2)
    found = "allocated 70.0 GiB at most, reserved 74.0, of the 79.1 that the GPU has"
    assert text.startswith(f"rank 1: out of GPU memory, asked for 2.32 GiB; {found}; planned were ")
    assert "; lower it by --use-distributed-optimizer, " in text
    assert "--micro-batch-size below 2" in text
    assert "\n" not in text


def test_what_is_set_already_is_not_advised(gpu, flags):
    recompute = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    config = parse_config([*flags, "--bf16", "--use-distributed-optimizer", "--optimizer-cpu-offload", *recompute])
    advice = explain(CUDA, config, GPU, rank=0, world_size=2).partition("lower it by ")[2]
    assert not any(flag in advice for flag in ("distributed-optimizer", "cpu-offload", "recompute", "micro-batch"))
    assert "--tensor-model-parallel-size above 1" in advice


@pytest.mark.parametrize(
    ("limit", "room"),
    [
        (None, "of the 256.0 that the host has"),
        (24 * 2**30, "of the 24.0 that its container, Slurm job or pod may have"),
    ],
)
def test_the_host_is_named_where_it_is_the_host_that_is_full(gpu, flags, monkeypatch, limit, room):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=256 * 2**30))
    monkeypatch.setattr(out_of_memory, "limit_bytes", lambda: limit)
    for error in (HOST, MemoryError()):
        text = explain(error, parse_config(flags), GPU, rank=0, world_size=1)
        assert text.startswith("rank 0: out of host memory")
        assert room in text
    assert "asked for 8589934592 bytes" in explain(HOST, parse_config(flags), GPU, rank=0, world_size=1)


def test_a_plan_that_cannot_be_made_does_not_hide_what_has_happened(gpu, flags, tmp_path):
    config = parse_config([*flags, "--load-hf", str(tmp_path / "gone")])
    text = explain(NCCL, config, GPU, rank=0, world_size=1)
    assert text.startswith("rank 0: out of GPU memory; allocated 70.0 GiB at most, ")
    assert "psft plan says what fits (load_hf " in text
