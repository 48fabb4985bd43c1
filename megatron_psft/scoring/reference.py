"""The reference: the model that a run starts from, kept as its log-probabilities of the labels to be trained on.

Beside the labels' it may keep those of the most probable tokens (`top_tokens.py`).

It is never held as a second set of weights. Before the run's first step one forward-only pass over the training set
stores what the weights of that moment say of every label, in `ref_log_probs` beside the checkpoints: whatever the run
starts from is its reference, be it `load_hf` or the checkpoint that `load` names. The folder has a name only when the
pass is complete, and carries checksums as a checkpoint does.

The pass covers the batches of an epoch in file order. What it wrote reaches the disk every few batches, so that a pass
that was killed goes on from there.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from megatron_psft import sealed
from megatron_psft.atomic import replace_file
from megatron_psft.data.loader import BatchLoader
from megatron_psft.data.micro_batch import MicroBatch
from megatron_psft.distributed.collective import (
    Result,
    damage_on_any_rank,
    on_every_rank,
    on_rank_zero,
    sum_over_context,
)
from megatron_psft.distributed.grid import Parallel
from megatron_psft.distributed.signals import StopRequested
from megatron_psft.errors import InfrastructureError, UserError, counted, storage_error
from megatron_psft.objectives.labels import LabelStats
from megatron_psft.progress import progress
from megatron_psft.scoring.top_tokens import to_rows
from megatron_psft.scoring.values import VALUES, RecordValues
from megatron_psft.sealed import DamageError

FOLDER = "ref_log_probs"
PROGRESS = "progress.json"
BATCHES_PER_MARK = 16
"""How many a killed pass does again at most: each mark waits for disks."""
START = "the weights at the start"
"""The field of the identity that only a run that has not begun to train can compare."""


log = logging.getLogger(__name__)


class Scorer(Protocol):
    """Says what the weights of this moment make of a global batch; collective."""

    def score(self, micro_batches: Sequence[MicroBatch], *, top_k: int = 0) -> list[LabelStats]:
        """`[b, s]`, with the `top_k` most probable tokens, for each micro-batch of this rank; none on ranks without
        the output layer."""
        ...

    def gather_parameters(self) -> None:
        """Makes every parameter current on every rank."""
        ...


@dataclass(frozen=True, kw_only=True)
class ReferencePass:
    """Computes the reference log-probabilities of a training set, or finds them computed. Collective."""

    folder: Path
    """Where they are kept."""
    values: RecordValues
    """What reads them, of `folder / VALUES`."""
    policy: Scorer
    loader: BatchLoader
    """Every record once: neither shuffled nor wrapped."""
    parallel: Parallel
    identity: Mapping[str, Any]
    """What tells whose log-probabilities they are, and of what, and in which batches they are computed."""
    top_k: int = 0
    """How many of the most probable tokens are kept besides the label; `values` has the columns for them."""
    has_begun: bool
    """Whether the run has made steps before, so that `policy` is no longer the model at its start."""

    def complete(self, *, between_batches: Callable[[], None] = lambda: None) -> None:
        """Makes `values` readable, with a pass where there has been none; zeros stand where no label counts.

        `between_batches` is called after each batch; where it raises `StopRequested`, what was done counts.

        Raises:
            UserError: the run has begun and what it needs is missing, damaged or of another run; log-probabilities that
                are no numbers.
            InfrastructureError: no room, or a failing disk.
        """
        lack = self._find_lack()
        if lack is not None and self.has_begun:
            raise UserError(
                f"{lack}; it was computed by the weights at the start of the run, which are gone: put a copy of "
                f"{self.folder} back, or start anew in another save folder; with --load its reference is the model of "
                "that checkpoint"
            )
        if lack is not None:
            log.info("reference: %s; the model at the start scores the training set", lack)
            self._pass(between_batches)
        on_every_rank(self.values.open)

    def _find_lack(self) -> str | None:
        """What keeps the folder from being used, if anything does."""

        def read() -> str | None:
            if not self.folder.exists():
                return f"there is no {self.folder}"
            try:
                found = sealed.read_content(self.folder)
            except DamageError as error:
                return str(error)
            return self._find_difference(found)

        lack = on_rank_zero(read)
        return damage_on_any_rank(self.folder) if lack is None else lack

    def _find_difference(self, found: Mapping[str, Any]) -> str | None:
        for field, wanted in json.loads(json.dumps(self.identity)).items():
            if found.get(field) != wanted and not (self.has_begun and field == START):
                return f"{self.folder} is of a run with {field} ({found.get(field)}), this one has ({wanted})"
        return None

    def _pass(self, between_batches: Callable[[], None]) -> None:
        done = on_rank_zero(self._begin)
        num_batches, size_gib = self.loader.num_batches, self.values.size_bytes / 2**30
        log.info("reference: %d of %s done; %.3g GiB on disk", done, counted(num_batches, "batch"), size_gib)
        self.policy.gather_parameters()
        rest = range(done, num_batches)
        with self._open_to_write() as file:
            try:
                for batch in progress(rest, "reference", unit="batch", is_shown=self.parallel.is_main, num_done=done):
                    self._score(batch, file)
                    done = batch + 1
                    if done % BATCHES_PER_MARK == 0:
                        self._mark(done, file)
                    between_batches()
            except StopRequested:  # on all ranks alike
                self._mark(done, file)
                raise
            self._mark(done, file)
        on_rank_zero(lambda: sealed.seal(self.folder, self.identity))

    @property
    def _partial(self) -> Path:
        return sealed.partial_folder(self.folder)

    def _begin(self) -> int:
        """Prepares the folder to write in; returns the batches that are done."""
        try:
            mark = json.loads((self._partial / PROGRESS).read_text(encoding="utf-8"))
            done = mark.pop("batches")
            has_values = (self._partial / VALUES).stat().st_size == self.values.size_bytes
        except (OSError, ValueError, KeyError, AttributeError):  # none, or a torn one
            pass
        else:
            if has_values and mark == {"identity": json.loads(json.dumps(self.identity))}:
                return done
            log.info("reference: an unfinished pass of another run in %s is not used", self._partial)
        partial = sealed.begin(self.folder)
        free_bytes = shutil.disk_usage(partial).free
        if free_bytes < self.values.size_bytes:
            sealed.discard(self.folder)
            raise InfrastructureError(
                f"save ({self.folder.parent}) must have room for the reference's log-probabilities, "
                f"{self.values.size_bytes / 2**30:.2g} GiB, and has {free_bytes / 2**30:.2g} GiB; make room and start "
                "again"
            )
        with (partial / VALUES).open("wb") as file:
            file.truncate(self.values.size_bytes)
        self._write_progress(0)
        return 0

    def _write_progress(self, done: int) -> None:
        text = json.dumps({"identity": self.identity, "batches": done})
        replace_file(self._partial / PROGRESS, text)

    def _open_to_write(self) -> BinaryIO | nullcontext[None]:
        """The file, on the one rank of each data-parallel replica that writes its records."""
        is_writer = self.parallel.reports_sums and self.parallel.context_rank == 0
        return self._together(lambda: (self._partial / VALUES).open("r+b") if is_writer else nullcontext())

    def _score(self, batch: int, file: BinaryIO | None) -> None:
        scored = [to_rows(stats) for stats in self.policy.score(self.loader.micro_batches(batch), top_k=self.top_k)]
        rows = sum_over_context(self.loader.to_packs(batch, scored), self.parallel).cpu() if scored else None
        self._together(lambda: self._write(batch, rows, file))

    def _write(self, batch: int, rows: Tensor | None, file: BinaryIO | None) -> None:
        if file is None or rows is None:
            return
        if not torch.isfinite(rows).all():
            raise UserError(
                f"load_hf: the model at the start gives log-probabilities that are no numbers, for batch {batch} in "
                "file order; fix its weights"
            )
        for row, records in zip(rows.numpy(), self.loader.own_packs(batch), strict=False):  # the last rows may be empty
            at = 0
            for record, length in zip(records.tolist(), self.loader.record_lengths(records).tolist(), strict=True):
                self.values.write(file, record, row[at : at + length])
                at += length

    def _mark(self, done: int, file: BinaryIO | None) -> None:
        """Makes the batches before `done` count."""

        def sync() -> None:
            if file is not None:
                file.flush()
                os.fsync(file.fileno())

        self._together(sync)
        on_rank_zero(lambda: self._write_progress(done))

    def _together(self, action: Callable[[], Result]) -> Result:
        def explained() -> Result:
            try:
                return action()
            except OSError as error:
                text = (
                    f"save: {self._partial / VALUES} could not be written ({error}); fix the folder, or make room in "
                    "it, and start again: the reference's pass goes on from where it was"
                )
                raise storage_error(error, text) from error

        return on_every_rank(explained)
