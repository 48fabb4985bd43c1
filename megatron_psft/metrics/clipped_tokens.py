"""Which tokens PSFT clips most: counts by token id over the whole run, and the file that shows them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_psft.atomic import replace_file
from megatron_psft.distributed.grid import Parallel

CLIPPED_TOKENS_FILE = "clipped_tokens.json"


class ClippedTokens:
    """How often each token of the vocabulary was a label that the clip left without a gradient."""

    def __init__(self, *, vocab_size: int, first_step: int, parallel: Parallel) -> None:
        """Starts at zero.

        Args:
            vocab_size: of the model.
            first_step: that is counted, from 1.
            parallel: this rank's place.
        """
        self._first_step, self._parallel = first_step, parallel
        self._total = torch.zeros(vocab_size, dtype=torch.int64, device="cpu")
        self._recent = torch.zeros(vocab_size, dtype=torch.int64, device=parallel.device)

    def add(self, label_ids: Tensor, is_clipped: Tensor) -> None:
        """Counts label tokens `[n]` of this rank, once for each token of the batch: of the ranks that compute the same
        one counts. Does not wait for the device."""
        if self._parallel.reports_sums:
            self._recent.index_add_(0, label_ids, is_clipped.to(torch.int64))

    def gather(self) -> None:
        """Adds up what all ranks have counted since the last call; collective over the world."""
        dist.all_reduce(self._recent)
        self._total += self._recent.cpu()
        self._recent.zero_()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, as of the last `gather`; the same on all ranks."""
        ids = self._total.nonzero().squeeze(1)
        return {"first_step": self._first_step, "ids": ids.tolist(), "counts": self._total[ids].tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from the state of a checkpoint; on all ranks."""
        self._first_step = state["first_step"]
        self._total.zero_()
        self._total[state["ids"]] = torch.tensor(state["counts"], dtype=torch.int64, device="cpu")

    def write(self, folder: Path, *, last_step: int, num_tokens: int, decode: Callable[[int], str]) -> None:
        """Writes the most clipped tokens as of the last `gather` to `folder`; for one rank.

        Args:
            folder: of the run.
            last_step: that was counted, from 1.
            num_tokens: at most so many; tokens that were never clipped are left out.
            decode: a token's text from its id.
        """
        clipped = int(self._total.sum())
        ids = self._total.argsort(descending=True, stable=True)[:num_tokens].tolist()
        rows = [(token_id, int(self._total[token_id])) for token_id in ids if self._total[token_id] > 0]
        content = {
            "first_step": self._first_step,
            "last_step": last_step,
            "clipped": clipped,
            "tokens": [
                {"id": token_id, "text": decode(token_id), "count": count, "share": count / clipped}
                for token_id, count in rows
            ],
        }
        replace_file(folder / CLIPPED_TOKENS_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
