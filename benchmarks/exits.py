"""How soon a run of the command line ends, with which exit code, and what it says: after an error of its only rank that
leaves an asynchronous collective behind, out of memory, and at SIGTERM.

The runs go side by side, each a process of its own. Faults are planted in a step by replacing `train_step`.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from common import GIB, ROOT, emit, emit_machine, importing, last_error, parse_size, reporting
from toys import write_problems, write_tokenizer

from megatron_psft.checkpoint.folders import step_folders
from megatron_psft.distributed.environment import prepare_environment
from megatron_psft.metrics.run_log import METRICS_FILE

EXPECTED = {"error": 1, "out of memory": 1, "SIGTERM": 128 + signal.SIGTERM}
"""Exit codes by case."""
_STEP = 2
"""From 0, in which a fault is planted, or after which the signal comes."""
_PLANTED = "planted at "
"""Begins the line that says when, by the clock that all processes share."""
_BYTES_THAT_NO_GPU_HAS = 500 * GIB
_SECONDS = {"gpu": 34.0, "cpu": 300.0, "tiny": 300.0}
"""After which a run is killed, by size."""
_SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


def main() -> None:
    size = parse_size(__doc__)
    emit_machine()
    prepare_environment()  # the planted runs import torch before the command line would do it
    # On a CPU an allocation that cannot be may stop the machine instead.
    cases = [case for case in EXPECTED if size == "gpu" or case != "out of memory"]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor() as threads:
        argv = _argv(Path(name))
        deadline = time.monotonic() + _SECONDS[size]
        list(threads.map(lambda case: _measure(case, argv, Path(name) / case.replace(" ", "_"), deadline), cases))


def _argv(folder: Path) -> list[str]:
    from tests.support import tiny

    model = tiny.build_model(folder / "model", "qwen2", vocab_size=512, num_hidden_layers=2, **_SIZES)
    argv = ["--load-hf", model, "--tokenizer", write_tokenizer(folder / "tokenizer")]
    argv += ["--data", write_problems(folder / "problems.jsonl", 64), "--seq-length", 512, "--global-batch-size", 2]
    return [str(value) for value in (*argv, "--train-iters", 10**6)]


def _measure(case: str, argv: Sequence[str], save: Path, deadline: float) -> None:
    with reporting("exit_seconds", "s", case=case):
        argv = [*argv, "--save", str(save), "--data-cache-dir", f"{save}-cache"]
        ended = _end_of(case, argv, save, deadline)
        details = {"exit_code": ended.code, "expected_code": EXPECTED[case], "says": ended.says}
        emit("exit_seconds", ended.seconds, "s", case=case, **details)
        if case == "out of memory":
            emit("says_what_to_change", float("lower it by" in ended.says), "1 if so", case=case)
        if case == "SIGTERM":
            found = [folder.name for folder in step_folders(save)]
            emit("checkpoint_seconds", ended.checkpoint_seconds, "s after SIGTERM", case=case, checkpoints=found)


@dataclass(frozen=True, kw_only=True)
class _End:
    """What became of a process; seconds are from the fault or signal on."""

    code: int
    seconds: float
    checkpoint_seconds: float | None
    says: str
    """Its line that begins with `error:`, or else what `last_error` finds."""


def _end_of(case: str, argv: Sequence[str], save: Path, deadline: float) -> _End:
    """Runs a case to its end, or kills it and raises TimeoutError."""
    call = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        "import exits, sys; exits.live(*sys.argv[1:])",
        case,
        json.dumps(argv),
    ]
    environment = importing(ROOT, ROOT / "benchmarks")
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(call, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            began, sealed = _watch(case, process, save, deadline)
        finally:
            process.kill()
        ended = time.monotonic()
        output.seek(0)
        lines = output.read().strip().splitlines()
    planted = [float(line.removeprefix(_PLANTED)) for line in lines if line.startswith(_PLANTED)]
    began = planted[0] if planted else began
    says = next((line for line in lines if line.startswith("error:")), last_error(lines))
    if began is None:
        raise RuntimeError(f"ended before the fault, with code {process.returncode}: {says}")
    checkpoint_seconds = None if sealed is None else sealed - began
    return _End(code=process.returncode, seconds=ended - began, checkpoint_seconds=checkpoint_seconds, says=says[:700])


def _watch(
    case: str, process: "subprocess.Popen[bytes]", save: Path, deadline: float
) -> tuple[float | None, float | None]:
    """Waits for the end, and of a run that is to be ended sends the signal. Returns when it was sent, and when a
    checkpoint was there."""
    sent = sealed = None
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise TimeoutError("killed, as it was at work when time was up" + (", after the signal" if sent else ""))
        if case == "SIGTERM" and sent is None and _completed_steps(save) > _STEP:
            sent = time.monotonic()
            process.send_signal(signal.SIGTERM)
        if sealed is None and step_folders(save):
            sealed = time.monotonic()
        time.sleep(0.005)
    return sent, sealed


def _completed_steps(save: Path) -> int:
    path = save / METRICS_FILE
    return path.read_bytes().count(b"\n") if path.exists() else 0


def live(case: str, argv: str) -> NoReturn:
    """The life of a process that trains, with the fault of its case."""
    from megatron_psft.cli.train import main as train
    from megatron_psft.train import loop

    faults = {"error": _leave_a_collective, "out of memory": _ask_for_too_much}
    train_step = loop.train_step

    def step(run: Any, number: int, **hooks: Any) -> dict[str, float]:
        if number == _STEP and case in faults:
            print(f"{_PLANTED}{time.monotonic()}", flush=True)
            faults[case](run.parallel.device)
        return train_step(run, number, **hooks)

    loop.train_step = step
    sys.exit(train(json.loads(argv)))


def _leave_a_collective(device: torch.device) -> None:
    torch.distributed.all_reduce(torch.ones(2**24, device=device), async_op=True)
    raise RuntimeError("planted, with a collective on its way")


def _ask_for_too_much(device: torch.device) -> None:
    torch.empty(_BYTES_THAT_NO_GPU_HAS, dtype=torch.uint8, device=device)
    raise AssertionError("the memory was there")


if __name__ == "__main__":
    main()
