"""Training from Python, in the calling process, on records that the caller holds. Imports no torch before a call."""

import gc
import hashlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_psft.atomic import replace_file
from megatron_psft.config.flags import from_values
from megatron_psft.config.paths import escape_path, expand_path
from megatron_psft.config.rules import validate
from megatron_psft.config.schema import Config, ParallelConfig
from megatron_psft.distributed.environment import prepare_environment
from megatron_psft.distributed.exit_code import exit_code_of, leave
from megatron_psft.distributed.orphans import end_with_launcher
from megatron_psft.errors import ExplainedError, UserError, is_shared

if TYPE_CHECKING:
    from megatron_psft.distributed.device import Platform
    from megatron_psft.distributed.rendezvous import Meeting
    from megatron_psft.distributed.signals import StopRequested

log = logging.getLogger(__name__)

Records = Iterable[Mapping[str, Any]]
"""In any form of docs/data.md; values that JSON has."""


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """What a run has come to."""

    metrics: list[dict[str, float]]
    """A dict for each step of the run, those of earlier calls included: `step`, from 1, or 0 for an evaluation before
    the first one, and what docs/metrics.md lists."""
    export: Path | None
    """Folder of the trained model in Hugging Face format; None where the run ended before its last step, or where
    `export_hf` is None."""


def finetune(
    records: Records | None = None,
    *,
    load_hf: str | os.PathLike[str],
    save: str | os.PathLike[str],
    valid_records: Records | None = None,
    **settings: Any,
) -> Finetuned:
    """Trains as `psft train` does, in this process, or in all of those in which torchrun runs the calling script. Where
    one of several fails by itself it raises what it has met, and the others end within seconds, with exit code 4. A
    lack of memory has a note (`__notes__`), which a traceback ends with: the line that `psft train` prints.

    Records are written to the run folder, as `records-<sum>.jsonl`, rank 0's for all ranks. The same call again goes on
    from the newest checkpoint in `save`, or finds nothing to do. After a call on the CPU this process uses no GPU.

    Args:
        records: to train on; the setting `data` names files instead.
        load_hf: the model to start from.
        save: the run folder.
        valid_records: to evaluate on every `eval_interval` steps; the setting `valid_data` names files instead.
        settings: fields of the configuration by name, as in a YAML file. `export_hf` is the folder `hf` of `save` if it
            is not given.

    Raises:
        UserError: a mistake in settings, records or files; on all ranks.
        DivergenceError, InfrastructureError: as where `psft train` ends with code 3 or 4.
        KeyboardInterrupt: after Ctrl-C; once a step was made, with a checkpoint.
    """
    started_at = time.monotonic()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    asked: _Call | UserError
    try:
        asked = _Call.of(records, valid_records, {**settings, "load_hf": load_hf, "save": save})
        validate(asked.config, world_size)
    except UserError as error:
        if world_size == 1:
            raise
        asked = error  # the others learn of it as they meet
    try:
        return _train(asked, world_size, started_at)
    finally:
        gc.collect()  # the model is part of cycles, and its memory wanted by what comes next


@dataclass(frozen=True, kw_only=True)
class _Call:
    config: Config
    records: Mapping[Path, str]
    """Files to write, and their text."""

    @classmethod
    def of(cls, records: Records | None, valid_records: Records | None, settings: Mapping[str, Any]) -> "_Call":
        folder = Path(expand_path("save", os.fspath(settings["save"])))
        values = {"export_hf": escape_path(str(folder / "hf")), **settings, "save": escape_path(str(folder))}
        files = {}
        for field, name, rows in (("data", "records", records), ("valid_data", "valid_records", valid_records)):
            if rows is None:
                continue
            if field in settings:
                raise UserError(f"{field} ({settings[field]}) and {name} are both given; remove one")
            text = _lines(name, rows)
            # The same for the same records: a run of others is refused as the data differs, and keeps its own.
            path = folder / f"records-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
            files[path], values[field] = text, [escape_path(str(path))]
        if "data" not in values:
            raise UserError("missing records; give a list of dicts, or name files by data")
        return cls(config=from_values(Config, values), records=files)


