"""How cost grows: time and memory of the head with tokens and vocabulary, a training step's time with its batch."""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import head
from common import GIB, emit, emit_machine, in_fresh_process, parse_size
from toys import training_run, write_model, write_texts, write_tokenizer

HEAD_SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "base": {"tokens": 2048, "hidden": 256, "vocab_size": 32_768, "dtype": "float32"},
        "tokens": (2048, 4096, 8192),
        "vocab_size": (32_768, 65_536, 131_072),
    },
    "gpu": {
        "base": {"tokens": 8192, "hidden": 3584, "vocab_size": 152_064, "dtype": "bfloat16"},
        "tokens": (4096, 8192, 16_384, 32_768, 65_536, 131_072),
        "vocab_size": (32_768, 65_536, 131_072, 262_144),
    },
    "tiny": {
        "base": {"tokens": 64, "hidden": 32, "vocab_size": 512, "dtype": "float32"},
        "tokens": (64, 128),
        "vocab_size": (512, 1024),
    },
}
STEP_SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"hidden_size": 256, "num_layers": 4, "vocab_size": 8192, "steps": 3, "flags": []},
    "gpu": {"hidden_size": 2048, "num_layers": 24, "vocab_size": 151_936, "steps": 10, "flags": ["--bf16"]},
    "tiny": {"hidden_size": 64, "num_layers": 1, "vocab_size": 512, "steps": 1, "flags": []},
}
STEP_AXES = {
    "cpu": {"length": (256, 512, 1024), "rows": (2, 4, 8)},
    "gpu": {"length": (128, 256, 512, 1024), "rows": (1, 2, 4, 8)},
    "tiny": {"length": (64, 128), "rows": (2, 4)},
}
BASE_STEP = {"cpu": {"length": 256, "rows": 2}, "gpu": {"length": 256, "rows": 2}, "tiny": {"length": 64, "rows": 2}}


def measure_step(spec: dict[str, Any]) -> dict[str, float]:
    """Seconds and tokens of a training step over `rows` records of about `length` tokens."""
    from megatron_psft.train.loop import train_step

    with tempfile.TemporaryDirectory() as name, training_run(_argv(spec, Path(name))) as run:
        train_step(run, 0)
        started = time.perf_counter()
        tokens = sum(train_step(run, step)["tokens"] for step in range(1, 1 + spec["steps"]))
        return {"seconds": (time.perf_counter() - started) / spec["steps"], "tokens": tokens / spec["steps"]}


def _argv(spec: dict[str, Any], folder: Path) -> list[Any]:
    sizes = {name: spec[name] for name in ("hidden_size", "num_layers", "vocab_size")}
    model, tokenizer = write_model(folder / "model", **sizes), write_tokenizer(folder / "tokenizer")
    data = write_texts(folder / "texts.jsonl", spec["rows"], words=spec["length"])
    argv = [
        "--load-hf",
        model,
        "--tokenizer",
        tokenizer,
        "--save",
        folder / "run",
        "--data",
        data,
        "--objective",
        "sft",
    ]
    return [*argv, "--train-iters", 100, "--global-batch-size", spec["rows"], *spec["flags"]]


def _emit_exponent(name: str, costs: dict[float, float], axis: str, unit: str) -> None:
    """Slope between the two largest sizes, in logarithms: 1 is linear, 0 is flat."""
    (size, cost), (larger_size, larger_cost) = sorted(costs.items())[-2:]
    slope = math.log(larger_cost / cost) / math.log(larger_size / size)
    emit(name, slope, f"d log {unit} / d log size", axis=axis, sizes=[size, larger_size])


def grow_head(size: str) -> None:
    base = {**HEAD_SIZES[size]["base"], "labels_percent": 100, "ranks": 1}
    measured: dict[tuple[int, int], dict[str, float]] = {}
    for axis in ("tokens", "vocab_size"):
        seconds, peaks = {}, {}
        for value in HEAD_SIZES[size][axis]:
            spec = {**base, axis: value}
            key = (spec["tokens"], spec["vocab_size"])
            if key not in measured:  # the base lies on both axes
                measured[key] = in_fresh_process(head.measure, {**spec, "path": head.OURS, "repeats": 2})
                _emit_head(measured[key], spec)
            seconds[value], peaks[value] = measured[key]["seconds"], measured[key]["peak_bytes"]
        _emit_exponent(f"head_seconds_exponent_{axis}", seconds, axis, "seconds")
        _emit_exponent(f"head_peak_exponent_{axis}", peaks, axis, "bytes")


def _emit_head(result: dict[str, float], spec: dict[str, Any]) -> None:
    # Hidden states of the label tokens and their gradient, which any head has.
    width = 2 if spec["dtype"] == "bfloat16" else 4
    beyond = result["peak_bytes"] - 2 * width * spec["tokens"] * spec["hidden"]
    emit("head_seconds", result["seconds"], "s", **spec)
    emit("head_peak", result["peak_bytes"] / GIB, "GiB", beyond_hidden_states=round(beyond / GIB, 4), **spec)


def grow_step(size: str) -> None:
    measured: dict[tuple[int, int], dict[str, float]] = {}
    for axis, values in STEP_AXES[size].items():
        seconds = {}
        for value in values:
            place = {**BASE_STEP[size], axis: value}
            key = (place["length"], place["rows"])
            if key not in measured:
                measured[key] = in_fresh_process(measure_step, {**STEP_SIZES[size], **place})
                emit("step_seconds", measured[key]["seconds"], "s", tokens=measured[key]["tokens"], **place)
            seconds[measured[key]["tokens"]] = measured[key]["seconds"]
        _emit_exponent(f"step_seconds_exponent_{axis}", seconds, axis, "seconds")


if __name__ == "__main__":
    chosen = parse_size(__doc__)
    emit_machine()
    grow_head(chosen)
    grow_step(chosen)
