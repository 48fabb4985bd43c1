"""Whether the nodes have room in host memory for what is kept there."""

import logging
import socket

import psutil
import torch.distributed as dist

from megatron_psft.distributed.collective import on_every_rank
from megatron_psft.distributed.grid import Parallel
from megatron_psft.errors import UserError

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
    keepers: list[str | None] = [None] * parallel.world_size
    dist.all_gather_object(keepers, socket.gethostname() if parallel.is_last_stage else None)
    needed = bytes_per_rank * keepers.count(socket.gethostname()) / 2**30
    log.info(
        "old policy: log-probabilities of %d steps take at most %.3g GiB of host memory per rank of the last pipeline "
        "stage",
        num_steps,
        bytes_per_rank / 2**30,
    )

    def check() -> None:
        available = psutil.virtual_memory().available / 2**30
        if needed > available:
            raise UserError(
                f"old_policy_interval: the log-probabilities of {num_steps} steps need {needed:.3g} GiB of host memory "
                f"on {socket.gethostname()}, which has {available:.3g} GiB left; lower it or global_batch_size, or use "
                "more nodes"
            )

    on_every_rank(check)
