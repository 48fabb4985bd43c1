"""Runs of the command line on all GPUs of this node, each with a folder and a log of its own."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, GLOBAL_BATCH = 6, 8
LIMIT_SECONDS = 900
"""After which a run is given up."""

Steps = list[dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Node:
    """Where runs take place, and what they all have in common."""

    gpus: int
    device: str
    folder: Path
    """Each run has a folder there, with its log."""
    inputs: Sequence[str]
    """Flags of model, tokenizer and data."""
    ended: dict[str, Steps | Exception] = field(default_factory=dict)
    """What came of the runs with which others are compared."""

    def flags(self, *flags: str) -> list[str]:
        common = f"--device {self.device} --seq-length 256 --global-batch-size {GLOBAL_BATCH} --lr 3e-4"
        common += " --lr-decay-style constant --old-policy-interval 2"
        return [*self.inputs, *" ".join([common, *flags]).split(), "--data-cache-dir", f"{self.folder}/cache"]

    def psft(self, *words: str) -> str:
        """What a command prints. Raises RuntimeError where it fails."""
        command = [sys.executable, "-m", "megatron_psft", *words]
        done = subprocess.run(command, cwd=REPOSITORY, env=self._environment(), capture_output=True, check=False)
        text = (done.stdout + done.stderr).decode()
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {_last_line(text)}")
        return text

    def _environment(self) -> dict[str, str]:
        return {"HF_HUB_OFFLINE": "1", **os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {})}

    @contextmanager
    def started(self, name: str, *flags: str) -> Iterator[psutil.Popen]:
        """torchrun with a rank per GPU, of which nothing is left at the end."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command += ["--nproc-per-node", str(self.gpus), "pretrain_psft.py", *self.flags(*flags)]
        environment = {**self._environment(), "PSFT_EXIT_CODE_FILE": f"{folder}/code"}
        with (folder / "log.txt").open("wb") as log:
            process = psutil.Popen(
                [*command, "--save", f"{folder}/run"], cwd=REPOSITORY, env=environment, stdout=log, stderr=log
            )
            try:
                yield process
            finally:
                if process.poll() is None:
                    for it in [*process.children(recursive=True), process]:
                        it.kill()
                process.wait()

    def train(self, name: str, *flags: str, each: Callable[[psutil.Popen], None] = lambda _: None) -> Steps:
        """A whole run, during which `each` is called again and again. Raises RuntimeError where it fails."""
        with self.started(name, f"--train-iters {STEPS}", *flags) as process:
            self.wait(process, until=lambda: bool(each(process)))
        if process.returncode:
            raise self.failure(name, process)
        return self.steps(name)

    def failure(self, name: str, process: psutil.Popen) -> RuntimeError:
        """Why a run has ended."""
        text = (self.folder / name / "log.txt").read_text(errors="replace")
        return RuntimeError(f"exit code {self.left_code(name) or process.returncode}: {_last_line(text)}")

    def wait(self, process: psutil.Popen, until: Callable[[], bool]) -> None:
        """Returns when a run has ended, or when `until` says so. Raises TimeoutError."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while process.poll() is None and not until():
            if time.monotonic() > deadline:
                raise TimeoutError(f"killed after {LIMIT_SECONDS} s")
            time.sleep(0.05)

    def steps(self, name: str) -> Steps:
        """The complete lines of a run's metrics so far."""
        path = self.folder / name / "run" / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
        return [line for line in lines if line["step"] > 0]

    def left_code(self, name: str) -> str | None:
        path = self.folder / name / "code"
        return path.read_text().strip() if path.exists() else None

    def once(self, name: str, flags: str) -> Steps:
        """A run that several checks need; one that has failed fails in all of them."""
        if name not in self.ended:
            try:
                self.ended[name] = self.train(name, flags)
            except Exception as error:
                self.ended[name] = error
            for folder in (self.folder / name / "run").glob("step_*"):
                shutil.rmtree(folder)
        found = self.ended[name]
        if isinstance(found, Exception):
            raise RuntimeError(f"{name}: {found}")
        return found


def _last_line(text: str) -> str:
    """The first `error:` line, or else the last one."""
    lines = text.strip().splitlines() or [""]
    return next((line for line in lines if "error:" in line), lines[-1])
