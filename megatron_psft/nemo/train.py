"""Megatron-Bridge's fine-tuning loop with PSFT."""

from collections.abc import Sequence

from megatron.bridge.training import gpt_step, vlm_step
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.finetune import finetune as bridge_finetune

from megatron_psft.checkpoint.unpickle import DataReader
from megatron_psft.distributed.megatron_lines import read_with
from megatron_psft.distributed.orphans import end_with_launcher
from megatron_psft.nemo.config import PsftConfigContainer
from megatron_psft.nemo.forward_step import BridgeStep, PsftForwardStep
from megatron_psft.nemo.old_policy import OldPolicyCallback


def finetune(
    config: PsftConfigContainer, bridge_step: BridgeStep | None = None, callbacks: Sequence[Callback] = ()
) -> None:
    """Trains from `config.checkpoint.pretrained_checkpoint`, a Hugging Face folder or a Megatron-Core checkpoint, or
    resumes from `config.checkpoint.load`.

    Args:
        config: from a recipe, or `PsftConfigContainer.of` a recipe of Bridge's.
        bridge_step: Bridge's forward step for the model; if unset, that of text models, or of those with a
            vision part.
        callbacks: further ones.
    """
    if bridge_step is None:
        bridge_step = (vlm_step if hasattr(config.model, "vision_config") else gpt_step).forward_step
    forward_step = PsftForwardStep(config.psft, bridge_step)
    end_with_launcher()
    callbacks = [OldPolicyCallback(config.psft, forward_step), *callbacks]
    with read_with(DataReader):
        bridge_finetune(config, forward_step, callbacks=callbacks)
