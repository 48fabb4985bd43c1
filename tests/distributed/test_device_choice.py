"""On what a run computes: never on the CPU where a GPU was meant, and on every rank alike."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_psft.config.schema import parse_config
from megatron_psft.distributed import device_choice
from megatron_psft.distributed.device_choice import Survey, choose, has_hidden_gpu, places, survey, unusable_gpu
from megatron_psft.errors import InfrastructureError, UserError
from tests.support import tiny
from tests.support.cli import REPOSITORY, Exit, run_cli

OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040). Please update it."


def ranks(*hosts: str, wanted: str = "auto", **common: object) -> list[Survey]:
    """One rank for each name, numbered from 0 on its host, with a GPU of its own unless `common` says otherwise."""
    found = []
    for rank, host in enumerate(hosts):
        local_rank = hosts[:rank].count(host)
        gpu = {"num_gpus": hosts.count(host), "gpu": f"{host}:{local_rank}"}
        found.append(Survey(rank=rank, host=host, local_rank=local_rank, wanted=wanted, **{**gpu, **common}))
    return found


def without_gpu(found: Survey, trouble: str | None = None) -> Survey:
    place = {"rank": found.rank, "host": found.host, "local_rank": found.local_rank, "wanted": found.wanted}
    return Survey(**place, trouble=trouble)


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_gpus_are_taken_where_all_ranks_have_one(wanted):
    assert choose(ranks("a", "a", "b", "b", wanted=wanted)) == "cuda"
    assert choose(ranks("a", "a", wanted=wanted, gpu=None)) == "cuda"  # a torch that does not tell GPUs apart


def test_the_cpu_is_taken_where_nothing_tells_of_a_gpu_or_it_is_asked_for():
    assert choose([without_gpu(found) for found in ranks("a", "b")]) == "cpu"
    assert choose(ranks("a", "b", wanted="cpu")) == "cpu"
    assert choose([without_gpu(found, OLD_DRIVER) for found in ranks("a", wanted="cpu")]) == "cpu"


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
@pytest.mark.parametrize("trouble", [None, OLD_DRIVER])
@pytest.mark.parametrize(("lacking", "named"), [({2, 3}, "ranks 2, 3 on b"), ({0}, "rank 0 on a")])
def test_ranks_without_a_gpu_end_those_that_have_one(wanted, trouble, lacking, named):
    found = ranks("a", "a", "b", "b", wanted=wanted)
    mixed = [without_gpu(entry, trouble) if entry.rank in lacking else entry for entry in found]
    with pytest.raises(InfrastructureError) as caught:
        choose(mixed)
    expected = f"device: {named} have no working GPU, while the others have: {trouble or 'torch sees no GPU there'}; "
    assert str(caught.value).startswith(expected)


def test_a_gpu_that_does_not_work_counts_as_none():
    found = ranks("a", "a")
    broken = Survey(**{**vars(found[1]), "trouble": "cuda:1 does not work: CUDA error: ECC", "gpu": None})
    with pytest.raises(InfrastructureError, match=r"rank 1 on a have no working GPU.*cuda:1 does not work"):
        choose([found[0], broken])
    with pytest.raises(UserError, match=r"device \(auto\).*rank 1 on a: cuda:1 does not work"):
        choose([broken])


@pytest.mark.parametrize(
    ("wanted", "trouble", "message"),
    [
        ("cuda", "torch 2 is built without CUDA", r"^device \(cuda\) needs a GPU for each rank; ranks 0, 1 on a: "),
        (
            "auto",
            OLD_DRIVER,
            r"^device \(auto\) does not take the CPU .*too old \(found version 11040\).*--device cpu$",
        ),
    ],
)
def test_a_gpu_that_is_meant_and_cannot_be_used_is_refused(wanted, trouble, message):
    with pytest.raises(UserError, match=message):
        choose([without_gpu(found, trouble) for found in ranks("a", "a", wanted=wanted)])


def test_one_sign_of_a_gpu_on_any_host_is_enough():
    first, second = ranks("a", "b")
    with pytest.raises(UserError, match="sign of a GPU; rank 1 on b: why"):
        choose([without_gpu(first), without_gpu(second, "why")])


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(
        UserError, match=r"rank 2 on a have no GPU of their own: LOCAL_RANK \(2\).* the 2 GPUs .* on a;"
    ):
        choose(ranks("a", "a", "a", num_gpus=2))


def test_a_host_with_fewer_gpus_than_the_others_is_a_lost_one():
    found = [*ranks("a", "a"), *(Survey(**{**vars(s), "host": "b", "num_gpus": 1}) for s in ranks("a", "a"))]
    with pytest.raises(
        InfrastructureError, match=r"LOCAL_RANK \(1\) must be below the 1 GPU .* on b.*other hosts have 2"
    ):
        choose(found)


def test_processes_that_would_share_a_gpu_are_refused():
    common = {"local_rank": 0, "num_gpus": 8, "gpu": "GPU-1"}  # as where a launcher sets RANK only
    shared = [Survey(**{**vars(found), **common}) for found in ranks("a", "a")]
    with pytest.raises(UserError, match="device: ranks 0, 1 on a would share a GPU, as LOCAL_RANK is 0 and 0"):
        choose(shared)


def test_ranks_that_want_different_devices_are_refused():
    first, second, third = ranks("a", "b", "c")
    third = Survey(**{**vars(third), "wanted": "cpu"})
    with pytest.raises(UserError, match="all ranks, and is auto on rank 0 on a, rank 1 on b; cpu on rank 2 on c"):
        choose([first, second, third])


def test_ranks_are_named_by_host_and_not_one_by_one():
    hosts = ["a"] * 8 + ["b"]
    assert places(ranks(*hosts)) == "ranks 0-7 on a, rank 8 on b"
    assert places([found for found in ranks(*hosts) if found.rank in (0, 2, 3, 4, 7)]) == "ranks 0, 2-4, 7 on a"
    many = places(ranks(*(f"n{index}" for index in range(12))))
    assert many.endswith("rank 7 on n7, and those of 4 more hosts")


@pytest.fixture
def signs(monkeypatch, tmp_path) -> tuple[Path, Path]:
    """Where the driver would leave signs of a GPU; no file is there."""
    paths = (tmp_path / "nvidiactl", tmp_path / "version")
    monkeypatch.setattr("megatron_psft.distributed.environment._GPU_SIGNS", paths)
    return paths


@pytest.mark.parametrize(
    ("environment", "sign"),
    [
        ({}, None),
        ({"SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE is 8"),
        ({"SLURM_GPUS_ON_NODE": "0"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES is 0,1"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f"}, "CUDA_VISIBLE_DEVICES is GPU-8f"),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "4"}, "SLURM_GPUS_ON_NODE is 4"),
    ],
)
def test_the_environment_tells_of_a_gpu(signs, environment, sign):
    found = unusable_gpu(environment)
    assert found is None if sign is None else found.startswith(f"{sign}, but "), found


def test_the_driver_tells_of_a_gpu_unless_it_is_hidden_on_purpose(signs):
    assert not has_hidden_gpu({"CUDA_VISIBLE_DEVICES": ""})
    for path in signs:
        path.touch()
        found = unusable_gpu({})
        assert found is not None
        assert found.startswith(f"{path} exists, but ")
        assert unusable_gpu({"CUDA_VISIBLE_DEVICES": ""}) is None
        assert has_hidden_gpu({"CUDA_VISIBLE_DEVICES": ""})
        assert not has_hidden_gpu({})
        path.unlink()


def _fail(message: str):
    def init() -> None:
        raise RuntimeError(message)

    return init


def test_the_likely_cause_is_named_with_torchs_own_words(signs, monkeypatch):
    signs[0].touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA: install a build for this driver" in unusable_gpu({})
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", _fail(OLD_DRIVER + "\nmore"))
    assert f"built for CUDA 12.8, cannot use it ({OLD_DRIVER}): see what nvidia-smi says" in unusable_gpu({})
    hidden = {"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "8"}
    assert "but CUDA_VISIBLE_DEVICES hides the GPUs: unset it" in unusable_gpu(hidden)


def test_where_the_cpu_is_wanted_no_gpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", _fail("asked"))
    found = survey("cpu", 3, 1)
    assert (found.rank, found.local_rank, found.wanted, found.num_gpus, found.trouble) == (3, 1, "cpu", 0, None)


def test_cuda_without_any_sign_of_a_gpu_still_has_a_reason(signs, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert survey("auto", 0, 0).trouble is None
    assert "is built without CUDA" in survey("cuda", 0, 0).trouble


def test_a_gpu_is_tried(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    tried = []

    def ones(*_size: int, device: str) -> torch.Tensor:
        tried.append(device)
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch, "ones", ones)
    found = survey("auto", 1, 1)
    assert tried == ["cuda:1"]
    assert (found.num_gpus, found.has_gpu) == (2, False)
    assert found.trouble == "cuda:1 does not work: CUDA error: uncorrectable ECC error encountered"
    assert survey("auto", 2, 2) == Survey(rank=2, host=found.host, local_rank=2, wanted="auto", num_gpus=2)


def test_the_flag_takes_three_values():
    flags = ["--load-hf", "m", "--data", "d", "--save", "s", "--train-iters", "1"]
    assert parse_config(flags).precision.device == "auto"
    assert parse_config([*flags, "--device", "cpu"]).precision.device == "cpu"
    with pytest.raises(UserError, match=r"device \(gpu\)|device.*gpu"):
        parse_config([*flags, "--device", "gpu"])


@pytest.fixture(scope="module")
def argv(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    return [*tiny.run_flags(folder), "--save", str(folder / "run"), "--train-iters", "1"]


def _run_beside_a_gpu(argv: list[str], gpu_rank: int) -> tuple[Exit, float]:
    """A run in which one rank pretends to have a GPU."""
    looked = device_choice.survey

    def pretend(wanted: str, rank: int, local_rank: int) -> Survey:
        found = looked(wanted, rank, local_rank)
        return Survey(**{**vars(found), "host": "with", "num_gpus": 8}) if rank == gpu_rank else found

    device_choice.survey = pretend
    started = time.monotonic()
    try:
        return run_cli(argv), time.monotonic() - started
    finally:
        device_choice.survey = looked


@pytest.mark.parametrize("gpu_rank", [0, 1])
def test_a_rank_without_a_gpu_ends_all_at_once_with_one_error(pool, argv, gpu_rank):
    results = pool.run(_run_beside_a_gpu, 2, argv, gpu_rank)
    assert [exit.code for exit, _ in results] == [4, 4]
    errors = [line for exit, _ in results for line in exit.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: device: rank {1 - gpu_rank} on {os.uname().nodename} have no working GPU, ")
    assert max(seconds for _, seconds in results) < 20  # and not the half hour of a collective


def _run_with(argv: list[str], flags: dict[int, list[str]], environment: dict[str, str]) -> Exit:
    os.environ.update(environment)
    torch.cuda.is_available = lambda: False  # the workers are the CPU's anyway
    return run_cli([*argv, *flags.get(int(os.environ["RANK"]), [])])


@pytest.mark.parametrize("mistaken", [0, 1])
def test_a_mistake_of_one_rank_alone_ends_all(pool, argv, mistaken):
    """As where a node has another version of the YAML file."""
    exits = pool.run(_run_with, 2, argv, {mistaken: ["--lr", "fast"]}, {})
    assert [exit.code for exit in exits] == [2, 2]
    assert exits[0].err.startswith("error: lr ('fast') must be")
    assert "error: " not in exits[1].err


def test_ranks_with_different_flags_for_the_device_end_all(pool, argv):
    exits = pool.run(_run_with, 2, argv, {1: ["--device", "cpu"]}, {})
    assert [exit.code for exit in exits] == [2, 2]
    assert exits[0].err.startswith("error: device must be the same on all ranks, and is auto on rank 0 on ")


@pytest.mark.parametrize("environment", [{"CUDA_VISIBLE_DEVICES": "0"}, {"SLURM_GPUS_ON_NODE": "2"}], ids=str)
def test_a_run_where_a_gpu_is_meant_is_refused_and_cpu_is_the_way_on(pool, argv, environment):
    exits = pool.run(_run_with, 2, argv, {}, environment)
    assert [exit.code for exit in exits] == [2, 2]
    assert exits[0].err.startswith(
        "error: device (auto) does not take the CPU where there is a sign of a GPU; ranks 0, 1 "
    )
    assert exits[0].err.endswith("or compute on the CPU by --device cpu\n")
    cpu = ["--device", "cpu"]
    exits = pool.run(_run_with, 2, argv, {0: cpu, 1: cpu}, environment)
    assert [exit.code for exit in exits] == [0, 0], exits[0].err


_BESIDE_A_GPU = """
import sys, torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 2  # as where CUDA has been asked before
from megatron_psft.cli.train import main
code = main(sys.argv[1:])
print(code, torch.cuda.is_available())
"""


@pytest.mark.slow
def test_the_cpu_of_a_machine_with_a_gpu_trains(argv, tmp_path):
    command = [sys.executable, "-c", _BESIDE_A_GPU, *argv, "--save", str(tmp_path / "run"), "--device", "cpu"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
    assert "CPU, 1 thread; gloo collectives; portable PyTorch layers" in done.stderr
