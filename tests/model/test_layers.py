"""Norm and attention against transformers' layers and against formulas written out."""

import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from megatron_psft.model.layers import Attention, RMSNorm


def make_norm(hidden_size: int, *, eps: float, sequence_parallel: bool = False) -> RMSNorm:
    config = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=sequence_parallel)
    return RMSNorm(config, hidden_size, eps=eps)


def test_norm_of_a_row_done_by_hand():
    norm = make_norm(2, eps=0.5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -1.0]))
    # mean square of (1, 2) is 2.5; with epsilon 3.
    expected = torch.tensor([2.0 * 1 / math.sqrt(3), -1.0 * 2 / math.sqrt(3)])
    torch.testing.assert_close(norm(torch.tensor([1.0, 2.0])), expected)


def test_norm_has_the_value_and_gradients_of_transformers():
    torch.manual_seed(0)
    reference, norm = Qwen2RMSNorm(24, eps=0.01), make_norm(24, eps=0.01)
    weight, hidden, upstream = torch.randn(24), torch.randn(5, 3, 24), torch.randn(5, 3, 24)
    results = []
    for module in (norm, reference):
        with torch.no_grad():
            module.weight.copy_(weight)
        own = hidden.clone().requires_grad_()
        output = module(own)
        output.backward(upstream)
        results.append((output.detach(), own.grad, module.weight.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_says_whether_its_gradient_is_of_a_part_of_the_sequence(sequence_parallel):
    assert make_norm(8, eps=1e-6, sequence_parallel=sequence_parallel).weight.sequence_parallel is sequence_parallel


def make_attention(softmax_scale: float | None = None) -> Attention:
    config = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0)
    return Attention(config, 1, AttnMaskType.causal, "self", softmax_scale=softmax_scale)


def attend_by_formula(query, key, value, scale):
    """Every query head of every row on its own: `[s, b, heads, d]` to `[s, b, heads * d]`."""
    length, rows, heads, _ = query.shape
    heads_per_group = heads // key.shape[2]
    rows_of_heads = []
    for row in range(rows):
        for head in range(heads):
            group = head // heads_per_group
            outputs = []
            for position in range(length):
                seen = slice(0, position + 1)
                weights = torch.softmax(key[seen, row, group] @ query[position, row, head] * scale, dim=0)
                outputs.append(weights @ value[seen, row, group])
            rows_of_heads.append(torch.stack(outputs))
    stacked = torch.stack(rows_of_heads).unflatten(0, (rows, heads))
    return stacked.permute(2, 0, 1, 3).flatten(2)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("softmax_scale", [None, 0.3])
def test_attention_and_its_gradients_follow_the_formula(groups, softmax_scale):
    torch.manual_seed(groups)
    shapes = [(5, 2, 6, 8), (5, 2, groups, 8), (5, 2, groups, 8)]
    upstream = torch.randn(5, 2, 48)
    inputs = [torch.randn(shape) for shape in shapes]
    results = []
    for attend in (
        make_attention(softmax_scale),
        lambda *tensors: attend_by_formula(*tensors, softmax_scale or 1 / math.sqrt(8)),
    ):
        own = [tensor.clone().requires_grad_() for tensor in inputs]
        output = attend(*own)
        output.backward(upstream)
        results.append([output.detach(), *(tensor.grad for tensor in own)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_what_stands_on_the_right_reaches_neither_value_nor_gradient_of_what_stands_on_the_left():
    torch.manual_seed(0)
    query, key, value = (torch.randn(6, 2, heads, 4) for heads in (4, 2, 2))
    results = []
    for padding in (0.0, 100.0):
        own = [tensor.clone() for tensor in (query, key, value)]
        for tensor in own:
            tensor[4:, 1] = padding
            tensor.requires_grad_()
        output = make_attention()(*own)
        output[:4].sum().backward()
        results.append([output[:4].detach(), *(tensor.grad[:4] for tensor in own)])
        assert all(not tensor.grad[4:].any() for tensor in own)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_rows_do_not_see_each_other():
    torch.manual_seed(0)
    query, key, value = (torch.randn(6, 3, heads, 4) for heads in (4, 2, 2))
    together = make_attention()(query, key, value)
    for row in range(3):
        own = slice(row, row + 1)
        torch.testing.assert_close(together[:, own], make_attention()(query[:, own], key[:, own], value[:, own]))
