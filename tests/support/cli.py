"""Runs the command line: inside a pool worker, or for real under torchrun."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Exit:
    """How a command ended on one rank: its exit code and what it printed."""

    code: int
    out: str
    err: str


def importing(folder: Path) -> dict[str, str]:
    """The environment of a process that imports first what lies in `folder`."""
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}"}


def run_cli(argv: Sequence[str]) -> Exit:
    """What `psft train ARGV` does on this rank; for `pool.run`, whose workers outlive a rank that fails alone."""
    from megatron_psft.cli import train
    from megatron_psft.distributed import failure, orphans

    train.end_at_once = failure.end_at_once = _end_the_call
    try:
        return call_main(train.main, argv)
    finally:
        train.end_at_once = failure.end_at_once = orphans.end_at_once


def _end_the_call(code: int) -> None:
    """As the end of the process would, closes the sockets that its peers wait at."""
    import torch.distributed as dist

    if threading.current_thread() is threading.main_thread() and dist.is_initialized():
        dist.destroy_process_group()
    raise SystemExit(code)


def call_main(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> Exit:
    """Calls `main` as a script's last line would; any exception but SystemExit causes one that holds the output."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            with _redirected(1, out), _redirected(2, err):
                code = _exit_code(main, argv)
        except Exception as error:
            raise RuntimeError(f"the command raised; stdout:\n{_text(out)}\nstderr:\n{_text(err)}") from error
        return Exit(code, _text(out), _text(err))


def _exit_code(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    try:
        code = main(argv)
    except SystemExit as request:
        code = request.code
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)  # noqa: T201 (as the interpreter does with `sys.exit("text")`)
    return 1


@contextlib.contextmanager
def _redirected(descriptor: int, file: IO[str]) -> Iterator[None]:
    """Sends the file descriptor to `file`: loggers that hold the old stream and C++ code write there too."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(descriptor)
    os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(saved, descriptor)
        os.close(saved)


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def run_torchrun(
    args: Sequence[str | Path], nproc: int, *, timeout: float = 900, gpu: bool = False
) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node NPROC ARGS` from the root of the repository, where `ARGS` starts with the script.

    GPUs are hidden from it unless `gpu`.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds, when all processes have been killed; holds their output.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*launcher, "--nproc-per-node", str(nproc), *map(str, args)]
    environment = dict(os.environ) if gpu else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            # The ranks have sessions of their own: the launcher's end is not theirs.
            for descendant in [*psutil.Process(process.pid).children(recursive=True), process]:
                descendant.kill()
            error.stdout, error.stderr = process.communicate()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)
