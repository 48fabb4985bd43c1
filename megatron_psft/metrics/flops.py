"""Floating-point operations of a batch, and what share of a GPU's peak they make."""

from collections.abc import Iterable
from math import prod

import torch

from megatron_psft.model.shape import ModelShape

# Dense bf16 peak of one GPU, operations per second, by the first of these that is part of its name (NVIDIA's data
# sheets, without sparsity).
_PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
}


def forward_flops(shape: ModelShape, lengths: Iterable[int]) -> float:
    """Operations of one forward pass over records of these lengths in tokens; causal attention costs half of length
    squared, without what is before a sliding window."""
    queries = shape.num_attention_heads * shape.head_dim
    weights = sum(_layer_weights(shape, layer) for layer in range(shape.num_layers))
    weights += shape.hidden_size * shape.vocab_size
    tokens = squares = 0
    for length in lengths:
        tokens += length
        unseen = 0 if shape.sliding_window is None else max(0, length - shape.sliding_window)
        squares += length * length - unseen * unseen
    return 2.0 * weights * tokens + 2.0 * shape.num_layers * queries * squares


def passes_of_training(*, has_adapters: bool) -> int:
    """Forward passes that a forward and a backward pass are worth; frozen weights take no product for a gradient of
    theirs, and adapters themselves are too thin to count."""
    return 2 if has_adapters else 3


def _layer_weights(shape: ModelShape, layer: int) -> int:
    """Elements of the matrices that a token meets in a layer, with those of its experts alone."""
    weights = sum(prod(dims) for dims in shape.layer_parameters(layer).values() if len(dims) == 2)
    if shape.experts is not None and shape.has_experts(layer):
        weights += shape.experts.per_token * sum(map(prod, shape.expert_parameters.values()))
    return weights


def peak_flops(device: torch.device) -> float | None:
    """Peak of a GPU in bf16, operations per second; None where its name is not known."""
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)
