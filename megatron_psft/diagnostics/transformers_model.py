"""What transformers makes of a Hugging Face model: the other side of a comparison with it, in fp32 on the CPU."""

from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from megatron_psft.errors import UserError, first_line
from megatron_psft.hf.weights import open_tensors, weight_files

_BYTES = 4
_BESIDE_BYTES = 2**30
"""Of activations, logits and a weight that is being converted."""


def needed_bytes(folder: Path, field: str) -> int:
    """Host memory that the model takes in fp32, which its weights tell. Raises UserError, which names `field`, for
    weights that are missing or damaged."""
    elements = 0
    for file in weight_files(folder, field):
        with open_tensors(folder / file, field) as opened:
            elements += sum(prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118 (a file)
    return elements * _BYTES + _BESIDE_BYTES


def load_model(folder: Path) -> Any:
    """The model that transformers loads from `folder`, in fp32.

    Raises:
        UserError: transformers cannot load it, or would draw some of its weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText  # seconds
    from transformers.utils import logging as transformers_logging

    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        sees = hasattr(AutoConfig.from_pretrained(folder, trust_remote_code=False), "vision_config")
        auto_class: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model, found = auto_class.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"transformers cannot load {folder}: {type(error).__name__}: {first_line(error)}") from None
    finally:
        if shows_bars:
            transformers_logging.enable_progress_bar()
    if found["missing_keys"]:
        raise UserError(f"transformers finds no {min(found['missing_keys'])} in {folder}, and would draw it at random")
    return model.eval()


@torch.no_grad()
def log_probs(model: Any, tokens: Tensor) -> Tensor:
    """Log-probabilities of what comes after each of `tokens`, `[b, s]` int64, in the model's own precision: fp32
    `[b, s, vocabulary]`."""
    logits: Tensor = model(input_ids=tokens).logits
    return logits.float().log_softmax(dim=-1)
