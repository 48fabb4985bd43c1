"""What a command prints besides its own text: log lines and warnings, of this package and of others."""

import logging
import warnings


def configure_output(*, level: int = logging.WARNING, rank: int = 0) -> None:
    """Our own messages from `level` on, and only rank 0's; of other libraries just what may matter."""
    others = max(level, logging.WARNING) if rank == 0 else logging.ERROR
    logging.basicConfig(format="%(message)s", level=others)
    logging.getLogger("megatron_psft").setLevel(level if rank == 0 else logging.ERROR)
    # Megatron-Core warns at import of each fused library that is not installed; a run and `psft doctor` say what is
    # used. On the CPU some come in the name of cpu_shims.py, which its calls go through.
    warnings.filterwarnings("ignore", module=r"megatron\.core|megatron_psft\.distributed\.cpu_shims")
    # Collectives that newer torch has renamed, called by Megatron-Core.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
