"""Trains and measures in a worker process: the trainer's own command line, called where it is already imported."""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import chains
from digits import Files, read_records
from plan import Job

Results = list[dict[str, Any]]

LONGEST_REPLY = {"target": 72, "general": 32}
"""Tokens; the longest right one has 60 and 7."""


def start() -> None:
    """Prepares a worker: Ctrl-C reaches it too, but it is the driver that decides; only the trainer listens."""
    from megatron_psft.data.tokenizing import end_with_parent

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def run(job: Job) -> list[dict[str, Any]]:
    """Trains to each length and measures there."""
    return once(job.folder / job.name, lambda: _train_and_measure(job))


def once(folder: Path, work: Callable[[], Results]) -> Results:
    """What `work` measures in `folder`, or what an earlier call did that finished there; output goes to log.txt."""
    finished = folder / "results.json"
    if finished.is_file():
        return json.loads(finished.read_text(encoding="utf-8"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with output_to(folder / "log.txt"):
        results = work()
    partial = finished.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1), encoding="utf-8")
    partial.rename(finished)
    return results


def _train_and_measure(job: Job) -> Results:
    results = []
    for length in job.lengths:
        train(job.command(length))
        results.append(_measure(job, length))
    for length in job.lengths:
        remove_checkpoints(job.save(length))
    return results


def remove_checkpoints(folder: Path) -> None:
    """Of a run's own folder; its metrics stay."""
    for checkpoint in folder.glob("step_*"):
        shutil.rmtree(checkpoint)


def train(command: Sequence[str]) -> None:
    """`psft train COMMAND` in this process.

    Raises:
        RuntimeError: it did not end well; the log says why.
    """
    from megatron_psft.cli.train import main

    if code := main(command):
        raise RuntimeError(f"psft train ended with code {code}: {' '.join(command)}")


def accuracies(model: Path, tokenizer: Path, files: Files, questions: int) -> dict[str, float]:
    """Per cent of the first held-out questions of each kind that the model answers rightly, decoding greedily."""
    import compare

    found = {}
    for kind, path in {"target": files.target_held_out, "general": files.base_held_out}.items():
        records = read_records(path)[:questions]
        asked = [chains.question(record) for record in records]
        replies = compare.generate(model, asked, tokenizer_folder=tokenizer, max_new_tokens=LONGEST_REPLY[kind])
        rights = [chains.right_answer(record) for record in records]
        found[kind] = 100 * mean(chains.answer(reply) == right for reply, right in zip(replies, rights, strict=True))
    return found


def _measure(job: Job, length: int) -> dict[str, Any]:
    import compare

    name = "base" if job.method is None else job.method.name
    values = {"method": name, "lr": job.lr, "seed": job.seed, "step": length}
    values |= accuracies(job.hf(length), job.folder / "tokenizer", job.files, job.questions)
    if job.method is not None:
        columns = compare.metrics(job.save(length))
        if job.method.clips:
            values["clip_fraction"] = mean(columns["clip_fraction"])
        values |= {value: columns[value][-1] for value in ("valid_entropy", "valid_nll")}
    return values


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Sends all that this process prints to a file, also what loggers and C++ code print."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(stream, os.dup(stream)) for stream in (1, 2)]
    with path.open("a", encoding="utf-8") as file:
        for stream, _ in kept:
            os.dup2(file.fileno(), stream)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, old in kept:
                os.dup2(old, stream)
                os.close(old)
