"""Trains a Hugging Face model with Proximal SFT: one process, or each of those that torchrun starts."""

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_psft.cli.output import configure_output
from megatron_psft.config.flags import parse_flags
from megatron_psft.config.paths import expand_path
from megatron_psft.config.rules import validate
from megatron_psft.config.schema import Config
from megatron_psft.config.yaml_files import read_settings
from megatron_psft.data.places import check_places
from megatron_psft.distributed.environment import prepare_environment
from megatron_psft.distributed.exit_code import EXIT_BUG, EXIT_SIGNALLED, check_file, exit_code_of, leave, left_behind
from megatron_psft.distributed.orphans import end_at_once, end_with_launcher
from megatron_psft.distributed.quick_imports import quick_imports
from megatron_psft.errors import ExplainedError, RankError, UserError
from megatron_psft.hf.folder import check_apart

if TYPE_CHECKING:
    from megatron_psft.distributed.device import Platform
    from megatron_psft.distributed.device_choice import Survey
    from megatron_psft.distributed.rendezvous import Meeting

log = logging.getLogger(__name__)

EXAMPLES = """examples:
  eight GPUs; the model is exported at the end:
    torchrun --nproc-per-node 8 -m megatron_psft --load-hf Qwen/Qwen2.5-7B-Instruct --data train.jsonl \\
        --tensor-model-parallel-size 4 --sequence-parallel --use-distributed-optimizer \\
        --global-batch-size 64 --epochs 3 --save runs/first --export-hf runs/first/hf
  one process, with a GPU or without:
    psft train --load-hf Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --train-iters 100 --save runs/small
  the same settings from a file, which the command line overrides:
    torchrun --nproc-per-node 8 -m megatron_psft --config runs/first/config.yaml --lr 2e-6 --save runs/second

The same command again resumes from the newest checkpoint in --save. In a checkout, `torchrun pretrain_psft.py` is
`torchrun -m megatron_psft`. Before a run, `psft plan` says what it takes, `psft data` what it trains on, and `psft
doctor` what this machine has.

Exit code: 0, also where --exit-duration-in-mins ended the run; 1 after a bug, with a traceback; 2 after a mistake in
flags, files or data; 3 where the loss or the gradient norm is not finite; 4 where a peer, disk or node was lost; 130
after Ctrl-C and 143 after SIGTERM, with a checkpoint. torchrun exits with 1 whatever its processes did: if the
environment variable PSFT_EXIT_CODE_FILE names a file that does not exist, the first rank that fails writes its code
there."""

