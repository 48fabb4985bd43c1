"""Runs a global batch through Megatron-Core's pipeline schedules, to train on it or only to score it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_psft.data.loader import MicroBatch
from megatron_psft.model.head import HeadInputs, HeadOutput, label_positions, place_labels, select_labels
from megatron_psft.model.layers import packed_row_params
from megatron_psft.objectives import BatchSums, Objective, ObjectiveName, batch_sums
from megatron_psft.vocab_parallel import LabelStats


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
        token_loss = Objective(name=objective, clip_ratio_high=self.clip_ratio_high).token_loss
        old: Sequence[Tensor | None] = old_log_probs or [None] * len(micro_batches)
        items = [_Item.of(*pair, token_loss) for pair in zip(micro_batches, old, strict=True)]

        def loss(item: _Item, output: HeadOutput) -> tuple[Tensor, Tensor, BatchSums]:
            assert output.loss is not None
            sums = batch_sums(
                output.loss.detach(),
                output.stats.log_probs,
                item.old_log_probs,
                output.stats.entropy,
                clip_ratio_high=self.clip_ratio_high,
            )
            # Three values: Megatron-Core sums losses and token counts over micro-batches and ranks and divides once.
            return output.loss, sums.loss_tokens.to(torch.int), sums

        return self._run(items, loss, forward_only=False)

    @torch.no_grad()
    def score(self, micro_batches: Sequence[MicroBatch]) -> list[LabelStats]:
        """Log-probabilities and entropy under the current weights, without gradients; `[b, s]`, zeros where no label
        counts.

        Returns:
            One entry per micro-batch on the last pipeline stage, an empty list elsewhere.
        """

        def keep(item: _Item, output: HeadOutput, non_loss_data: bool) -> LabelStats:
            assert non_loss_data
            mask = item.micro_batch.loss_mask
            return LabelStats(*(place_labels(values, item.label_positions, mask) for values in output.stats))

        items = [_Item.of(micro_batch, None, None) for micro_batch in micro_batches]
        return self._run(items, keep, forward_only=True, collect_non_loss_data=True)

    def _run(self, items: list["_Item"], on_output: Any, **options: bool) -> list[Any]:
        def forward_step(iterator: Iterator[_Item], chunk: torch.nn.Module) -> tuple[Any, Any]:
            item = next(iterator).to(self.device)
            batch = item.micro_batch
            packed = None if batch.segments is None else packed_row_params(batch.segments, self.device)
            labels = item.head_inputs()
            output = chunk(batch.tokens, batch.position_ids, None, labels=labels, packed_seq_params=packed)
            return output, partial(on_output, item)

        first = items[0].micro_batch
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


@dataclass(frozen=True, kw_only=True)
class _Item:
    """A micro-batch with what its label tokens need."""

    micro_batch: MicroBatch
    label_positions: Tensor
    """As in `HeadInputs`."""
    old_log_probs: Tensor | None
    """`[n]`, if the old policy is another one."""
    token_loss: Callable[[Tensor, Tensor | None], Tensor] | None

    @classmethod
    def of(
        cls,
        micro_batch: MicroBatch,
        old_log_probs: Tensor | None,
        token_loss: Callable[[Tensor, Tensor | None], Tensor] | None,
    ) -> "_Item":
        """Finds the label tokens while all is still on the CPU."""
        positions = label_positions(micro_batch.loss_mask)
        old = None if old_log_probs is None else select_labels(old_log_probs, positions)
        return cls(micro_batch=micro_batch, label_positions=positions, old_log_probs=old, token_loss=token_loss)

    def to(self, device: torch.device) -> "_Item":
        old = self.old_log_probs
        return replace(
            self,
            micro_batch=self.micro_batch.to(device),
            label_positions=self.label_positions.to(device, non_blocking=True),
            old_log_probs=None if old is None else old.to(device, non_blocking=True),
        )

    def head_inputs(self) -> HeadInputs:
        def token_loss(stats: LabelStats, part: slice) -> Tensor:
            assert self.token_loss is not None
            return self.token_loss(stats.log_probs, None if self.old_log_probs is None else self.old_log_probs[part])

        return HeadInputs(
            labels=self.micro_batch.labels,
            label_positions=self.label_positions,
            token_loss=None if self.token_loss is None else token_loss,
        )
