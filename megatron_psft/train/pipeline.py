"""Runs a global batch through Megatron-Core's pipeline schedules, to train on it or only to score it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_psft.config.schema import ObjectiveConfig
from megatron_psft.data.loader import MicroBatch
from megatron_psft.distributed.collective import sum_over_context
from megatron_psft.distributed.grid import Parallel
from megatron_psft.head.layer import HeadInputs, HeadOutput, label_positions, scatter_labels, select_labels
from megatron_psft.loss.labels import LabelInputs, LabelStats, Records
from megatron_psft.loss.objectives import BatchSums, Objective, batch_sums, is_clipped, policy_ratio
from megatron_psft.metrics.clipped_tokens import ClippedTokens
from megatron_psft.model.end import ask
from megatron_psft.model.layers import packed_row_params
from megatron_psft.scoring.agreement import PrecisionNoise


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Forward and backward passes of this rank's model chunks over its micro-batches. All methods are collective."""

    chunks: Sequence[DistributedDataParallel]
    parallel: Parallel
    clipped_tokens: ClippedTokens | None = None
    """Told of every label token that is trained on, where there is one."""
    noise: PrecisionNoise | None = None
    """Told of some that a window begins with, as scored and as trained on, where there is one."""

    def train(
        self, micro_batches: Sequence[MicroBatch], old_log_probs: Sequence[Tensor] | None, *, objective: Objective
    ) -> list[BatchSums]:
        """Accumulates the gradient of one global batch, of the mean that the objective's aggregation asks for.

        Args:
            micro_batches: of this data-parallel rank.
            old_log_probs: one `[b, s]` fp32 tensor per micro-batch, on any device, none on ranks that do not compute
                the loss; None where the old policy is the current one, on all ranks alike.
            objective: the token loss and its aggregation.

        Returns:
            One entry per micro-batch on the last pipeline stage, an empty list elsewhere.
        """
        old: Sequence[Tensor | None] = old_log_probs or [None] * len(micro_batches)
        items = [_Item.of(*pair, objective) for pair in zip(micro_batches, old, strict=True)]
        begins_window = old_log_probs is None and "old" in objective.needs
        scored = self._score_first(items) if self.noise is not None and begins_window else []
        trained: list[Tensor] = []

        def loss(item: _Item, output: HeadOutput) -> tuple[Tensor, Tensor, BatchSums]:
            assert output.loss is not None
            self._count_clipped(item, output.stats.log_probs, objective.config)
            if len(trained) < len(scored):
                trained.append(output.stats.log_probs.detach())
            sums = batch_sums(
                output.loss.detach(),
                output.stats,
                item.given_with_records(self.parallel),
                objective.config,
                # The ranks of a context-parallel group share each record: one of them counts it.
                labelled_records=item.labelled_records if self.parallel.context_rank == 0 else 0,
            )
            # Three values: Megatron-Core sums losses and denominators over micro-batches and ranks and divides once.
            return output.loss, sums.denominator.to(torch.int), sums

        results = self._run(items, loss, forward_only=False)
        if self.noise is not None and begins_window:
            self.noise.report(scored, trained)
        return results

    def _score_first(self, items: Sequence["_Item"]) -> list[Tensor]:
        """The log-probabilities `[n]` of the label tokens of the first micro-batch, or of as many as a pass needs."""
        first = items[: self.parallel.pipeline_size if self.parallel.virtual_size > 1 else 1]
        scored = self.score([item.micro_batch for item in first])
        return [
            select_labels(stats.log_probs, item.label_positions.to(self.parallel.device))
            for item, stats in zip(first, scored, strict=False)  # there are no statistics but on the last stage
        ]

    def _count_clipped(self, item: "_Item", log_probs: Tensor, config: ObjectiveConfig) -> None:
        old_log_probs = item.given.old_log_probs
        if self.clipped_tokens is None or old_log_probs is None:
            return
        clipped = is_clipped(policy_ratio(log_probs, old_log_probs), item.given.advantages, config)
        self.clipped_tokens.add(select_labels(item.micro_batch.labels, item.label_positions), clipped)

    @torch.no_grad()
    def score(self, micro_batches: Sequence[MicroBatch]) -> list[LabelStats]:
        """Log-probabilities and entropy under the current weights, without gradients; `[b, s]`, zeros where no label
        counts.

        Returns:
            One entry per micro-batch on the last pipeline stage, an empty list elsewhere.
        """

        def keep(item: _Item, output: HeadOutput, non_loss_data: bool) -> LabelStats:
            assert non_loss_data
            mask = item.micro_batch.label_mask
            return output.stats.map(lambda values: scatter_labels(values, item.label_positions, mask))

        items = [_Item.of(micro_batch, None, None) for micro_batch in micro_batches]
        return self._run(items, keep, forward_only=True, collect_non_loss_data=True)

    def _run(self, items: list["_Item"], on_output: Any, **options: bool) -> list[Any]:
        def forward_step(iterator: Iterator[_Item], chunk: torch.nn.Module) -> tuple[Any, Any]:
            item = next(iterator).to(self.parallel.device)
            batch = item.micro_batch
            packed = None if batch.segments is None else packed_row_params(batch.segments, self.parallel.device)
            inputs = item.head_inputs(self.parallel)
            ask(chunk, lambda labels: inputs)
            output = chunk(batch.tokens, batch.position_ids, None, labels=batch.labels, packed_seq_params=packed)
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
    objective: Objective | None
    given: LabelInputs
    """Without `records`, which `given_with_records` adds."""
    labelled_records: int
    """Records with a label on any context-parallel rank."""

    @classmethod
    def of(cls, micro_batch: MicroBatch, old_log_probs: Tensor | None, objective: Objective | None) -> "_Item":
        """Finds the label tokens while all is still on the CPU."""
        positions = label_positions(micro_batch.label_mask)
        given = LabelInputs()
        if objective is not None:
            given = _given_of(micro_batch, positions, old_log_probs, objective.config)
        return cls(
            # Of what is given, the device needs no second copy.
            micro_batch=replace(micro_batch, advantages=None, ref_log_probs=None),
            label_positions=positions,
            objective=objective,
            given=given,
            labelled_records=int((micro_batch.label_counts > 0).sum()),
        )

    def to(self, device: torch.device) -> "_Item":
        return replace(
            self,
            micro_batch=self.micro_batch.to(device),
            label_positions=self.label_positions.to(device, non_blocking=True),
            given=self.given.map(lambda values: values.to(device, non_blocking=True)),
        )

    def given_with_records(self, parallel: Parallel) -> LabelInputs:
        """What is given, with records where the objective mixes tokens."""
        if self.objective is None or not self.objective.needs_whole_records:
            return self.given
        ids = select_labels(self.micro_batch.record_ids, self.label_positions)
        counts = self.micro_batch.label_counts
        records = Records(ids=ids, label_counts=counts, add_up=partial(sum_over_context, parallel=parallel))
        return replace(self.given, records=records)

    def head_inputs(self, parallel: Parallel) -> HeadInputs:
        objective, given, batch = self.objective, self.given_with_records(parallel), self.micro_batch
        if objective is None:
            return HeadInputs(labels=batch.labels, label_positions=self.label_positions, token_loss=None)
        return HeadInputs(
            labels=batch.labels,
            label_positions=self.label_positions,
            token_loss=lambda stats, part: objective.token_loss(stats, given.part(part)),
            needs_whole_records=objective.needs_whole_records,
            extra_stats=objective.extra_stats,
        )


def _given_of(
    micro_batch: MicroBatch, positions: Tensor, old_log_probs: Tensor | None, config: ObjectiveConfig
) -> LabelInputs:
    """What is known of the label tokens at `positions` before the forward pass."""

    def of_tokens(values: Tensor | None) -> Tensor | None:
        return None if values is None else select_labels(values, positions)

    def of_records(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[select_labels(micro_batch.record_ids, positions)]

    weighs_records = config.loss_aggregation == "seq-mean-token-mean"
    return LabelInputs(
        old_log_probs=of_tokens(old_log_probs),
        ref_log_probs=of_tokens(micro_batch.ref_log_probs),
        advantages=of_records(micro_batch.advantages),
        weights=of_records(1.0 / micro_batch.label_counts.float()) if weighs_records else None,
    )
