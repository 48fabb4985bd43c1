"""Evaluates a run: likelihood of its validation sets, and how far it has gone from the initial model."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_psft.data.drift_sets import DriftSet
from megatron_psft.data.loader import BatchLoader
from megatron_psft.distributed.collective import on_rank_zero
from megatron_psft.distributed.grid import Parallel
from megatron_psft.errors import UserError
from megatron_psft.metrics.drift import (
    MAX_START_GAP,
    AnswerNll,
    estimate_drift,
    read_start,
    write_start,
)
from megatron_psft.metrics.reduce import EvalSums
from megatron_psft.metrics.set_names import metric_of_set, split_name
from megatron_psft.progress import progress
from megatron_psft.train.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a run is evaluated on, by the names of the sets. All methods are collective; training is not affected."""

    valid: Mapping[str, BatchLoader]
    drift: Mapping[str, tuple[DriftSet, BatchLoader]]
    eval_iters: int | None
    """Global batches of each validation set; all if None."""
    pipeline: Pipeline
    parallel: Parallel
    folder: Path
    """Of the run, where what it says of drift sets before its first step is kept."""
    initial: Pipeline | None = None
    """The model at the start, where it is at hand later, too: beside adapters."""

    def __bool__(self) -> bool:
        return bool(self.valid or self.drift)

    def before_training(self) -> dict[str, float]:
        """The metrics of a run that has not begun; `drift` is measured from here.

        Raises:
            UserError: a drift set that this model has not drawn.
        """
        self.pipeline.gather_parameters()
        nll = self._nll_of_answers(self.pipeline, self.drift)
        start = self._checked(nll)
        if start:
            on_rank_zero(lambda: write_start(self.folder, start))
        return self._valid_values() | self._drift_values(nll, start)

    def complete_start(self) -> None:
        """Has the initial model, where it is at hand, say what it has not said before the first step, as of sets that
        the run began without.

        Raises:
            UserError: a drift set that this model has not drawn.
        """
        if self.initial is None:
            return
        start = self._start
        missing = [name for name, (answers, _) in self.drift.items() if answers.dataset.fingerprint() not in start]
        if missing:
            self.initial.gather_parameters()
            start |= self._checked(self._nll_of_answers(self.initial, missing))
            on_rank_zero(lambda: write_start(self.folder, start))

    def _checked(self, nll: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        """What the initial model says of drift sets, by their content."""
        for name, values in nll.items():
            _check_start(name, self.drift[name][0], values)
        return {self.drift[name][0].dataset.fingerprint(): values for name, values in nll.items()}

    def __call__(self) -> dict[str, float]:
        """The metrics as the model is now."""
        self.pipeline.gather_parameters()
        return self._valid_values() | self._drift_values(self._nll_of_answers(self.pipeline, self.drift), self._start)

    @cached_property
    def _start(self) -> dict[str, NDArray[np.float64]]:
        """What `before_training` has kept, of this start or an earlier one."""
        found = on_rank_zero(lambda: read_start(self.folder)) if self.drift else {}
        return {content: np.array(nll) for content, nll in found.items()}

    def _valid_values(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, loader in self.valid.items():
            sums = EvalSums(self.parallel)
            num_batches = min(self.eval_iters or loader.num_batches, loader.num_batches)
            for index in self._batches(name, num_batches):
                micro_batches = loader.micro_batches(index)
                sums.add(self.pipeline.score(micro_batches), micro_batches)
            values |= {metric_of_set(metric, name): value for metric, value in sums.means().items()}
        return values

    def _drift_values(
        self, nll: Mapping[str, NDArray[np.float64]], start: Mapping[str, NDArray[np.float64]]
    ) -> dict[str, float]:
        """`drift` and its standard error; from `start`, and from the file's log-probabilities for a set that the run
        began without."""
        values: dict[str, float] = {}
        for name, (answers, _) in self.drift.items():
            first = start.get(answers.dataset.fingerprint(), answers.nll)
            drift = estimate_drift(nll[name] - first, answers.tokens)
            values |= {metric_of_set("drift", name): drift.value, metric_of_set("drift_stderr", name): drift.stderr}
        return values

    def _nll_of_answers(self, model: Pipeline, names: Iterable[str]) -> dict[str, NDArray[np.float64]]:
        """Of each of the drift sets, by name: that of each answer."""
        found = {}
        for name in names:
            answers, loader = self.drift[name]
            nll = AnswerNll(len(answers.dataset), self.parallel)
            for index in self._batches(name, loader.num_batches):
                nll.add(model.score(loader.micro_batches(index)), loader, index)
            found[name] = nll.total()
        return found

    def _batches(self, name: str, number: int) -> Iterator[int]:
        title = f"evaluate {name}".rstrip()
        return progress(range(number), title, unit="batch", is_shown=self.parallel.is_main)


def _check_start(name: str, answers: DriftSet, nll: NDArray[np.float64]) -> None:
    """Raises UserError where the model that the run starts from has not drawn the answers."""
    gap = estimate_drift(nll - answers.nll, answers.tokens).value
    if not abs(gap) <= MAX_START_GAP:
        raise UserError(
            f"drift_data {name}".rstrip() + " must be answers of the model that the run starts from, whose log-"
            f"probabilities of them differ by {gap:.3g} nats per token from the file's, and may by {MAX_START_GAP}; "
            "sample them anew with `psft rollout --drift-set`"
        )


def drift_reached(values: Mapping[str, float], bound: float | None) -> str | None:
    """Which drift of an evaluation has reached the bound, as text; None where none has."""
    for name, value in values.items():
        if bound is not None and split_name(name)[0] == "drift" and value >= bound:
            return f"{name} ({value:.4g}) has reached stop_at_drift ({bound:g})"
    return None
