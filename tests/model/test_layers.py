"""Norm and attention against transformers' layers and against formulas written out."""

import math
import os
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from megatron_psft.distributed.context_split import context_positions
from megatron_psft.model.layers import Attention, RMSNorm, packed_row_params


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


def make_attention(softmax_scale: float | None = None, context_group=None, window=None) -> Attention:
    context_size = 1 if context_group is None else context_group.size()
    config = SimpleNamespace(context_parallel_size=context_size, attention_dropout=0.0, window_size=window)
    groups = SimpleNamespace(cp=context_group)
    return Attention(config, 1, AttnMaskType.causal, "self", softmax_scale=softmax_scale, pg_collection=groups)


def attend_by_formula(query, key, value, scale, sees=None):
    """Every query head of every row on its own: `[s, b, heads, d]` to `[s, b, heads * d]`."""
    length, rows, heads, _ = query.shape
    heads_per_group = heads // key.shape[2]
    rows_of_heads = []
    for row in range(rows):
        for head in range(heads):
            group = head // heads_per_group
            outputs = []
            for position in range(length):
                seen = slice(0 if sees is None else max(0, position + 1 - sees), position + 1)
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


@pytest.mark.parametrize("before", [0, 2, 4, 9])
def test_a_window_hides_what_is_further_back(before):
    """Also from the segments of a packed row, each from its own start."""
    torch.manual_seed(before)
    query, key, value = (torch.randn(8, 1, heads, 4) for heads in (4, 2, 2))
    attention = make_attention(window=(before, 0))
    parts = [
        attend_by_formula(*(x[rows] for x in (query, key, value)), 0.5, before + 1)
        for rows in (slice(0, 3), slice(3, 8))
    ]
    torch.testing.assert_close(attention(query, key, value), attend_by_formula(query, key, value, 0.5, before + 1))
    row = packed_row_params((3, 5), torch.device("cpu"))
    packed = attention(*(x.squeeze(1) for x in (query, key, value)), packed_seq_params=row)
    torch.testing.assert_close(packed, torch.cat(parts).squeeze(1))


def test_attention_is_causal_in_value_and_gradient():
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


def packed_inputs(segments: tuple[int, ...], groups: int) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output, of a packed row."""
    generator = torch.Generator().manual_seed(sum(segments) + groups)
    shapes = [(6, 8), (groups, 8), (groups, 8), (48,)]
    return [torch.randn(sum(segments), *shape, generator=generator) for shape in shapes]


def attend_packed_by_formula(segments: tuple[int, ...], groups: int) -> list[torch.Tensor]:
    """Output, and gradients of query, key and value, with every segment on its own."""
    *inputs, upstream = packed_inputs(segments, groups)
    own = [tensor.requires_grad_() for tensor in inputs]
    parts = zip(*(tensor.unsqueeze(1).split(segments) for tensor in own), strict=True)
    output = torch.cat([attend_by_formula(*part, 1 / math.sqrt(8)).squeeze(1) for part in parts])
    output.backward(upstream)
    return [output.detach(), *(tensor.grad for tensor in own)]


def attend_packed(segments: tuple[int, ...], groups: int, attention: Attention, held) -> list[torch.Tensor]:
    """The same by the layer, on the positions `held`."""
    *inputs, upstream = (tensor[held] for tensor in packed_inputs(segments, groups))
    own = [tensor.requires_grad_() for tensor in inputs]
    output = attention(*own, packed_seq_params=packed_row_params(segments, torch.device("cpu")))
    output.backward(upstream)
    return [output.detach(), *(tensor.grad for tensor in own)]


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("segments", [(7,), (1, 1, 5), (4, 1, 2, 3)], ids=str)
def test_segments_of_a_packed_row_do_not_see_each_other(segments, groups):
    found = attend_packed(segments, groups, make_attention(), slice(None))
    for one, expected in zip(found, attend_packed_by_formula(segments, groups), strict=True):
        torch.testing.assert_close(one, expected)


def test_bounds_of_a_packed_row_end_with_the_row_and_its_longest_segment_is_known():
    row = packed_row_params((4, 1, 3), torch.device("cpu"))
    assert row.qkv_format == "thd"
    for name in ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"):
        assert getattr(row, name).tolist() == [0, 4, 5, 8]
        assert getattr(row, name).dtype == torch.int32
    assert (row.max_seqlen_q, row.max_seqlen_kv) == (4, 4)


def _attend_on_context_ranks(segments: tuple[int, ...], groups: int):
    import torch.distributed as dist

    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import process_group

    size = int(os.environ["WORLD_SIZE"])
    with process_group(detect(0), size):
        held = torch.from_numpy(context_positions(segments, dist.get_rank(), size))
        return held, attend_packed(segments, groups, make_attention(context_group=dist.group.WORLD), held)


@pytest.mark.parametrize(
    ("size", "segments", "groups"), [(2, (4, 12, 8), 2), (3, (6, 18), 1), (4, (8, 24, 8), 6)], ids=str
)
def test_context_parallel_ranks_together_are_one(pool, size, segments, groups):
    """Values and gradients: what a rank's keys get from the queries of all others included."""
    results = pool.run(_attend_on_context_ranks, size, segments, groups)
    everywhere = torch.cat([held for held, _ in results])
    for index, expected in enumerate(attend_packed_by_formula(segments, groups)):
        found = torch.cat([outputs[index] for _, outputs in results])
        torch.testing.assert_close(found, expected[everywhere])


def test_rows_of_a_record_each_are_not_split_over_context_parallel_ranks():
    attention = make_attention(context_group=SimpleNamespace(size=lambda: 2))
    with pytest.raises(AssertionError, match="only packed rows"):
        attention(*(torch.zeros(4, 1, 2, 8) for _ in range(3)))
