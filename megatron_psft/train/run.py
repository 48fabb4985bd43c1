"""A training run from its configuration: read, build, train, export."""

import logging
from contextlib import ExitStack
from pathlib import Path

from megatron_psft.checkpoint.folders import step_folders
from megatron_psft.config.inputs import WeightsConfig
from megatron_psft.config.resume import settings_of
from megatron_psft.config.schema import Config, config_to_yaml
from megatron_psft.distributed.collective import on_every_rank, on_rank_zero
from megatron_psft.distributed.device import Platform
from megatron_psft.distributed.environment import place_flight_recorder
from megatron_psft.distributed.signals import StopRequested
from megatron_psft.errors import UserError, folder_error
from megatron_psft.lock import lock_beside, lock_within, sole_writer
from megatron_psft.metrics.provenance import STARTS_FILE, record_start, versions
from megatron_psft.metrics.run_log import METRICS_FILE
from megatron_psft.model.fp8 import check_machine
from megatron_psft.train.assemble import Run, build_run, export_model
from megatron_psft.train.inputs import describe, read_in_turn
from megatron_psft.train.logits_check import check_logits
from megatron_psft.train.loop import train
from megatron_psft.train.precision import settle_precision

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"

_BEGINNINGS = {CONFIG_FILE: "# megatron_psft ", METRICS_FILE: '{"step": ', STARTS_FILE: '{"time": '}
"""Of the files that a run writes under names which others give, too."""


def run(config: Config, platform: Platform, rank: int, local_rank: int, started_at: float) -> StopRequested | None:
    """Trains as `config` says, on all ranks of the default process group.

    Args:
        config: the run's.
        platform: what this rank computes on.
        rank: of all ranks.
        local_rank: of the ranks of this node.
        started_at: when the process began, by `time.monotonic()`, in seconds.

    Returns:
        None, or what ended the run early; then the same command goes on from there.

    Raises:
        UserError, DivergenceError, InfrastructureError: on every rank alike.
        RankError: on this rank, whatever the others do.
    """
    config = settle_precision(config, platform)
    on_every_rank(lambda: check_machine(config.precision, platform))
    inputs = read_in_turn(config, rank, local_rank)
    if platform.is_gpu:
        place_flight_recorder(Path(config.weights.save) / "flight_recorder")
    log.info("%s", platform.describe())
    describe(inputs, config)
    ready = build_run(config, inputs, platform)
    if config.logging.check_logits:
        check_logits(ready, inputs, platform)
    if ready.first_step == ready.train_iters:
        rest = "nothing to do" if config.weights.export_hf is None else "nothing to do but to export"
        log.warning("WARNING: %s: %d of %d steps are done", rest, ready.first_step, ready.train_iters)
    else:
        on_rank_zero(lambda: _record(ready))
        ended_early = train(ready, started_at)
        if ended_early is not None:
            return ended_early
    if config.weights.export_hf is not None:
        export_model(ready, Path(config.weights.export_hf))
    return None


def hold_folders(weights: WeightsConfig, locks: ExitStack) -> None:
    """Makes this run the one that writes, before it has read or written anything."""
    save = Path(weights.save)
    locks.enter_context(sole_writer("save", save, lock_within(save), steal=weights.steal_lock))
    check_own_files(save)
    if weights.export_hf is not None:
        target = Path(weights.export_hf)
        locks.enter_context(sole_writer("export_hf", target, lock_beside(target), steal=weights.steal_lock))


def check_own_files(save: Path) -> None:
    """Raises UserError where a file of somebody else has the name of one that the run writes."""
    for name, beginning in _BEGINNINGS.items():
        if name == CONFIG_FILE and step_folders(save):
            continue  # a run that goes on leaves it as it is
        path = save / name
        if not path.exists():
            continue
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                found = file.read(len(beginning))
        except OSError as error:
            raise folder_error("save", save, error) from None
        if not beginning.startswith(found):  # a killed run may have left less
            raise UserError(
                f"save ({save}) holds {name}, which no run wrote, and which this one would write to; rename it, or "
                "name another folder"
            )


def _record(run: Run) -> None:
    """Leaves in the run's folder how it was started, this time and the first."""
    save, start = Path(run.config.weights.save), run.start
    # Where `save` held no checkpoint, the run begins, and lines of an earlier start's steps go as well.
    begins = start is None or not start.resumes(save)
    record_start(
        save,
        step=run.first_step,
        train_iters=run.train_iters,
        world_size=run.parallel.world_size,
        checkpoint=None if start is None else str(start.checkpoint),
        changed={change.name: [change.before, change.now] for change in (() if start is None else start.changes)},
        settings=settings_of(run.config),
    )
    path = save / CONFIG_FILE
    if begins or not path.exists():
        head = "".join(f"# {name} {version}\n" for name, version in versions().items() if version)
        path.write_text(head + config_to_yaml(run.config), encoding="utf-8")
