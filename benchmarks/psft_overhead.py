"""Step time of PSFT over that of SFT, all else equal, with the bound that operations set beside it.

A window of k steps takes a forward-only pass over k - 1 of its batches, and a forward pass is a third of a training
step: 1 + (k - 1) / (3k). Windows of PSFT and as many steps of SFT take turns in one process, on the same batches.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import emit, emit_machine, in_fresh_process, parse_size
from toys import training_run, write_model, write_problems, write_tokenizer

INTERVALS = (4, 8, 16)
SIZES = {
    # The output layer has a sixth of the operations, as in a model of some billion parameters.
    "cpu": {
        "hidden_size": 512,
        "num_layers": 8,
        "vocab_size": 8192,
        "rows": 2,
        "rounds": 1,
        "flags": ["--seq-length", 1024],
    },
    "gpu": {
        "hidden_size": 2048,
        "num_layers": 24,
        "vocab_size": 151_936,
        "rows": 64,
        "rounds": 4,
        "flags": ["--bf16", "--micro-batch-size", 8],
    },
}


def measure(spec: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds per step of both objectives for each interval, over `rounds` windows."""
    from megatron_psft.train.loop import train_step

    with tempfile.TemporaryDirectory() as folder, training_run(_argv(spec, Path(folder))) as run:
        train_step(_with_window(run, interval=1), 0)  # threads, buffers and Adam's state come to life
        seconds = {str(interval): {"sft": 0.0, "psft": 0.0} for interval in INTERVALS}
        for _ in range(spec["rounds"]):
            for interval in INTERVALS:
                # SFT is a window of one step: no pass, and the gradient of SFT.
                for name, window in (("sft", 1), ("psft", interval)):
                    current = _with_window(run, interval=window)
                    started = time.perf_counter()
                    for step in range(interval):
                        train_step(current, step)
                    seconds[str(interval)][name] += (time.perf_counter() - started) / interval / spec["rounds"]
    return seconds


def _argv(spec: dict[str, Any], folder: Path) -> list[Any]:
    model = write_model(
        folder / "model",
        hidden_size=spec["hidden_size"],
        num_layers=spec["num_layers"],
        vocab_size=spec["vocab_size"],
    )
    argv = ["--load-hf", model, "--tokenizer", write_tokenizer(folder / "tokenizer"), "--save", folder / "run"]
    argv += ["--data", write_problems(folder / "problems.jsonl", 16 * spec["rows"]), "--no-shuffle", "--lr", 1e-4]
    return [
        *argv,
        "--train-iters",
        1000,
        "--global-batch-size",
        spec["rows"],
        "--lr-decay-style",
        "constant",
        *spec["flags"],
    ]


def _with_window(run: Any, *, interval: int) -> Any:
    from megatron_psft.scoring.old_policy import OldPolicyWindow

    def score(step: int) -> list[Any]:
        return [stats.log_probs for stats in run.pipeline.score_labels(run.loader.micro_batches(step))]

    objective = replace(run.config.objective, old_policy_interval=interval)
    window = OldPolicyWindow(objective, train_iters=10**6, score=score)
    return replace(run, state=replace(run.state, window=window))


if __name__ == "__main__":
    size = parse_size(__doc__)
    emit_machine()
    shape = {name: value for name, value in SIZES[size].items() if name != "flags"}
    for interval, seconds in in_fresh_process(measure, SIZES[size]).items():
        k = int(interval)
        emit(
            f"psft_over_sft_k{k}",
            seconds["psft"] / seconds["sft"],
            "step time",
            bound=round(1 + (k - 1) / (3 * k), 4),
            sft_step_seconds=round(seconds["sft"], 4),
            psft_step_seconds=round(seconds["psft"], 4),
            **shape,
        )
