"""A forward step for Megatron-Bridge's loops: theirs, ending in a token loss of ours."""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
from megatron.bridge.training.gpt_step import forward_step as gpt_forward_step
from megatron.bridge.training.losses import masked_next_token_loss
from megatron.bridge.training.state import GlobalState
from torch import Tensor

from megatron_psft.errors import UserError
from megatron_psft.head.layer import HeadOutput
from megatron_psft.metrics.sums import BatchSums, batch_sums
from megatron_psft.metrics.table import means
from megatron_psft.model.end import ask, attach
from megatron_psft.nemo.config import PsftConfig
from megatron_psft.nemo.labels import MaskedLabels, MaskedQuestion, ScoredLabels
from megatron_psft.objectives.declare import Requirement
from megatron_psft.objectives.objective import Objective

LOSS_KEY = "lm loss"
"""Bridge's name of the loss that is trained on, or of an evaluation."""

BridgeStep = Callable[..., tuple[Any, Any]]
Observe = Callable[[object, HeadOutput], None]
Metrics = dict[str, Tensor]
"""Each `[2]`, a sum and its count, as Bridge adds them up over micro-batches and ranks before it divides."""


class PsftForwardStep:
    """Trains with PSFT, or another token loss; evaluates with cross-entropy.

    Bridge's own step for the family of models reads the batch and calls the model. Only what the model is asked about
    the labels is ours, so that packing, context parallelism and multimodal inputs are as Bridge has them.
    """

    def __init__(self, config: PsftConfig, bridge_step: BridgeStep = gpt_forward_step) -> None:
        """Wraps `bridge_step`, e.g. `megatron.bridge.training.vlm_step.forward_step`."""
        self._config = config
        self._bridge_step = bridge_step
        self._objective = config.objective_at(0)
        self._scored: Iterator[ScoredLabels] | None = None
        self._observe: Observe | None = None

    def begin_step(
        self, objective: Objective, scored: Sequence[ScoredLabels] | None, observe: Observe | None = None
    ) -> None:
        """Says what the coming optimizer step trains with.

        Args:
            objective: the token loss.
            scored: what the old policy says of each of this rank's micro-batches, in their order; None unless it is an
                earlier policy. Any sequence will do on ranks without the output layer.
            observe: gets what the head made of each micro-batch that is trained on, if wanted.
        """
        self._objective, self._observe = objective, observe
        # Bridge may run the micro-batches of a step again, from the first one on.
        self._scored = None if scored is None else cycle(scored)

    def __call__(
        self,
        state: GlobalState,
        data_iterator: Iterator[dict[str, Any]],
        model: torch.nn.Module,
        return_schedule_plan: bool = False,
    ) -> tuple[Any, partial[Any]]:
        """Bridge's contract: the output of the model, and what makes its loss and metrics."""
        if return_schedule_plan:
            raise UserError("model.overlap_moe_expert_parallel_comm (True) must be False: PSFT has no schedule plan")
        question = MaskedQuestion(self._objective, self._scored) if model.training else MaskedQuestion()
        output = self._run(state, data_iterator, model, question)
        checks, observe = state.cfg.rerun_state_machine, self._observe if model.training else None
        return output, partial(
            _loss_of,
            question=question,
            observe=observe,
            needs=self._config.objective_config.needs,
            check_for_nan_in_loss=checks.check_for_nan_in_loss,
            check_for_spiky_loss=checks.check_for_spiky_loss,
        )

    def score(
        self, state: GlobalState, data_iterator: Iterator[dict[str, Any]], model: torch.nn.Module
    ) -> tuple[Any, Callable[..., ScoredLabels]]:
        """The forward step of a pass that only scores; what it collects are `ScoredLabels`."""
        question = MaskedQuestion()
        return self._run(state, data_iterator, model, question), partial(_scored_of, question=question)

    def _run(
        self,
        state: GlobalState,
        data_iterator: Iterator[dict[str, Any]],
        model: torch.nn.Module,
        question: MaskedQuestion,
    ) -> Any:
        """The output of the model: a `HeadOutput`, but on pipeline stages without the output layer."""
        attach(model, vocab_size=state.cfg.model.vocab_size, fused=self._config.fused_head)
        ask(model, question)
        output, _ = self._bridge_step(state, MaskedLabels(data_iterator), model)
        return output


def _scored_of(output: HeadOutput, non_loss_data: bool, *, question: MaskedQuestion) -> ScoredLabels:
    assert non_loss_data
    return ScoredLabels(question.label_ids, output.stats.log_probs)


def _loss_of(
    output: HeadOutput,
    *,
    question: MaskedQuestion,
    observe: Observe | None,
    needs: Collection[Requirement],
    check_for_nan_in_loss: bool,
    check_for_spiky_loss: bool,
) -> tuple[Tensor, Tensor, Metrics]:
    """Sum of the losses of a micro-batch, its label tokens, and the metrics of a run with these needs; without an
    objective as in an evaluation."""
    stats = output.stats
    if question.objective is None:
        nll, count = -stats.log_probs.sum(), stats.log_probs.new_full((), len(stats.log_probs))
        return nll, count.int(), _paired(count, {LOSS_KEY: nll, "entropy": stats.entropy.sum()})
    assert output.loss is not None
    if observe is not None:
        observe(None, output)
    # Bridge's checks of the loss, with what follows from them: a sum is a batch of one token.
    loss, _, _ = masked_next_token_loss(
        output.loss.new_ones(1), output.loss.view(1), check_for_nan_in_loss, check_for_spiky_loss
    )
    sums = batch_sums(loss.detach(), stats, question.given, question.objective.config, labelled_records=0)
    return loss, sums.totals["denominator"].int(), _metrics_of(sums, needs)


def _metrics_of(sums: BatchSums, needs: Collection[Requirement]) -> Metrics:
    """The means of `metrics.table`, with the loss under Bridge's name of it."""
    totals = sums.totals
    return {
        LOSS_KEY if name == "loss" else name: torch.stack([totals[name], totals[over]])
        for name, over in means(needs).items()
    }


def _paired(count: Tensor, sums: dict[str, Tensor]) -> Metrics:
    return {name: torch.stack([value, count]) for name, value in sums.items()}
