"""What a model needs on a GPU is named before Megatron-Bridge is imported."""

import importlib.util

import pytest
import torch

from megatron_psft.errors import UserError
from megatron_psft.sources.bridge_import import check_kernels


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("qwen3_next", r"\(qwen3_next\) .* needs fla on a GPU: pip install flash-linear-attention$"),
        ("nemotron_h", r"\(nemotron_h\) .* needs mamba_ssm on a GPU: pip install mamba-ssm causal-conv1d$"),
    ],
)
def test_kernels_that_are_missing_on_a_gpu_are_named(monkeypatch, model_type, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_kernels(model_type)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_kernels("gemma3_text")
    with pytest.raises(UserError, match=message):
        check_kernels(model_type)
