"""Floating-point operations of a batch, and what share of a GPU's peak they make."""

from collections.abc import Iterable

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
    squared."""
    hidden, kv = shape.hidden_size, shape.num_query_groups * shape.head_dim
    queries = shape.num_attention_heads * shape.head_dim
    mlp = sum(_mlp_weights(shape, layer) for layer in range(shape.num_layers))
    weights = shape.num_layers * hidden * (2 * queries + 2 * kv) + mlp + hidden * shape.vocab_size
    tokens = squares = 0
    for length in lengths:
        tokens += length
        squares += length * length
    return 2.0 * weights * tokens + 2.0 * shape.num_layers * queries * squares


def _mlp_weights(shape: ModelShape, layer: int) -> int:
    """Of those that a token meets: its experts' and the router's, or the plain MLP's."""
    experts = shape.experts
    if experts is None or not shape.has_experts(layer):
        return 3 * shape.hidden_size * shape.ffn_hidden_size
    return shape.hidden_size * (3 * experts.per_token * experts.ffn_hidden_size + experts.count)


def peak_flops(device: torch.device) -> float | None:
    """Peak of a GPU in bf16, operations per second; None where its name is not known."""
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)
