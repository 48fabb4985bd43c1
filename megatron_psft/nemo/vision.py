"""Megatron-Bridge's models that see: which of its forward steps trains one, and what Bridge 0.6 computes wrongly.

What is mended is mended on the instance, before it is wrapped and its weights are read; no class is touched.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.models.qwen_vl import qwen3_vl_step
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.utils import Qwen3VLVisionPatchMerger
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.vision_model import Qwen3VLVisionModel
from megatron.bridge.training import gpt_step, vlm_step
from megatron.bridge.training.config import ConfigContainer
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import AutoConfig

from megatron_psft.nemo.forward_step import BridgeStep

log = logging.getLogger(__name__)


def sees(config: ConfigContainer) -> bool:
    """Whether the model has a vision part."""
    return hasattr(config.model, "vision_config")


def bridge_step_of(config: ConfigContainer) -> BridgeStep:
    """Bridge's forward step for the model and its data: of text, of images, or of images in rows that the step itself
    packs, as recipes for Qwen3-VL ask."""
    if not sees(config):
        return gpt_step.forward_step  # type: ignore[no-any-return]
    packs = ("enable_in_batch_packing", "defer_in_batch_packing_to_step")
    module = qwen3_vl_step if all(getattr(config.dataset, name, False) for name in packs) else vlm_step
    return module.forward_step  # type: ignore[no-any-return]


def set_right(config: ConfigContainer) -> None:
    """What Bridge builds wrongly of a model that sees; before it is built."""
    _set_sections(config)
    config.model.register_pre_wrap_hook(_mend)


def _set_sections(config: ConfigContainer) -> None:
    """Which frequencies turn by time, height and width: for Qwen2.5-VL Bridge takes those of the published models for
    granted, whatever the model's config.json says."""
    folder = config.checkpoint.pretrained_checkpoint
    if folder is None or (Path(folder).exists() and not (Path(folder) / "config.json").is_file()):
        return  # nothing, or a checkpoint of Bridge's, to start from
    found = (AutoConfig.from_pretrained(folder).get_text_config().rope_parameters or {}).get("mrope_section")
    if found is not None and list(config.model.mrope_section) != list(found):
        log.info("set right of Megatron-Bridge's model: mrope_section %s, as its config.json has it", found)
        config.model.mrope_section = list(found)


def _mend(chunks: list[Any]) -> list[Any]:
    """A hook for Bridge's provider: `register_pre_wrap_hook`."""
    log.info(
        "set right of Megatron-Bridge's model: the GELU of Qwen3-VL's mergers, gradients of its deepstack, contiguity"
    )
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, Qwen3VLVisionPatchMerger):
                # It takes the tower's activation, the approximation by tanh: with images, logits are off by 2e-3.
                module.activation_func = torch.nn.functional.gelu
            elif isinstance(module, Qwen3VLVisionModel) and chunk.config.sequence_parallel:
                module.register_forward_hook(partial(_sum_deepstack_gradients, group=chunk.tp_group))
            elif isinstance(module, TransformerBlock):
                module.register_forward_pre_hook(_contiguous_input, with_kwargs=True)
    return chunks


def _sum_deepstack_gradients(
    module: torch.nn.Module, args: Any, output: tuple[Tensor, list[Tensor]], *, group: ProcessGroup
) -> tuple[Tensor, list[Tensor]]:
    """What early layers of the language model add of an image is cut up for sequence parallelism, and each rank would
    go on with the gradient from its own part."""
    embeddings, added = output
    return embeddings, [copy_to_tensor_model_parallel_region(it, group=group) for it in added]


def _contiguous_input(module: torch.nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Qwen2.5-VL hands rows on as they lie once transposed, which the next pipeline stage cannot be sent."""
    hidden = options.get("hidden_states")
    return args, options if hidden is None else {**options, "hidden_states": hidden.contiguous()}
