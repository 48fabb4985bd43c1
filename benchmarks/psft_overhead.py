"""Step time of PSFT over that of SFT, all else equal, beside what is expected of operations alone.

A window of k steps takes a forward-only pass over k - 1 of its batches, and a forward pass is a third of a training
step: 1 + (k - 1) / (3k). Windows of PSFT and as many steps of SFT take turns in one process, on the same batches; the
figure is the median of the rounds, with the range of all.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import emit, emit_machine, in_fresh_process, parse_size
from toys import training_run, with_objective, write_model, write_problems, write_tokenizer

SIZES: dict[str, dict[str, Any]] = {
    # The output layer has a seventh of the operations, as in a model of some billion parameters.
    "cpu": {
        "hidden_size": 256,
        "num_layers": 8,
        "vocab_size": 4096,
        "rows": 1,
        "rounds": 3,
        "intervals": (4, 8, 16),
        "flags": ["--seq-length", 1024],
    },
    "gpu": {
        "hidden_size": 2048,
        "num_layers": 24,
        "vocab_size": 151_936,
        "rows": 64,
        "rounds": 4,
        "intervals": (4, 8, 16),
        "flags": ["--bf16", "--micro-batch-size", 8],
    },
    "tiny": {
        "hidden_size": 64,
        "num_layers": 1,
        "vocab_size": 512,
        "rows": 2,
        "rounds": 2,
        "intervals": (2,),
        "flags": ["--seq-length", 512],
    },
}


def measure(spec: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Seconds per step of both objectives for each interval, of each round."""
    from megatron_psft.train.loop import train_step

    with tempfile.TemporaryDirectory() as folder, training_run(_argv(spec, Path(folder))) as run:
        train_step(with_objective(run, "psft"), 0)  # threads, buffers and Adam's state come to life
        seconds: dict[str, dict[str, list[float]]] = {str(k): {"sft": [], "psft": []} for k in spec["intervals"]}
        for _ in range(spec["rounds"]):
            for interval in spec["intervals"]:
                # SFT is a window of one step: no pass, and the gradient of SFT.
                for name, window in (("sft", 1), ("psft", interval)):
                    current = with_objective(run, "psft", interval=window)
                    started = time.perf_counter()
                    for step in range(interval):
                        train_step(current, step)
                    seconds[str(interval)][name].append((time.perf_counter() - started) / interval)
    return seconds


def _argv(spec: dict[str, Any], folder: Path) -> list[Any]:
    model = write_model(
        folder / "model",
        hidden_size=spec["hidden_size"],
        num_layers=spec["num_layers"],
        vocab_size=spec["vocab_size"],
    )
    argv = ["--load-hf", model, "--tokenizer", write_tokenizer(folder / "tokenizer"), "--save", folder / "run"]
    argv += ["--data", write_problems(folder / "problems.jsonl", 32 * spec["rows"]), "--no-shuffle", "--lr", 1e-4]
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


if __name__ == "__main__":
    size = parse_size(__doc__)
    emit_machine()
    shape = {name: value for name, value in SIZES[size].items() if name not in ("flags", "intervals")}
    for interval, seconds in in_fresh_process(measure, SIZES[size]).items():
        k = int(interval)
        ratios = sorted(psft / sft for psft, sft in zip(seconds["psft"], seconds["sft"], strict=True))
        emit(
            f"psft_over_sft_k{k}",
            statistics.median(ratios),
            "step time",
            interval=k,
            range=[round(ratios[0], 4), round(ratios[-1], 4)],
            expected=round(1 + (k - 1) / (3 * k), 4),
            sft_step_seconds=round(statistics.median(seconds["sft"]), 4),
            psft_step_seconds=round(statistics.median(seconds["psft"]), 4),
            **shape,
        )