_ENV_DEFAULTS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""What torchrun sets, and what holds in a process that it has not started."""


def main(argv: Sequence[str]) -> int:
    """Runs the command line on this rank and returns the exit code: 0, that of an error that is explained
    (`ExplainedError.exit_code`), or 128 plus the number of the signal that ended the run."""
    end_with_launcher()
    started_at = time.monotonic()
    rank, world_size, local_rank = _ranks()
    configure_output(level=logging.INFO, rank=rank)
    with left_behind():
        try:
            check_file()
            config = parse_flags(Config, argv, prog="psft train", epilog=EXAMPLES)
            validate(config, world_size)
            check_places(config.data)  # not after the seconds of imports that reading them takes
            if config.weights.export_hf is not None:
                check_apart("export_hf", Path(config.weights.export_hf), _config_file(argv))
        except UserError as error:
            return refuse(error)
        try:
            return _train(config, rank, world_size, local_rank, started_at)
        except KeyboardInterrupt as error:  # before the ranks were together
            code = exit_code_of(error)
            leave(code)
            if rank == 0:
                print("ended by SIGINT before the run began", file=sys.stderr, flush=True)
            return code


def _train(config: Config, rank: int, world_size: int, local_rank: int, started_at: float) -> int:
    environment = [] if config.precision.device == "cpu" else prepare_environment()
    # Late, as these take seconds to import: `--help` and a mistyped flag answer at once.
    with quick_imports():
        from megatron_psft.distributed.device_choice import has_hidden_gpu, survey
        from megatron_psft.distributed.failure import FailureWatch, end_after

    minutes = config.parallel.distributed_timeout_minutes
    settled = _settle(survey(config.precision.device, rank, local_rank), rank, world_size, local_rank, minutes)
    if isinstance(settled, int):
        return settled
    meeting, platform = settled
    if platform.is_gpu:
        log.info("environment: %s", ", ".join(map(str, environment)))
    elif config.precision.device == "auto" and has_hidden_gpu(os.environ):
        log.warning("CUDA_VISIBLE_DEVICES hides the GPUs of this machine: they are not used")
    from megatron_psft.distributed.grid import process_group

    with FailureWatch(meeting, partial(end_after, rank)) as watch:
        try:
            with process_group(platform, world_size, minutes, meeting=meeting), left_behind(), ExitStack() as locks:
                return _run(config, platform, locks, rank, local_rank, started_at)
        except BaseException as error:  # whatever it is, the others may not know of it
            leave(exit_code_of(error))
            first = watch.announce()  # before anything that takes time
            return _leave_alone(error, rank, world_size, first, _describe(error, config, platform, rank, world_size))


def _run(config: Config, platform: "Platform", locks: ExitStack, rank: int, local_rank: int, started_at: float) -> int:
    """Within the process group, so that all ranks can leave together; raises what only this one may know of."""
    with quick_imports():
        from megatron_psft.distributed.collective import naming_lost_peers, on_rank_zero
        from megatron_psft.train.run import hold_folders, run

    try:
        with naming_lost_peers("training"):
            on_rank_zero(lambda: hold_folders(config.weights, locks))
            ended_early = run(config, platform, rank, local_rank, started_at)
    except RankError:
        raise
    except ExplainedError as error:
        import torch.distributed as dist

        code = _explain(error, rank)
        dist.barrier()
        return code
    if ended_early is None or ended_early.signum is None:
        return 0
    signum = ended_early.signum
    leave(EXIT_SIGNALLED + signum)
    if rank == 0:
        print(_interrupted(signum), file=sys.stderr)
    return EXIT_SIGNALLED + signum


def _interrupted(signum: int) -> str:
    name = signal.Signals(signum).name
    return f"ended by {name}: the same command resumes from the newest checkpoint, if there is one"


def refuse(mistake: UserError) -> int:
    """Ends all ranks with the mistake of one, which rank 0 prints, and returns the exit code."""
    rank, world_size, local_rank = _ranks()
    if world_size == 1:  # at once: to meet others takes torch
        return _explain(mistake, rank)
    settled = _settle(mistake, rank, world_size, local_rank)
    assert isinstance(settled, int), "a mistake settles no device"
    return settled


def _settle(
    own: "Survey | UserError", rank: int, world_size: int, local_rank: int, timeout_minutes: float = 30.0
) -> "tuple[Meeting, Platform] | int":
    """Meets the other ranks before any collective. Returns the meeting and what this rank computes on, as all have
    decided, or the exit code where they cannot, for what this rank or another has to say."""
    from megatron_psft.distributed.device_choice import settle
    from megatron_psft.distributed.rendezvous import meet

    try:
        meeting = meet(rank, world_size, timeout_minutes)
        return meeting, settle(meeting, own, local_rank)
    except RankError as error:
        leave(error.exit_code)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except ExplainedError as error:  # on all ranks alike
        code = _explain(error, rank)
        meeting.leave()
        return code


def _explain(error: ExplainedError, rank: int) -> int:
    """Prints what all ranks have raised once, and returns the exit code. They leave together after it: torchrun ends
    the others when the first exits."""
    leave(error.exit_code)
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return error.exit_code


def _leave_alone(error: BaseException, rank: int, world_size: int, first: int, text: str | None) -> int:
    """Says what only this rank may know of, where rank `first` has not failed before. Returns the exit code where it
    has no peers; else ends the process at once, as what Python does at its end, and NCCL, may wait for them."""
    from megatron_psft.distributed.failure import report

    if world_size == 1 and text is None:
        raise error
    report(error, rank, first, text)
    code = exit_code_of(error)
    if world_size > 1:
        sys.stdout.flush()
        end_at_once(code)
    return code


def _describe(error: BaseException, config: Config, platform: "Platform", rank: int, world_size: int) -> str | None:
    """What an error means, in one line; None for a bug, of which Python says more."""
    from megatron_psft.diagnostics.out_of_memory import explain
    from megatron_psft.distributed.collective import is_out_of_memory

    if isinstance(error, ExplainedError):
        return str(error)
    if is_out_of_memory(error):
        return explain(error, config, platform, rank, world_size)
    if isinstance(error, OSError) and exit_code_of(error) != EXIT_BUG:
        return f"rank {rank}: {error}; what it has saved is intact; start again when the storage is well"
    if isinstance(error, KeyboardInterrupt):
        return _interrupted(signal.SIGINT)
    return None


def _config_file(argv: Sequence[str]) -> list[tuple[str, Path]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    path = parser.parse_known_args(argv)[0].config
    if path is None:
        return []
    file = Path(expand_path("config", path))
    return [("config", each) for each in dict.fromkeys([file, *(setting.file for setting in read_settings(file))])]


def _ranks() -> tuple[int, int, int]:
    """Global rank, number of ranks, and rank on this node."""
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in _ENV_DEFAULTS.items())
    return rank, world_size, local_rank
