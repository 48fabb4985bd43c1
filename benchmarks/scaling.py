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
        "tokens": (1024, 2048, 4096, 8192, 16_384),
        "vocab_size": (16_384, 32_768, 65_536, 131_072),
    },
    "gpu": {
        "base": {"tokens": 8192, "hidden": 3584, "vocab_size": 152_064, "dtype": "bfloat16"},
        "tokens": (4096, 8192, 16_384, 32_768, 65_536, 131_072),
        "vocab_size": (32_768, 65_536, 131_072, 262_144),
    },
}
STEP_SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"hidden_size": 256, "num_layers": 4, "vocab_size": 8192, "steps": 3, "flags": []},
    "gpu": {"hidden_size": 2048, "num_layers": 24, "vocab_size": 151_936, "steps": 10, "flags": ["--bf16"]},
}
SEQ_LENGTHS, ROWS, BASE_LENGTH, BASE_ROWS = (128, 256, 512, 1024), (1, 2, 4, 8), 256, 2


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


def _exponent(costs: dict[float, float]) -> float:
    """Slope between the two largest sizes, in logarithms: 1 is linear, 0 is flat."""
    (size, cost), (larger_size, larger_cost) = sorted(costs.items())[-2:]
    return math.log(larger_cost / cost) / math.log(larger_size / size)


def grow_head(size: str) -> None:
    sizes = HEAD_SIZES[size]
    for axis in ("tokens", "vocab_size"):
        seconds, peaks = {}, {}
        for value in sizes[axis]:
            spec = {**sizes["base"], axis: value, "labels_percent": 100, "ranks": 1}
            result = in_fresh_process(head.measure, {**spec, "path": head.OURS, "repeats": 3})
            seconds[value], peaks[value] = result["seconds"], result["peak_bytes"]
            # Hidden states of the label tokens and their gradient, which any head has.
            width = 2 if spec["dtype"] == "bfloat16" else 4
            beyond = result["peak_bytes"] - 2 * width * spec["tokens"] * spec["hidden"]
            emit("head_seconds", result["seconds"], "s", **spec)
            emit("head_peak", result["peak_bytes"] / GIB, "GiB", beyond_hidden_states=round(beyond / GIB, 4), **spec)
        emit(f"head_seconds_exponent_{axis}", _exponent(seconds), "d log seconds / d log size")
        emit(f"head_peak_exponent_{axis}", _exponent(peaks), "d log bytes / d log size")


def grow_step(size: str) -> None:
    for axis, values in (("length", SEQ_LENGTHS), ("rows", ROWS)):
        seconds = {}
        for value in values:
            spec = {**STEP_SIZES[size], "length": BASE_LENGTH, "rows": BASE_ROWS, axis: value}
            result = in_fresh_process(measure_step, spec)
            seconds[result["tokens"]] = result["seconds"]
            emit(
                "step_seconds",
                result["seconds"],
                "s",
                tokens=result["tokens"],
                length=spec["length"],
                rows=spec["rows"],
            )
        emit(f"step_seconds_exponent_{axis}", _exponent(seconds), "d log seconds / d log tokens")


if __name__ == "__main__":
    chosen = parse_size(__doc__)
    emit_machine()
    grow_head(chosen)
    grow_step(chosen)
