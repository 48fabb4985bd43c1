"""What this machine has, what a run uses of it, and the first collectives, in a world of one.

Seconds of importing the trainer and of `psft doctor`'s toy step, which compiles kernels. Details hold what doctor says.
"""

import importlib
import os
import signal
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from common import Meter, emit, emit_machine, parse_size

from megatron_psft.diagnostics import doctor
from megatron_psft.distributed.environment import prepare_environment
from megatron_psft.metrics.provenance import versions

REPEATS = 20


def main() -> None:
    parse_size(__doc__)
    emit_machine()
    found = {name: version for name, version in versions().items() if version is not None}
    emit("versions", len(found), "libraries", **found)
    environment = dict(os.environ)
    settings = {setting.name: doctor.describe_setting(setting) for setting in prepare_environment()}
    emit("settings", len(settings), "variables that a run sets", **settings)
    emit("import_seconds", seconds_of(lambda: importlib.import_module("megatron_psft.train.run")), "s", after="torch")
    from megatron_psft.distributed.device import detect

    platform = detect(0)
    machine = doctor.describe_machine(platform)
    emit("devices", torch.cuda.device_count(), "GPUs", **machine)
    time_collectives(platform)
    findings = [*doctor.check_device(environment), *doctor.check_versions(), *doctor.check_apex()]
    bf16 = doctor.check_bf16(platform.is_gpu)
    findings += [*bf16, *doctor.check_environment(platform.is_gpu, environment), *doctor.check_shared_memory()]
    run_toy_step(platform, findings, bf16=platform.is_gpu and bf16[0].level == "ok")


def seconds_of(action: Callable[[], Any]) -> float:
    """How long a call takes, with what it leaves the GPU to do."""
    with Meter() as meter:
        action()
    return meter.seconds


def time_collectives(platform: Any) -> None:
    """Prints the first call of each collective that a run makes, and the median of later ones."""
    from megatron_psft.distributed.grid import process_group
    from megatron_psft.distributed.signals import StopRequested, StopSignals

    def all_reduce() -> None:
        tensor = torch.full((1024,), 3.0, device=platform.device)
        dist.all_reduce(tensor)
        assert tensor.eq(3).all()

    def all_gather_object() -> None:
        found: list[Any] = [None]
        dist.all_gather_object(found, {"rank": 0})
        assert found == [{"rank": 0}]

    with process_group(platform, world_size=1), StopSignals(platform.device) as stop:
        calls = {"all_reduce": all_reduce, "all_gather_object": all_gather_object, "barrier": dist.barrier}
        for name, call in {**calls, "stop_agreement": stop.check}.items():
            first, *later = (seconds_of(call) for _ in range(1 + REPEATS))
            emit(name, statistics.median(later), "s", first=round(first, 5), backend=platform.backend)
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            stop.check()
            emit("stop_after_sigterm", None, "s", does_not_run="SIGTERM was not noticed")
        except StopRequested as request:
            emit("stop_after_sigterm", request.signum, "signal")


def run_toy_step(platform: Any, findings: list[doctor.Finding], *, bf16: bool) -> None:
    """Prints what is at work in a step, how long it takes, and whatever doctor has to say."""
    from megatron_psft.train.toy_step import toy_step

    made_with: dict[str, str] = {}
    failures: list[doctor.Finding] = []

    def step() -> None:
        found, new = doctor.attempt("an optimizer step of a toy model", lambda: toy_step(platform, bf16=bf16))
        made_with.update(found or {})
        failures.extend(new)

    seconds = seconds_of(step)
    if failures:
        emit("toy_step_seconds", None, "s", does_not_run=failures[0].text)
    else:
        choices = {choice.what: choice.chosen for choice in doctor.what_is_used(platform, made_with)}
        emit("toy_step_seconds", seconds, "s", **choices)
    by_level = {
        level: [one.text for one in findings + failures if one.level == level] for level in ("problem", "warning")
    }
    emit("problems", len(by_level["problem"]), "", texts=by_level["problem"], warnings=by_level["warning"])


if __name__ == "__main__":
    main()
