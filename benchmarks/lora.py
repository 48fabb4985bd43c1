"""Peak memory and time of SFT steps of adapters, beside those of the whole model, the plan, and TRL with peft.

Model, records, labels and batch are those of `vs_trl.py`, in other sizes. Each trains in processes of its own; the
first step warms up and its time does not count. Memory is the growth of the peak resident set since before there was a
model.
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import vs_trl
from common import (
    GIB,
    FailedError,
    Meter,
    emit,
    emit_machine,
    give_memory_back_at_once,
    in_fresh_process,
    parse_size,
)
from vs_trl import argv_of, prepare, trl_trainer

SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "hidden_size": 768,
        "num_layers": 8,
        "vocab_size": 8192,
        "records": 6,
        "seq_length": 1024,
        "steps": 3,
        "bf16": False,
        "rank": 16,
    },
    "tiny": {**vs_trl.SIZES["tiny"], "rank": 4},
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def train_ours(spec: dict[str, Any]) -> dict[str, Any]:
    """Steps of adapters of `rank`, or of the whole model for 0."""
    from megatron_psft.config.schema import parse_config
    from megatron_psft.diagnostics.plan import Plan
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import process_group
    from megatron_psft.train.assemble import build_run
    from megatron_psft.train.inputs import read_inputs
    from megatron_psft.train.loop import train_step

    argv = [*argv_of(spec), "--global-batch-size", spec["packs"]]
    argv += ["--lora-rank", spec["rank"], "--lora-alpha", 2 * spec["rank"]] if spec["rank"] else []
    config, place = parse_config([str(value) for value in argv]), detect(0)
    with process_group(place, 1):
        inputs = read_inputs(config, is_main=False)
        with _Measured(spec) as found:
            run = build_run(config, inputs, place)
            for step in range(spec["steps"] + 1):
                found.add(train_step(run, step)["nll"])
    planned = Plan(config=config, shape=inputs.source.shape, world_size=1, platform=place).peak
    return {**found.values(), "planned_gib": planned.total / GIB, "moment": planned.moment}


def trl_packs(spec: dict[str, Any]) -> int:
    return len(trl_trainer(spec, gradient_accumulation_steps=1).train_dataset)


def train_trl(spec: dict[str, Any]) -> dict[str, Any]:
    import trl  # noqa: F401 (it has memory of its own)
    from peft import LoraConfig
    from transformers import TrainerCallback

    rank = spec["rank"]
    adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), task_type="CAUSAL_LM")

    class Steps(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                found.add(logs["loss"])

    with _Measured(spec) as found:
        options = {"peft_config": adapters, "callbacks": [Steps()]}
        trl_trainer(spec, gradient_accumulation_steps=spec["trl_packs"], **options).train()
    return found.values()


class _Measured:
    """The highest resident set of a block beyond what was there before it, where `spec` says that memory is measured,
    and else the seconds of its steps."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._of_memory = spec["measures"] == "memory"
        self._losses: list[float] = []
        self._marks: list[float] = []
        self._meter = Meter()
        if self._of_memory:
            give_memory_back_at_once()

    def __enter__(self) -> "_Measured":
        self._meter.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._meter.__exit__(*error)

    def add(self, loss: float) -> None:
        """A step is done."""
        self._losses.append(loss)
        self._marks.append(time.perf_counter())

    def values(self) -> dict[str, Any]:
        if self._of_memory:
            return {"peak_gib": self._meter.peak_bytes / GIB}
        return {"seconds": (self._marks[-1] - self._marks[0]) / (len(self._marks) - 1), "losses": self._losses}


def measured(function: Callable[[dict[str, Any]], Any], spec: dict[str, Any]) -> dict[str, Any]:
    """Memory and time, each in a process of its own: returning memory at once takes time."""
    of_memory = in_fresh_process(function, spec | {"measures": "memory", "steps": 1})
    return of_memory | in_fresh_process(function, spec | {"measures": "time"})


def main() -> None:
    size = parse_size(__doc__, tuple(SIZES))
    emit_machine()
    with tempfile.TemporaryDirectory() as temporary:
        spec = {**SIZES[size], "folder": temporary}
        spec |= in_fresh_process(prepare, spec)
        details = {**SIZES[size], "packs": spec["packs"]}
        whole, adapters = (measured(train_ours, spec | {"rank": rank}) for rank in (0, spec["rank"]))
        for name, found in (("whole_model", whole), ("adapters", adapters)):
            planned = {"planned_gib": round(found["planned_gib"], 4), "moment": found["moment"]}
            emit(f"peak_{name}", found["peak_gib"], "GiB", **planned, **details)
            emit(f"step_seconds_{name}", found["seconds"], "s", losses=found["losses"], **details)
        saved, planned_gib = (whole[field] - adapters[field] for field in ("peak_gib", "planned_gib"))
        emit("saved_over_planned", saved / planned_gib, "memory", saved_gib=round(saved, 4))
        emit("step_seconds_over_whole_model", adapters["seconds"] / whole["seconds"], "adapters / whole model")
        try:
            theirs = measured(train_trl, spec | {"trl_packs": in_fresh_process(trl_packs, spec)})
        except FailedError as error:
            emit("step_seconds_over_trl", None, "ours / TRL", does_not_run=str(error), **details)
            return
        emit("peak_trl", theirs["peak_gib"], "GiB", **details)
        emit("step_seconds_trl", theirs["seconds"], "s", losses=theirs["losses"], **details)
        # Both begin with the model as it is; their A are drawn otherwise.
        gap = abs(adapters["losses"][0] - theirs["losses"][0]) / theirs["losses"][0]
        emit("peak_over_trl", adapters["peak_gib"] / theirs["peak_gib"], "ours / TRL")
        emit("step_seconds_over_trl", adapters["seconds"] / theirs["seconds"], "ours / TRL", first_loss_gap=gap)


if __name__ == "__main__":
    main()