def _train(asked: _Call | UserError, world_size: int, started_at: float) -> Finetuned:
    environment = []
    if isinstance(asked, _Call) and asked.config.precision.device != "cpu":
        environment = prepare_environment()
    import torch.distributed as dist

    from megatron_psft.distributed.device_choice import settle, survey
    from megatron_psft.distributed.rendezvous import meet

    _check_process(has_group=dist.is_initialized())
    end_with_launcher()
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    own = asked if isinstance(asked, UserError) else survey(asked.config.precision.device, rank, local_rank)
    parallel = ParallelConfig() if isinstance(asked, UserError) else asked.config.parallel
    meeting = meet(rank, world_size, parallel.distributed_timeout_minutes)
    try:
        platform = settle(meeting, own, local_rank)
    except ExplainedError as error:
        if is_shared(error):
            meeting.leave()
        raise
    assert isinstance(asked, _Call), "a mistake of any rank is raised on all"
    if platform.is_gpu:
        log.info("environment: %s", ", ".join(map(str, environment)))
    metrics, ended_early = _run(asked, meeting, platform, local_rank, started_at)
    if ended_early is not None and ended_early.signum is not None:
        signal.raise_signal(ended_early.signum)  # for whoever handles it outside of a run
    export = None if ended_early is not None else asked.config.weights.export_hf
    return Finetuned(metrics=metrics, export=None if export is None else Path(export))


def _run(
    asked: _Call, meeting: "Meeting", platform: "Platform", local_rank: int, started_at: float
) -> tuple[list[dict[str, float]], "StopRequested | None"]:
    """All metrics, and why training has ended before its last step, if it has."""
    from megatron_psft.diagnostics.out_of_memory import explain
    from megatron_psft.distributed.collective import is_out_of_memory, naming_lost_peers, on_rank_zero
    from megatron_psft.distributed.failure import FailureWatch, end_after
    from megatron_psft.distributed.grid import process_group
    from megatron_psft.metrics.run_log import METRICS_FILE
    from megatron_psft.train.run import hold_folders, run

    config, rank = asked.config, meeting.rank
    group = process_group(platform, meeting.world_size, config.parallel.distributed_timeout_minutes, meeting=meeting)
    with FailureWatch(meeting, partial(end_after, rank)) as watch:
        try:
            with group, naming_lost_peers("training"), ExitStack() as locks:
                on_rank_zero(lambda: hold_folders(config.weights, locks))
                on_rank_zero(lambda: _write(asked.records))
                ended_early = run(config, platform, rank, local_rank, started_at)
                return on_rank_zero(lambda: _read(Path(config.weights.save) / METRICS_FILE)), ended_early
        except BaseException as error:
            if not is_shared(error):  # the others may not know of it
                if meeting.world_size > 1:
                    leave(exit_code_of(error))  # they end, and with them the job, whatever the caller does
                watch.announce()
            if is_out_of_memory(error):
                error.add_note(explain(error, config, platform, rank, meeting.world_size))
            raise


def _check_process(*, has_group: bool) -> None:
    if has_group:
        raise UserError("finetune makes a process group of its own, and there is one; destroy_process_group() first")
    if threading.current_thread() is not threading.main_thread():
        raise UserError("finetune handles Ctrl-C and SIGTERM, which only the main thread can; call it there")


def _lines(name: str, records: Records) -> str:
    """Records as JSON Lines."""
    lines = []
    for index, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise UserError(f"{name}[{index}] ({type(record).__name__}) must be a dict")
        try:
            lines.append(json.dumps(dict(record), ensure_ascii=False, allow_nan=False) + "\n")
        except (TypeError, ValueError) as error:
            raise UserError(f"{name}[{index}] must hold values that JSON has: {error}") from None
    if not lines:
        raise UserError(f"{name} ([]) must hold at least one record")
    return "".join(lines)


def _write(files: Mapping[Path, str]) -> None:
    for path, text in files.items():
        replace_file(path, text)


def _read(metrics: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
