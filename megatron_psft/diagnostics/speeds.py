"""What the arithmetic of `psft plan --explain` takes a cluster to be capable of: assumptions, none of them measured."""

from dataclasses import dataclass, fields

from megatron_psft.config.flags import require_positive
from megatron_psft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What a GPU, its links and its storage do; all go with `explain`, and are those of an H100 node unless set."""

    peak_tflops: float = 989.0
    """Operations of a GPU in bf16 at its peak, 1e12 per second; an H100's by its data sheet."""
    reached_share: float = 0.6
    """Share of that peak that layers and head reach while they compute; kernels that are not matrix products are in
    it."""
    nvlink_gb_per_s: float = 360.0
    """What a GPU sends to those of its node at a time, in 1e9 bytes per second: 450 by an H100's data sheet, of which
    collectives reach some four fifths."""
    infiniband_gb_per_s: float = 40.0
    """What a GPU's own adapter sends to other nodes, in 1e9 bytes per second: 50 for 400 Gbit/s, of which collectives
    reach some four fifths."""
    hbm_gb_per_s: float = 2700.0
    """What a GPU reads and writes of its own memory, in 1e9 bytes per second: 3,350 by an H100's data sheet, of which
    kernels reach some four fifths."""
    host_copy_gb_per_s: float = 20.0
    """What a GPU copies to memory of its host that is pinned, in 1e9 bytes per second."""
    storage_gb_per_s: float = 2.0
    """What a node writes to, or reads from, the storage of checkpoints, in 1e9 bytes per second."""
    shared_storage_gb_per_s: float = 20.0
    """What all nodes together write to, or read from, that storage, in 1e9 bytes per second."""
    start_seconds: float = 90.0
    """Seconds from the start of the processes to the first byte of a checkpoint read: imports, process groups, model,
    data from the cache."""

    def __post_init__(self) -> None:
        require_positive(self, *(field.name for field in fields(self)))
        if self.reached_share > 1:
            raise UserError(f"reached_share ({self.reached_share}) must be a share, above 0 and at most 1")
