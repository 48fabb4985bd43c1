# PYTHON_ARGCOMPLETE_OK: shells with argcomplete's global completion complete its flags
"""Trains a Hugging Face model with Proximal SFT: `torchrun --nproc-per-node N pretrain_psft.py --help`."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from megatron_psft.config.rules import validate
from megatron_psft.config.schema import parse_config
from megatron_psft.errors import RankError, UserError

EXIT_USER_ERROR = 2
EXIT_SIGNALLED = 128  # plus the signal's number, as shells have it: 130 after Ctrl-C, 143 after SIGTERM


def main(argv: Sequence[str]) -> int:
    """Runs the command line on this rank and returns the exit code: 0, 2 after an error that is explained, or 128 plus
    the number of the signal that ended the run."""
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in _PLACE.items())
    _configure_output(rank)
    try:
        config = parse_config(argv)
        validate(config, world_size)
    except UserError as error:
        return _refuse(error, rank, world_size)

    # Late, as these take seconds to import: `--help` and a mistyped flag answer at once.
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import process_group
    from megatron_psft.train.run import run

    here = detect(local_rank)
    with process_group(here, world_size, config.parallel.distributed_timeout_minutes):
        try:
            signum = run(config, here, rank, local_rank)
        except UserError as error:
            return _refuse(error, rank, world_size)
        except RankError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
            return EXIT_USER_ERROR
        except KeyboardInterrupt:
            signum = signal.SIGINT
    if not signum:
        return 0
    if rank == 0:
        name = signal.Signals(signum).name
        print(f"ended by {name}: the same command resumes from the newest checkpoint", file=sys.stderr)  # noqa: T201
    return EXIT_SIGNALLED + signum


def _configure_output(rank: int) -> None:
    """Our own messages from rank 0 only; of other libraries just what may matter."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING if rank == 0 else logging.ERROR)
    logging.getLogger("megatron_psft").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    # Megatron-Core warns at import of each fused library that is not installed; one line at start says what is used.
    # On the CPU some come in the name of platform.py, which its calls go through.
    warnings.filterwarnings("ignore", module=r"megatron\.core|megatron_psft\.distributed\.cpu_shims")
    # Collectives that newer torch has renamed, called by Megatron-Core.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


_PLACE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # what torchrun sets, and a lone process


def _refuse(error: UserError, rank: int, world_size: int) -> int:
    """Prints the error once. All ranks have the same one and leave together: torchrun ends the others when the first
    exits."""
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
    if world_size > 1:
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo")
        dist.barrier()
    return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
