"""Whether the nodes have room in host memory for the log-probabilities of a window."""

import logging

from megatron_psft.distributed.grid import Parallel
from megatron_psft.distributed.host_memory import require_host_memory
from megatron_psft.errors import counted

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
    steps = counted(num_steps, "step")
    log.info(
        "old policy: log-probabilities of %s take at most %.3g GiB of host memory per rank of the last pipeline stage",
        steps,
        bytes_per_rank / 2**30,
    )
    require_host_memory(
        bytes_per_rank if parallel.is_last_stage else 0,
        purpose=f"old_policy_interval: the log-probabilities of {steps} need",
        remedy="lower it or global_batch_size, or use more nodes",
        parallel=parallel,
    )
