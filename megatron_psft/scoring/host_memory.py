"""Whether the nodes have room in host memory for what is kept there."""

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch.distributed as dist

from megatron_psft.distributed.collective import on_every_rank
from megatron_psft.distributed.grid import Parallel
from megatron_psft.errors import UserError

_OF_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_OF_VERSION_2 = ("memory.max", "memory.current", "inactive_file")

log = logging.getLogger(__name__)


def check_host_memory(bytes_per_rank: int, num_steps: int, parallel: Parallel) -> None:
    """Says what a window keeps in host memory; collective.

    Args:
        bytes_per_rank: at most, of one rank of the last pipeline stage, where the log-probabilities are.
        num_steps: of the window that are scored ahead.
        parallel: this rank's place.

    Raises:
        UserError: on every rank, where a machine may have less memory left.
    """
    log.info(
        "old policy: log-probabilities of %d steps take at most %.3g GiB of host memory per rank of the last pipeline "
        "stage",
        num_steps,
        bytes_per_rank / 2**30,
    )
    require_host_memory(
        bytes_per_rank if parallel.is_last_stage else 0,
        purpose=f"old_policy_interval: the log-probabilities of {num_steps} steps need",
        remedy="lower it or global_batch_size, or use more nodes",
        parallel=parallel,
    )


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


def available_bytes(root: Path = Path("/")) -> int:
    """What this process may still take of the host's memory, by what is free and by the limits of its control groups:
    those of a container, a Slurm job or a Kubernetes pod. Of several processes in one group each has all that is left.

    Args:
        root: of the file system that has /proc and /sys.
    """
    return min([psutil.virtual_memory().available, *_left_by_groups(root)])


def _left_by_groups(root: Path) -> Iterator[int]:
    memberships = root / "proc/self/cgroup"
    for line in memberships.read_text().splitlines() if memberships.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, files = root / "sys/fs/cgroup", _OF_VERSION_2
        elif "memory" in controllers.split(","):
            mount, files = root / "sys/fs/cgroup/memory", _OF_VERSION_1
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount) and (left := _left_by_group(folder, *files)) is not None:
                yield left


def _left_by_group(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """None where the group has no limit, or is not to be seen from within the container that it is."""
    if not (folder / limit).exists() or (most := (folder / limit).read_text().strip()) == "max":
        return None
    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(most) - int((folder / usage).read_text()) + int(statistics[reclaimable])
