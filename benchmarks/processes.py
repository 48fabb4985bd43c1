"""Which processes of a run have a GPU open, and how much of its memory each holds."""

import os
import subprocess
from contextlib import suppress
from typing import Any

import psutil
from common import emit, reporting

_DEVICES = "/dev/nvidia"
"""How the paths begin that the driver's library opens; a process without any has no context."""


def emit_open_gpus() -> None:
    """Prints how many processes that this one has started have a GPU open, and which."""
    with reporting("helpers_with_gpu", "processes"):
        helpers = psutil.Process().children(recursive=True)
        found = [{"what": _what(helper), "open": files} for helper in helpers if (files := _open_devices(helper.pid))]
        emit("helpers_with_gpu", len(found), "processes", of=len(helpers), helpers=found)


def _open_devices(pid: int) -> int:
    """Files of the driver's that a process has open."""
    folder, found = f"/proc/{pid}/fd", 0
    with suppress(FileNotFoundError):  # the process has ended
        for name in os.listdir(folder):
            with suppress(FileNotFoundError):  # as of a file that is closed by now
                found += os.readlink(f"{folder}/{name}").startswith(_DEVICES)
    return found


def emit_gpu_memory() -> None:
    """Prints what nvidia-smi says of the processes that hold memory of a GPU, with the names of those of this run."""
    with reporting("gpu_memory_of_helpers", "MiB"):
        call = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        said = subprocess.run(call, capture_output=True, text=True, timeout=20, check=True).stdout
        found = _named(said)
        if not found:
            raise RuntimeError("nvidia-smi names no process, as in a container that sees none of the host's")
        of_helpers = sum(one["mib"] or 0 for one in found if one["what"] not in (_SELF, _STRANGER))
        emit("gpu_memory_of_helpers", of_helpers, "MiB", processes=found)


_SELF, _STRANGER = "this process", "none of this run's"


def _named(said: str) -> list[dict[str, Any]]:
    """Lines of `PID, MIB`; instead of the latter some drivers say `[N/A]`."""
    own = psutil.Process()
    names = {own.pid: _SELF} | {child.pid: _what(child) for child in own.children(recursive=True)}
    lines = (line.split(",") for line in said.splitlines() if line.strip())
    return [
        {"what": names.get(int(pid), _STRANGER), "mib": int(mib) if mib.strip().isdigit() else None}
        for pid, mib in lines
    ]


def _what(process: psutil.Process) -> str:
    """The part of a command line that tells Python's helpers apart."""
    try:
        words = process.cmdline()
    except psutil.NoSuchProcess:
        return "ended"
    return " ".join(words[1:])[:80] or process.name()
