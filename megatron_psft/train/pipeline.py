"""Runs a global batch through Megatron-Core's pipeline schedules, to train on it or only to score it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_psft.config.schema import ObjectiveConfig
from megatron_psft.data.micro_batch import MicroBatch, to_device
from megatron_psft.distributed.collective import sum_over_context
from megatron_psft.distributed.grid import Parallel
from megatron_psft.head.layer import HeadInputs, HeadOutput, label_positions, scatter_labels, select_labels
from megatron_psft.metrics.sums import BatchSums, LabelSources, batch_sums
from megatron_psft.model.adapters import adapters_off
from megatron_psft.model.end import ask
from megatron_psft.model.layers import packed_row_params
from megatron_psft.objectives.labels import LabelInputs, LabelStats, Records
from megatron_psft.objectives.objective import Objective
from megatron_psft.scoring.old_policy import OldPolicy, Scores
from megatron_psft.scoring.top_tokens import with_top

Observer = Callable[["LabelledBatch", HeadOutput], None]
"""Told of each micro-batch that is trained on, as it is on the device, and of the head's answer; on the last stage."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Forward and backward passes of this rank's model chunks over its micro-batches. All methods are collective."""

    chunks: Sequence[DistributedDataParallel]
    parallel: Parallel
    observers: Sequence[Observer] = ()
    sources: Sequence[str] = ()
    """Names of the training set's, in order, where it has several: each has metrics of its own."""
    without_adapters: bool = False
    """Whether `score` and `score_labels` ask the model that adapters stand beside, which is in memory anyway."""

    def train(
        self, micro_batches: Sequence[MicroBatch], old_policy: OldPolicy, *, objective: Objective
    ) -> list[BatchSums]:
        """Accumulates the gradient of one global batch, of the mean that the objective's aggregation asks for.

        Args:
            micro_batches: of this data-parallel rank.
            old_policy: of the step; its scores may be on any device.
            objective: the token loss and its aggregation.

        Returns:
            One entry per micro-batch on the last pipeline stage, an empty list elsewhere.
        """
        old: Sequence[Tensor | None] = [None] * len(micro_batches)
        if isinstance(old_policy, Scores) and self.parallel.is_last_stage:
            old = old_policy.log_probs
        items = [LabelledBatch.of(*pair, objective) for pair in zip(micro_batches, old, strict=True)]

        def loss(item: LabelledBatch, output: HeadOutput) -> tuple[Tensor, Tensor, BatchSums]:
            assert output.loss is not None
            for observer in self.observers:
                observer(item, output)
            sums = batch_sums(
                output.loss.detach(),
                output.stats,
                item.given,
                objective.config,
                # The ranks of a context-parallel group share each record: one of them counts it.
                labelled_records=item.labelled_records if self.parallel.context_rank == 0 else 0,
                sources=LabelSources(item.label_sources, self.sources) if self.sources else None,
            )
            # Three values: Megatron-Core sums losses and denominators over micro-batches and ranks and divides once.
            return output.loss, sums.totals["denominator"].to(torch.int), sums

        return self._run(items, loss, forward_only=False)

    def score(self, micro_batches: Sequence[MicroBatch], *, top_k: int = 0) -> list[LabelStats]:
        """Log-probabilities and entropy under the current weights, without gradients; `[b, s]`, zeros where no label
        counts. With `top_k` the most probable tokens, too, `[b, s, top_k]`.

        Returns:
            One entry per micro-batch on the last pipeline stage, an empty list elsewhere.
        """
        return self._score(micro_batches, _scattered, top_k)

    def score_labels(self, micro_batches: Sequence[MicroBatch]) -> list[LabelStats]:
        """As `score`, but `[n]`, of the label tokens in the order of `HeadInputs.label_positions`."""
        return self._score(micro_batches, lambda item, stats: stats)

    @torch.no_grad()
    def _score(
        self,
        micro_batches: Sequence[MicroBatch],
        kept: Callable[["LabelledBatch", LabelStats], LabelStats],
        top_k: int = 0,
    ) -> list[LabelStats]:
        def keep(item: LabelledBatch, output: HeadOutput, non_loss_data: bool) -> LabelStats:
            assert non_loss_data
            return kept(item, output.stats)

        items = [replace(LabelledBatch.of(batch, None, None), top_k=top_k) for batch in micro_batches]
        with adapters_off(self.chunks) if self.without_adapters else nullcontext():
            return self._run(items, keep, forward_only=True, collect_non_loss_data=True)

    def _run(self, items: list["LabelledBatch"], on_output: Any, **options: bool) -> list[Any]:
        def forward_step(iterator: Iterator[LabelledBatch], chunk: torch.nn.Module) -> tuple[Any, Any]:
            item = next(iterator).to(self.parallel)
            batch = item.micro_batch
            packed = None if batch.segments is None else packed_row_params(batch.segments, self.parallel.device)
            inputs = item.head_inputs()
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
class LabelledBatch:
    """A micro-batch with what its label tokens need."""

    micro_batch: MicroBatch
    label_positions: Tensor
    """As in `HeadInputs`."""
    objective: Objective | None
    """None to score only."""
    given: LabelInputs
    """Complete once `to` has brought it to the device, which adds records where the objective needs them."""
    labelled_records: int
    """Records with a label on any context-parallel rank."""
    top_k: int = 0
    """As in `HeadInputs`."""

    @classmethod
    def of(cls, micro_batch: MicroBatch, old_log_probs: Tensor | None, objective: Objective | None) -> "LabelledBatch":
        """Finds the label tokens while all is still on the CPU; `old_log_probs` are `[n]` of them, on any device."""
        positions = label_positions(micro_batch.label_mask)
        given = LabelInputs()
        if objective is not None:
            given = replace(_given_of(micro_batch, positions, objective.config), old_log_probs=old_log_probs)
        return cls(
            # Of what is given, the device needs no second copy.
            micro_batch=replace(micro_batch, advantages=None, ref_log_probs=None, ref_top=None, nll_z=None),
            label_positions=positions,
            objective=objective,
            given=given,
            labelled_records=int((micro_batch.label_counts > 0).sum()),
        )

    def to(self, parallel: Parallel) -> "LabelledBatch":
        """The same on this rank's device, ready for the head."""
        device = parallel.device
        batch, positions = self.micro_batch.to(device), to_device(self.label_positions, device)
        given = self.given.map(lambda values: to_device(values, device))
        if self.objective is not None and self.objective.needs_whole_records:
            add_up = partial(sum_over_context, parallel=parallel)
            ids = select_labels(batch.record_ids, positions)
            given = replace(given, records=Records(ids=ids, label_counts=batch.label_counts, add_up=add_up))
        return replace(self, micro_batch=batch, label_positions=positions, given=given)

    @property
    def label_sources(self) -> Tensor:
        """`[n]`, which source of the data set each label token is of."""
        sources = self.micro_batch.sources
        assert sources is not None, "the data set has several"
        return sources[select_labels(self.micro_batch.record_ids, self.label_positions)]

    @property
    def label_ids(self) -> Tensor:
        """`[n]`."""
        return select_labels(self.micro_batch.labels, self.label_positions)

    def head_inputs(self) -> HeadInputs:
        """What the head is asked."""
        objective, given, labels = self.objective, self.given, self.micro_batch.labels
        if objective is None:
            return HeadInputs(labels=labels, label_positions=self.label_positions, token_loss=None, top_k=self.top_k)
        return HeadInputs(
            labels=labels,
            label_positions=self.label_positions,
            token_loss=lambda stats, part: objective.token_loss(stats, given.part(part)),
            needs_whole_records=objective.needs_whole_records,
            extra_stats=objective.extra_stats,
            top_ids=given.ref_top_ids,
        )


def _scattered(item: LabelledBatch, stats: LabelStats) -> LabelStats:
    return stats.map(lambda values: scatter_labels(values, item.label_positions, item.micro_batch.label_mask))


def _given_of(micro_batch: MicroBatch, positions: Tensor, config: ObjectiveConfig) -> LabelInputs:
    """What the micro-batch says of the label tokens at `positions`."""

    def of_tokens(values: Tensor | None) -> Tensor | None:
        return None if values is None else select_labels(values, positions)

    def of_records(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[select_labels(micro_batch.record_ids, positions)]

    weighs_records = config.loss_aggregation == "seq-mean-token-mean"
    given = LabelInputs(
        ref_log_probs=of_tokens(micro_batch.ref_log_probs),
        advantages=of_records(micro_batch.advantages),
        nll_z=of_records(micro_batch.nll_z),
        weights=of_records(1.0 / micro_batch.label_counts.float()) if weighs_records else None,
    )
    top = of_tokens(micro_batch.ref_top)
    return given if top is None else with_top(given, top)
