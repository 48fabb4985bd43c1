"""The forgetting meter: how far the model has gone from the initial one, on answers that this one has drawn.

For answers y of the initial model, E[log pi_0(y) - log pi(y)] is KL(pi_0 || pi), which goes with how much is forgotten
of what the prompts ask for (RL's Razor, arXiv 2509.04259). It takes no second model: log pi_0 is a number for each y.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_psft.atomic import replace_file
from megatron_psft.data.loader import BatchLoader
from megatron_psft.distributed.grid import Parallel
from megatron_psft.objectives.labels import LabelStats

START_FILE = "drift_start.json"
MAX_START_GAP = 0.05
"""Nats per token by which a run that has not begun may differ from what a drift set says of the same answers, on the
mean. Rounding makes some 1e-7 in fp32, and up to 1e-3 where one of both computes in bf16; another model makes more."""


class Drift(NamedTuple):
    """An estimate of KL(pi_0 || pi), in nats per token, and its standard error over answers."""

    value: float
    stderr: float


def estimate_drift(rise: NDArray[np.float64], tokens: NDArray[np.int64]) -> Drift:
    """The mean over all tokens of how much the negative log-likelihood has risen.

    Args:
        rise: of each answer, summed over its tokens, `[answers]`; two answers at least.
        tokens: of each answer, `[answers]`.
    """
    total, count = int(tokens.sum()), len(rise)
    value = math.fsum(rise.tolist()) / total
    # Of a ratio of two sums over answers, to first order: what an answer adds beyond its share.
    beyond = rise - value * tokens
    return Drift(value, math.sqrt(count / (count - 1) * float(np.square(beyond).sum())) / total)


class AnswerNll:
    """Adds up the negative log-likelihood of each record of a set over its batches, on whatever rank they are."""

    def __init__(self, num_records: int, parallel: Parallel) -> None:
        self._parallel = parallel
        self._sums = torch.zeros(num_records, dtype=torch.float64)

    def add(self, stats: Sequence[LabelStats], loader: BatchLoader, batch: int) -> None:
        """Adds a scored global batch of the loader; `stats` is empty on ranks without the output layer."""
        if not self._parallel.reports_sums:
            return
        rows = loader.to_packs(batch, [entry.log_probs for entry in stats]).double()
        for row, records in zip(rows, loader.own_packs(batch), strict=True):
            parts = row[: int(loader.record_lengths(records).sum())].split(loader.record_lengths(records).tolist())
            for record, log_probs in zip(records.tolist(), parts, strict=True):
                self._sums[record] -= log_probs.sum()

    def total(self) -> NDArray[np.float64]:
        """Returns `[records]`, the same on every rank; collective."""
        sums = self._sums.to(self._parallel.device)
        dist.all_reduce(sums)
        return sums.cpu().numpy()


def read_start(folder: Path) -> dict[str, list[float]]:
    """What a run said of its drift sets before its first step: by a set's content, for each answer the negative
    log-likelihood. Empty where there is no such file."""
    path = folder / START_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_start(folder: Path, start: Mapping[str, NDArray[np.float64]]) -> None:
    """Writes what `read_start` reads."""
    replace_file(folder / START_FILE, json.dumps({content: nll.tolist() for content, nll in start.items()}) + "\n")
