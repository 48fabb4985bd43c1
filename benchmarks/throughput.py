"""Whole training steps of published shapes, random weights: what they reach, need, and spend their time on.

Tokens/s, operations, memory against `psft plan`, SFT against PSFT; of one step the longest kernels, idle time, copies
and waits of the host. On one GPU in bf16; with `--size cpu` a model that two cores can train, in fp32.
"""

import importlib.util
import json
import tempfile
import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import GIB, Clock, FailedError, emit, emit_machine, in_fresh_process, parse_size, reporting
from profiled import counted_waits, profile_of, short_name
from toys import training_run, with_objective, write_texts, write_tokenizer

from megatron_psft.distributed.environment import prepare_environment

QWEN = {"max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {
        **QWEN,
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "1.5B": {
        **QWEN,
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    # As many layers of the 7B model as one GPU of 80 GB holds with Adam's states.
    "7B, 8 of 28 layers": {
        **QWEN,
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 8,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "cpu": {
        **QWEN,
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
_BASE: dict[str, Any] = {"rows": 2, "steps": 4, "window": 4, "flags": ["--bf16"], "looks_inside": False}
_ENGINE = "transformer_engine"
_FP8 = {**_BASE, "shape": "1.5B", "seq_length": 16_384, "needs": _ENGINE}
SIZES: dict[str, list[dict[str, Any]]] = {
    "cpu": [{**_BASE, "shape": "cpu", "seq_length": 512, "flags": [], "looks_inside": True}],
    "tiny": [
        {**_BASE, "shape": "cpu", "seq_length": 64, "flags": [], "steps": 1, "window": 2, "looks_inside": True},
        {**_BASE, "shape": "cpu", "seq_length": 64, "flags": [], "steps": 1, "window": 2, "needs": _ENGINE},
    ],
    "gpu": [  # the most valuable first
        {**_BASE, "shape": "1.5B", "seq_length": 16_384, "window": 8, "looks_inside": True},
        {**_BASE, "shape": "1.5B", "seq_length": 16_384, "flags": ["--bf16", "--lora-rank", 16]},
        *(
            {**_FP8, "flags": ["--bf16", "--fp8-format", "hybrid", "--fp8-recipe", recipe]}
            for recipe in ("tensorwise", "delayed", "blockwise")
        ),
        {**_BASE, "shape": "7B, 8 of 28 layers", "seq_length": 16_384, "steps": 2, "window": 2},
    ],
}
_RECORDS_PER_ROW = 8
_SECONDS, _MOST_SECONDS, _LEAST_SECONDS = 138.0, 90.0, 15.0
"""Of all measurements on a GPU, of one of them, and those without which none is begun."""
_KERNELS, _LINES = 15, 10
"""How many are printed."""


def measure(spec: dict[str, Any]) -> None:
    """Prints the figures of one configuration as they come, each with what it was measured on."""
    about = {name: spec[name] for name in ("shape", "seq_length", "rows")} | {
        "flags": " ".join(map(str, spec["flags"]))
    }
    about["layers"] = "Transformer Engine" if torch.cuda.is_available() and _is_there(_ENGINE) else "portable"
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        argv = command_line(spec, Path(name))
        with training_run(argv, draws_on_device=True) as run:
            emit("build_seconds", time.perf_counter() - started, "s", **about)
            _Measurements(run, spec, about).make_all()


class _Measurements:
    """Figures of a run that is ready to train, whose steps go up."""

    def __init__(self, run: Any, spec: dict[str, Any], about: dict[str, Any]) -> None:
        self._spec, self._about = spec, about
        self._run, self._next_step = run, 0

    def make_all(self) -> None:
        """One that fails is a line, and leaves the others."""
        self._warm_up()
        steps, window = self._spec["steps"], self._spec["window"]
        seconds = {}
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        for name, count in (("sft", steps), ("psft", window)):
            with self._reporting(f"{name}_step_seconds", "s"):
                seconds[name] = self._time(name, count)
        if len(seconds) == 2:
            expected = 1 + (window - 1) / (window * self._passes)
            ratio = seconds["psft"] / seconds["sft"]
            emit("psft_over_sft", ratio, "step time", interval=window, expected=round(expected, 4), **self._about)
        if torch.cuda.is_available():
            with self._reporting("plan_over_measured_peak", "peak memory"):
                self._compare_memory()
        if not self._spec["looks_inside"]:
            return
        with self._reporting("head_share", "of an SFT step"):
            self._time_head()
        # Of PSFT a window of two steps: the first one scores the second.
        for name in ("sft", "psft"):
            with self._reporting("gpu_idle_share", "of a profiled step", objective=name):
                self._profile(name)
            if torch.cuda.is_available():
                with self._reporting("host_waits", "per step", objective=name):
                    self._count_waits(name)

    def _reporting(self, name: str, unit: str, **details: Any) -> AbstractContextManager[None]:
        return reporting(name, unit, **details, **self._about)

    def _warm_up(self) -> None:
        """A window of two steps, with the check of the old policy's pass that comes once."""
        run = with_objective(self._run, "psft", interval=2)
        started = time.perf_counter()
        self._steps(run, 2)
        emit("warm_up_seconds", time.perf_counter() - started, "s", **self._about)

    def _steps(self, run: Any, count: int) -> tuple[float, list[dict[str, float]], float]:
        """Seconds of some steps, their lines of metrics, and operations of their training."""
        from megatron_psft.train.loop import train_step

        steps = range(self._next_step, self._next_step + count)
        self._next_step += count
        started = time.perf_counter()
        lines = [train_step(run, step) for step in steps]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        lengths = [length for step in steps for length in run.loader.lengths(step).tolist()]
        return seconds, lines, self._passes * run.source.forward_flops(lengths)

    @property
    def _passes(self) -> int:
        from megatron_psft.metrics.flops import passes_of_training

        return passes_of_training(has_adapters=self._run.config.lora.has_adapters)

    def _run_of(self, objective: str, interval: int) -> Any:
        """A run whose next step is the first of a window."""
        self._next_step = -(-self._next_step // interval) * interval
        return with_objective(self._run, objective, interval=interval)

    def _time(self, name: str, count: int) -> float:
        """Prints what steps reach, those of PSFT over a whole window with its pass, and returns seconds per step."""
        from megatron_psft.metrics.flops import peak_flops

        total, lines, operations = self._steps(self._run_of(name, count), count)
        seconds, tokens = total / count, sum(line["tokens"] for line in lines)
        label_share = sum(line["label_tokens"] for line in lines) / tokens
        details = {"steps": count, **self._about}
        emit(f"{name}_step_seconds", seconds, "s", each=[round(line["step_seconds"], 4) for line in lines], **details)
        emit(f"{name}_tokens_per_second", tokens / total, "tokens/s", label_share=round(label_share, 3), **details)
        emit(f"{name}_training_tflops", operations / total / 1e12, "TFLOP/s of training, without scoring", **details)
        device = self._run.parallel.device
        peak = peak_flops(device) if device.type == "cuda" else None
        if peak is not None:
            emit(f"{name}_mfu", operations / total / peak, "of peak", peak_tflops=peak / 1e12, **details)
        return seconds

    def _compare_memory(self) -> None:
        from megatron_psft.diagnostics.plan import Plan
        from megatron_psft.distributed.device import detect

        measured = torch.cuda.max_memory_allocated()
        plan = Plan(config=self._run.config, shape=self._run.source.shape, world_size=1, platform=detect(0)).peak
        reserved = torch.cuda.max_memory_reserved()
        emit("peak_memory", measured / GIB, "GiB", reserved_gib=round(reserved / GIB, 2), **self._about)
        emit("planned_peak_memory", plan.total / GIB, "GiB", moment=plan.moment, **self._about)
        emit("plan_over_measured_peak", plan.total / measured, "peak memory", **self._about)

    def _time_head(self) -> None:
        """By events on the stream around every call of the head, in which its gradients are formed too."""
        from megatron_psft.model import end

        head, clocks = end.fused_head, []

        def timed(*args: Any, **kwargs: Any) -> Any:
            clock = Clock()
            output = head(*args, **kwargs)
            clock.stop()
            clocks.append(clock)
            return output

        end.fused_head = timed
        try:
            seconds, *_ = self._steps(self._run_of("sft", 1), 1)
        finally:
            end.fused_head = head
        own = sum(clock.seconds for clock in clocks)
        emit("head_share", own / seconds, "of an SFT step", head_seconds=round(own, 5), **self._about)

    def _profile(self, name: str) -> None:
        run = self._run_of(name, 2)
        found = profile_of(partial(self._steps, run, 1))
        about = {"objective": name, "scored_batches": int(name == "psft"), **self._about}
        span = round(found.span_milliseconds, 2)
        emit("gpu_idle_share", found.idle_share, "of a profiled step", span_milliseconds=span, **about)
        for work in found.kernels[:_KERNELS]:
            emit("kernel", work.milliseconds, "ms per step", kernel=short_name(work.name), count=work.count, **about)
        rest = sum(work.milliseconds for work in found.kernels[_KERNELS:])
        emit("other_kernels", rest, "ms per step", kinds=len(found.kernels[_KERNELS:]), **about)
        for work in found.copies:
            sizes = {"count": work.count, "bytes": work.num_bytes}
            emit("copy", work.milliseconds, "ms per step", kind=work.name, **sizes, **about)

    def _count_waits(self, name: str) -> None:
        run = self._run_of(name, 2)
        with counted_waits() as waits:
            self._steps(run, 1)
        lines = dict(waits.most_common(_LINES))
        emit("host_waits", waits.total(), "per step", objective=name, lines=lines, **self._about)


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def command_line(spec: dict[str, Any], folder: Path) -> list[Any]:
    """Of a run of a spec's `shape`, `seq_length`, `rows` and `flags`, whose files are written to the folder."""
    (folder / "model").mkdir()
    config = {"model_type": "qwen2", "hidden_act": "silu", "torch_dtype": "bfloat16", **SHAPES[spec["shape"]]}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    argv = ["--load-hf", folder / "model", "--random-init", "--tokenizer", write_tokenizer(folder / "tokenizer")]
    # A little shorter than an even share, as lengths differ.
    words, count = int(0.95 * spec["seq_length"] / _RECORDS_PER_ROW), 8 * _RECORDS_PER_ROW * spec["rows"]
    data = write_texts(folder / "texts.jsonl", count, words=words)
    argv += ["--data", data, "--data-cache-dir", folder / "cache", "--save", folder / "run", "--train-iters", 1000]
    return [*argv, "--seq-length", spec["seq_length"], "--global-batch-size", spec["rows"], *spec["flags"]]


def main() -> None:
    size = parse_size(__doc__)
    emit_machine()
    if size == "gpu":
        prepare_environment()  # as the command line's own processes have it
    started = time.perf_counter()
    for spec in SIZES[size]:
        left = _SECONDS - (time.perf_counter() - started) if size == "gpu" else None
        about = {name: spec[name] for name in ("shape", "seq_length", "rows")}
        about["flags"] = " ".join(map(str, spec["flags"]))
        needed = spec.get("needs")
        try:
            if needed is not None and not _is_there(needed):
                raise FailedError(f"{needed} is not installed")
            if left is not None and left < _LEAST_SECONDS:
                raise FailedError("no time was left")
            in_fresh_process(measure, spec, seconds=None if left is None else min(left, _MOST_SECONDS))
        except FailedError as error:
            emit("sft_step_seconds", None, "s", does_not_run=str(error), **about)


if __name__ == "__main__":
    main()
