"""Runs a global batch through Megatron-Core's pipeline schedules, to train on it or only to score it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_psft.data.loader import MicroBatch
from megatron_psft.model.layers import packed_row_params
from megatron_psft.objectives import BatchSums, ObjectiveName, batch_sums
from megatron_psft.vocab_parallel import LabelStats

_Item = tuple[
    MicroBatch, Tensor | None
]  # a micro-batch and the old_log_probs of its labels, if the old policy is another one


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Forward and backward passes of this rank's model chunks over its micro-batches. All methods are collective."""

    chunks: Sequence[DistributedDataParallel]
    device: torch.device
    clip_ratio_high: float

    def train(
        self, micro_batches: Sequence[MicroBatch], old_log_probs: Sequence[Tensor] | None, *, objective: ObjectiveName
    ) -> list[BatchSums]:
        """Accumulates the gradient of one global batch, summed over its label tokens and divided by their number.

        Args:
            micro_batches: of this data-parallel rank.
            old_log_probs: one `[b, s]` fp32 tensor per micro-batch, on any device; None where the old policy is the
                current one, and on ranks that do not compute the loss.
            objective: the token loss.

        Returns:
            One entry per micro-batch on the last pipeline stage, an empty list elsewhere.
        """
        old: Sequence[Tensor | None] = old_log_probs or [None] * len(micro_batches)

        def loss(item: _Item, output: Sequence[Tensor]) -> tuple[Tensor, Tensor, BatchSums]:
            (micro_batch, old), stats = item, LabelStats(*output)
            sums = batch_sums(
                objective,
                stats.log_probs,
                None if old is None else old.to(self.device, non_blocking=True),
                stats.entropy,
                micro_batch.loss_mask,
                clip_ratio_high=self.clip_ratio_high,
            )
            # Three values: Megatron-Core sums losses and token counts over micro-batches and ranks and divides once.
            return sums.loss, sums.loss_tokens.to(torch.int), sums.detached()

        return self._run(list(zip(micro_batches, old, strict=True)), loss, forward_only=False)

    @torch.no_grad()
    def score(self, micro_batches: Sequence[MicroBatch]) -> list[LabelStats]:
        """Log-probabilities and entropy under the current weights, without gradients.

        Returns:
            One entry per micro-batch on the last pipeline stage, an empty list elsewhere.
        """

        def keep(_item: _Item, output: Sequence[Tensor], non_loss_data: bool) -> LabelStats:
            assert non_loss_data
            return LabelStats(*output)

        items: list[_Item] = [(micro_batch, None) for micro_batch in micro_batches]
        return self._run(items, keep, forward_only=True, collect_non_loss_data=True)

    def _run(self, items: list[_Item], on_output: Any, **options: bool) -> list[Any]:
        def forward_step(iterator: Iterator[_Item], chunk: torch.nn.Module) -> tuple[Any, Any]:
            micro_batch, old = next(iterator)
            micro_batch = micro_batch.to(self.device)
            packed = None if micro_batch.segments is None else packed_row_params(micro_batch.segments, self.device)
            output = chunk(
                micro_batch.tokens,
                micro_batch.position_ids,
                None,
                labels=micro_batch.labels,
                packed_seq_params=packed,
            )
            return output, partial(on_output, (micro_batch, old))

        first = items[0][0]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(items) for _ in self.chunks],
            model=list(self.chunks),
            num_microbatches=len(items),
            seq_length=first.seq_length,
            micro_batch_size=len(first.tokens),
            **options,
        )

    def zero_grad(self) -> None:
        """Clears the gradient buffers."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def gather_parameters(self) -> None:
        """Makes every parameter current on every rank, as reading them or a pass outside training needs it.

        With overlapped gathering the last update reaches other ranks only during the next forward pass, driven by
        hooks.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
