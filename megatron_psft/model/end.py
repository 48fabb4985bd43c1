"""The end of a Megatron-Core language model, taken over so that it answers `HeadInputs` in place of cross-entropy.

`attach` changes a model in place, and this is the only file that does: on the instance, `output_layer.forward` and
`compute_language_model_loss` become functions of ours. No class is touched, so that `GPTModel` and `HybridModel`, alone
or inside a multimodal model, are all served alike, and whatever goes by the class of a module (hooks, checkpoints,
Megatron-Bridge's conversion) finds what it expects.

The output layer hands its hidden states on instead of logits, from within its own forward, as Megatron-Core gathers the
weight in hooks of it (`overlap_param_gather`). The loss function answers, as only there the labels have arrived: a
multimodal model may have cut them up for context parallelism on the way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_psft.errors import UserError
from megatron_psft.head.layer import HeadInputs, HeadOutput, fused_head
from megatron_psft.head.plain import plain_head

Question = Callable[[Tensor], HeadInputs]
"""From the labels `[b, s]` that reach the end of the model to what the head is asked about them."""


def attach(chunk: torch.nn.Module, *, vocab_size: int, fused: bool) -> None:
    """Lets a model chunk be asked; a second call changes nothing.

    Args:
        chunk: in whatever Megatron-Core or Megatron-Bridge wraps it in; a language model, or a multimodal model around
            one. On pipeline stages without an output layer there is nothing to take over.
        vocab_size: true size, without padding.
        fused: whether loss and gradient are computed without all logits.

    Raises:
        UserError: the model does not end in a plain output layer whose logits are the policy's.
    """
    model = _language_model(chunk)
    if hasattr(model, "psft_end"):
        return
    _require_plain_end(model)
    model.psft_end = None
    if model.post_process:
        end = model.psft_end = _End(model, vocab_size=vocab_size, fused=fused)
        model.output_layer.forward = end.output_layer_forward
        model.compute_language_model_loss = end.answer


def ask(chunk: torch.nn.Module, question: Question) -> None:
    """Says what the next forward pass of an attached chunk is asked: called with labels, the last chunk of the pipeline
    returns the `HeadOutput`. A pass that was not asked anything is Megatron-Core's own."""
    end = _language_model(chunk).psft_end
    if end is not None:
        end.question = question


@dataclass(frozen=True, kw_only=True)
class _LastHidden:
    """What the output layer hands on in place of logits. It has no arithmetic: a model that changes its logits on the
    way to the loss fails, instead of training on others."""

    states: Tensor
    """`[s, b, h]`; with sequence parallelism this rank's part of s."""
    weight: Tensor
    """`[v, h]`, this rank's rows."""


class _End:
    """The end of one model, with the question it is about to answer."""

    def __init__(self, model: Any, *, vocab_size: int, fused: bool) -> None:
        self.question: Question | None = None
        self._layer, self._vocab_size, self._fused = model.output_layer, vocab_size, fused
        self._logits, self._cross_entropy = model.output_layer.forward, model.compute_language_model_loss

    def output_layer_forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Any, Tensor | None]:
        """With `ColumnParallelLinear`'s signature; `weight` is given where it is the embedding's."""
        if self.question is None or not self._fused:
            return self._logits(input_, weight, runtime_gather_output)
        return _LastHidden(states=input_, weight=self._layer.weight if weight is None else weight), None

    def answer(self, labels: Tensor, logits: Any) -> Tensor | HeadOutput:
        """With the signature of `compute_language_model_loss`: `[b, s]`, and what the output layer handed on."""
        question, self.question = self.question, None
        if question is None:
            return self._cross_entropy(labels, logits)
        place = {"vocab_size": self._vocab_size, "group": self._layer.tp_group}
        if not isinstance(logits, _LastHidden):
            return plain_head(logits, question(labels), **place)
        is_split = self._layer.sequence_parallel
        return fused_head(logits.states, logits.weight, question(labels), sequence_parallel=is_split, **place)


def _language_model(chunk: torch.nn.Module) -> Any:
    model = unwrap_model(chunk)
    return getattr(model, "language_model", model)


def _require_plain_end(model: Any) -> None:
    if not isinstance(model, LanguageModule):
        raise UserError(
            f"the language model ({type(model).__name__}) must be a LanguageModule of Megatron-Core: no other can end "
            "in a token loss so far; choose another model"
        )
    config = model.config
    if getattr(config, "use_mup", False):  # unknown to Megatron-Core 0.16
        raise UserError("model.use_mup (True) must be False: a token loss of logits that are scaled is not supported")
    if config.mtp_num_layers:
        raise UserError(
            f"model.mtp_num_layers ({config.mtp_num_layers}) must be unset: multi-token prediction is not supported"
        )
    # A subclass, which may bear the same name, changes the logits, as Gemma 2's does.
    if model.post_process and type(model.output_layer) is not ColumnParallelLinear:
        raise UserError(
            f"the output layer ({type(model.output_layer).__name__}) must be Megatron-Core's ColumnParallelLinear "
            "itself: no other can end in a token loss so far; choose another model, or set "
            "model.cross_entropy_fusion_impl to native"
        )
