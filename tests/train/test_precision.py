"""The number format where `bf16` is unset: the device's, or that of the run that goes on."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from megatron_psft import sealed
from megatron_psft.distributed.device import Platform
from megatron_psft.distributed.grid import process_group
from megatron_psft.errors import UserError
from megatron_psft.train.precision import settle_precision
from tests.support.configs import parse
from tests.support.runs import inputs, metrics_of, train

__all__ = ["inputs"]  # the fixture

CPU = Platform(device=torch.device("cpu"), backend="gloo", has_transformer_engine=False)
GPU = Platform(device=torch.device("cuda"), backend="nccl", has_transformer_engine=False)


@pytest.fixture(autouse=True)
def _alone():
    with process_group(CPU, 1):
        yield


def checkpoint(folder: Path, step: int, bf16: bool | None) -> Path:
    """One that has nothing in it; `psft convert` records no bf16 in its own, of step 0."""
    target = folder / f"step_{step:07d}"
    sealed.begin(target)
    sealed.seal(target, {"version": 2, "step": step, "identity": {} if bf16 is None else {"bf16": bf16}})
    return target


@pytest.mark.parametrize(
    ("flags", "platform", "expected", "said"),
    [
        ("", GPU, True, "precision: bf16 with fp32 master weights (--bf16 true), the default on GPUs"),
        ("", CPU, False, "precision: fp32 (--bf16 false), the default on the CPU"),
        ("--bf16 false", GPU, False, "precision: fp32 (--bf16 false)"),
        ("--bf16 true", CPU, True, "precision: bf16 with fp32 master weights (--bf16 true)"),
        ("--fp8-format hybrid", GPU, True, "precision: fp8 (hybrid, tensorwise) and bf16 with fp32 master weights"),
    ],
)
def test_a_new_run_computes_as_its_device_does_unless_told(caplog, tmp_path, flags, platform, expected, said):
    caplog.set_level(logging.INFO)
    config = settle_precision(parse("--save", str(tmp_path), *flags.split()), platform)
    assert config.precision.bf16 is expected
    (line,) = caplog.messages
    assert line.startswith(said)
    assert ("default" in line) == (flags == "" or "fp8" in flags)


@pytest.mark.parametrize("platform", [CPU, GPU], ids=["on the CPU", "on a GPU"])
@pytest.mark.parametrize("named_by", ["--save", "--load", "--load of a step"])
def test_a_run_that_goes_on_keeps_its_own(caplog, tmp_path, platform, named_by):
    """As one of an earlier release, which recorded the false that was the default on GPUs as well."""
    caplog.set_level(logging.INFO)
    had = not platform.is_gpu
    checkpoint(tmp_path / "run", 2, not had)
    newest = checkpoint(tmp_path / "run", 4, had)
    damaged = checkpoint(tmp_path / "run", 6, not had)
    (damaged / sealed.MARKER).write_text("{")
    folder = newest if named_by == "--load of a step" else tmp_path / "run"
    config = settle_precision(parse(named_by.split()[0], str(folder)), platform)
    assert config.precision.bf16 is had
    assert f"as before, in {newest}" in caplog.text


def test_weights_alone_decide_nothing(tmp_path):
    """`psft convert` wrote them, or `--init-from` takes them from a run in another format."""
    checkpoint(tmp_path / "converted", 0, None)
    checkpoint(tmp_path / "run", 4, False)
    for flag, name in (("--load", "converted"), ("--init-from", "run")):
        config = parse("--save", str(tmp_path / "new"), flag, str(tmp_path / name))
        assert settle_precision(config, GPU).precision.bf16 is True


@pytest.mark.parametrize("flags", ["--fp8-format hybrid", "--optimizer-cpu-offload --use-distributed-optimizer"])
def test_what_needs_bf16_is_refused_where_the_device_has_none(tmp_path, flags):
    config = parse("--save", str(tmp_path), *flags.split())
    assert settle_precision(config, GPU).precision.bf16 is True
    with pytest.raises(UserError, match="needs bf16"):
        settle_precision(config, CPU)


@pytest.mark.slow
def test_a_run_of_an_earlier_release_goes_on_and_records_say_what_was_used(pool, tmp_path, inputs):
    """Its checkpoint and config.yaml have `bf16: false`, which was the default."""
    flags = ("--train-iters", "3", "--save-interval", "2")
    said = train(pool, 1, inputs.argv(tmp_path / "run", *flags))
    assert "precision: fp32 (--bf16 false), the default on the CPU" in said
    whole = metrics_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step_0000003")
    said = train(pool, 1, inputs.argv(tmp_path / "run", *flags))
    assert "resumed from" in said
    assert "changed since" not in said
    assert metrics_of(tmp_path / "run") == whole
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert [start["settings"]["bf16"] for start in starts] == [False, False]
    assert "\nbf16: false\n" in (tmp_path / "run" / "config.yaml").read_text()
