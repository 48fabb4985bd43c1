"""What the old policy has said of a window's labels, on disk beside Bridge's checkpoints."""

import pickle
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_psft.errors import UserError, first_line

FOLDER = "psft_window"
_CHECKPOINT = re.compile(r"iter_(\d{7})")
"""Bridge's folder of a checkpoint, by completed steps."""

OfSteps = dict[int, list[Tensor]]
"""Step to a tensor per micro-batch of this rank; none on ranks without the output layer."""


class ScoredWindow(NamedTuple):
    """What the old policy says of the labels of a window's steps that are still to come."""

    log_probs: OfSteps
    """`OldPolicyWindow.state`: `[n]` fp32 each."""
    label_ids: OfSteps
    """Which labels they are of, `[n]` int32 each."""


@dataclass(frozen=True, kw_only=True)
class WindowFiles:
    """`FOLDER/<first step>/rank_<rank>.pt` for every window that a checkpoint lies in, and for the current one.

    Written once, when the window begins: its weights are gone later, and Bridge may write a checkpoint at any step, or
    while training goes on.
    """

    layout: tuple[int, ...]
    """Sizes that say which labels are which rank's."""
    interval: int
    """Steps of a window."""
    rank: int

    def write(self, save: Path, first_step: int, window: ScoredWindow) -> None:
        """Writes the window that begins at `first_step`, and removes those that no checkpoint in `save` needs."""
        folder = save / FOLDER / f"{first_step:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"layout": self.layout, **window._asdict()}, folder / self._file_name())
        if self.rank == 0:
            self._remove_unneeded(save, first_step)

    def read(self, load: Path, step: int) -> ScoredWindow:
        """What is left for this rank of the window that `step` is within.

        Raises:
            UserError: it is not there, or is of another layout.
        """
        starts = [int(folder.name) for folder in (load / FOLDER).glob("[0-9]*") if int(folder.name) < step]
        path = load / FOLDER / f"{max(starts, default=0):07d}" / self._file_name()
        remedy = "resume from a checkpoint between two windows: give checkpoint.ckpt_step"
        if not path.is_file():
            raise UserError(
                f"checkpoint.load ({load}) is within a window of the old policy, and has no {path}; {remedy}"
            )
        try:
            saved = torch.load(path, weights_only=True)
            window = _window_in(saved)
        except (pickle.UnpicklingError, RuntimeError, LookupError, TypeError, EOFError) as error:
            reason = first_line(error)
            raise UserError(
                f"{path} is not as a run writes it, and nothing of it was run: {reason}; {remedy}"
            ) from None
        if saved["layout"] != self.layout or step not in window.log_probs:
            raise UserError(
                f"checkpoint.load ({load}) is within a window of the old policy that was scored with another number of "
                f"ranks, layout, micro_batch_size or old_policy_interval; use the same, or {remedy}"
            )
        rest = ({later: values for later, values in field.items() if later >= step} for field in window)
        return ScoredWindow(*rest)

    def _remove_unneeded(self, save: Path, first_step: int) -> None:
        matches = (_CHECKPOINT.fullmatch(folder.name) for folder in save.iterdir())
        checkpoints = [int(match[1]) for match in matches if match]
        for folder in (save / FOLDER).glob("[0-9]*"):
            first = int(folder.name)
            # A folder of a later step is from a run that went further, before this one resumed.
            if first != first_step and not any(first < step < first + self.interval for step in checkpoints):
                shutil.rmtree(folder)

    def _file_name(self) -> str:
        return f"rank_{self.rank:05d}.pt"


def _window_in(saved: Mapping[str, Any]) -> ScoredWindow:
    if "stored" not in saved:
        return ScoredWindow(saved["log_probs"], saved["label_ids"])
    # As version 0.1 wrote it: `[2, n]` fp32, ids and log-probabilities; an id is below 2^24, up to which fp32 is exact.
    stored: OfSteps = saved["stored"]
    return ScoredWindow(
        log_probs={step: [pair[1] for pair in pairs] for step, pairs in stored.items()},
        label_ids={step: [pair[0].to(torch.int32) for pair in pairs] for step, pairs in stored.items()},
    )
