"""Whether the nodes have room in host memory for what ranks are about to keep there, in containers and jobs, too."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch.distributed as dist

from megatron_psft.distributed.collective import on_every_rank
from megatron_psft.distributed.grid import Parallel
from megatron_psft.errors import UserError

_OF_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_OF_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
_ROOT = Path("/")


def require_host_memory(needed_bytes: float, *, purpose: str, remedy: str, parallel: Parallel) -> None:
    """Compares what the ranks of each node are about to take with what the node has left; collective.

    Args:
        needed_bytes: of this rank.
        purpose: how an error begins, which goes on with how much that is.
        remedy: how it ends.
        parallel: this rank's place.

    Raises:
        UserError: on every rank, where a node has less memory left.
    """
    host = socket.gethostname()
    needs: list[tuple[str, float]] = [("", 0.0)] * parallel.world_size
    dist.all_gather_object(needs, (host, needed_bytes))
    needed = sum(size for node, size in needs if node == host) / 2**30

    def check() -> None:
        available = available_bytes() / 2**30
        if needed > available:
            raise UserError(
                f"{purpose} {needed:.3g} GiB of host memory on {host}, which has {available:.3g} GiB left; {remedy}"
            )

    on_every_rank(check)


def available_bytes(root: Path = _ROOT) -> int:
    """What this process may still take of the host's memory, by what is free and by the limits of its control groups:
    those of a container, a Slurm job or a Kubernetes pod. Of several processes in one group each has all that is left.

    Args:
        root: of the file system that has /proc and /sys.
    """
    left = (group.limit - group.usage + group.reclaimable for group in _limited_groups(root))
    return min([psutil.virtual_memory().available, *left])


def limit_bytes(root: Path = _ROOT) -> int | None:
    """What this process and the others of its narrowest control group may take together; None where that is all that
    the host has."""
    limit = min((group.limit for group in _limited_groups(root)), default=None)
    return None if limit is None or limit >= psutil.virtual_memory().total else limit


class _Group(NamedTuple):
    """A control group that has a limit; bytes."""

    limit: int
    usage: int
    reclaimable: int
    """Of the usage: cached files that are given up when memory is asked for."""


def _limited_groups(root: Path) -> Iterator[_Group]:
    """Those that this process is in."""
    memberships = root / "proc/self/cgroup"
    for line in memberships.read_text().splitlines() if memberships.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, files = root / "sys/fs/cgroup", _OF_VERSION_2
        elif "memory" in controllers.split(","):
            mount, files = root / "sys/fs/cgroup/memory", _OF_VERSION_1
        else:
            continue
        folder = mount / path.lstrip("/")
        groups = (_group(each, *files) for each in (folder, *folder.parents) if each.is_relative_to(mount))
        yield from (group for group in groups if group is not None)


def _group(folder: Path, limit: str, usage: str, reclaimable: str) -> _Group | None:
    """None where the group has no limit, or is not to be seen from within the container that it is."""
    if not (folder / limit).exists() or (most := (folder / limit).read_text().strip()) == "max":
        return None
    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return _Group(int(most), int((folder / usage).read_text()), int(statistics[reclaimable]))
