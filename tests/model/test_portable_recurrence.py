"""The recurrence in chunks against its formula, position by position; sequences of a packed row against each alone."""

import pytest
import torch

from megatron_psft.model.portable_recurrence import (
    causal_conv1d,
    chunk_gated_delta_rule,
    l2norm,
    mamba_split_conv1d_scan_combined,
)

LENGTHS = (1, 70, 130)  # within a chunk and over several
BOUNDS = torch.tensor([0, 1, 71, 201], dtype=torch.int32)
OPTIONS = {"use_qk_l2norm_in_kernel": False, "initial_state": None, "output_final_state": False}


def inputs(length: int) -> list[torch.Tensor]:
    """Of a gated delta net: q, k, v, g and beta, with two heads."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, length, 2, size, generator=generator) for size in (8, 8, 6))
    log_decay, beta = (torch.randn(1, length, 2, generator=generator) for _ in range(2))
    found = [l2norm(query), l2norm(key), value, -torch.nn.functional.softplus(log_decay), beta.sigmoid()]
    return [it.requires_grad_() for it in found]


def by_positions(query, key, value, log_decay, beta):
    state, outputs = torch.zeros(1, 2, 8, 6), []
    for q, k, v, g, b in zip(*(it.unbind(1) for it in (query, key, value, log_decay, beta)), strict=True):
        state = state * g.exp()[..., None, None]
        wrong = v - torch.einsum("bhk,bhkv->bhv", k, state)
        state = state + torch.einsum("bhk,bhv->bhkv", k, b[..., None] * wrong)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q / 8**0.5, state))
    return torch.stack(outputs, 1)


def test_chunks_compute_the_recurrence_and_its_gradient():
    arguments = inputs(201)
    found, expected = chunk_gated_delta_rule(*arguments, **OPTIONS)[0], by_positions(*arguments)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = (torch.autograd.grad(output, arguments, upstream) for output in (found, expected))
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)


def test_no_sequence_of_a_packed_row_sees_another():
    arguments = inputs(201)
    filters, bias = torch.randn(4, 3), torch.randn(4)
    channels = torch.randn(1, 201, 4)
    packed = chunk_gated_delta_rule(*arguments, cu_seqlens=BOUNDS, **OPTIONS)[0]
    filtered = causal_conv1d(channels, filters, bias, "silu", BOUNDS)[0]
    for number, length in enumerate(LENGTHS):
        own = slice(int(BOUNDS[number]), int(BOUNDS[number]) + length)
        alone = chunk_gated_delta_rule(*(it[:, own] for it in arguments), **OPTIONS)[0]
        torch.testing.assert_close(packed[:, own], alone)
        torch.testing.assert_close(filtered[:, own], causal_conv1d(channels[:, own], filters, bias, "silu")[0])


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_filter_is_a_causal_convolution(has_bias):
    channels, filters, bias = torch.randn(2, 9, 4), torch.randn(4, 3), torch.randn(4) if has_bias else None
    expected = torch.nn.functional.conv1d(channels.mT, filters[:, None], bias, padding=2, groups=4)[..., :9].mT
    found = causal_conv1d(channels, filters, bias, "swish")[0]
    torch.testing.assert_close(found, torch.nn.functional.silu(expected))


def mamba_inputs(length: int) -> dict[str, torch.Tensor]:
    """Of four heads of three values, two sharing keys and queries of five."""
    generator = torch.Generator().manual_seed(2)
    sizes = {"zxbcdt": (2, length, 12 + 12 + 2 * 10 + 4), "conv1d_weight": (32, 3), "conv1d_bias": (32,)}
    sizes |= {"dt_bias": (4,), "A": (4,), "D": (4,)}
    found = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return {**found, "A": -found["A"].exp()}


MAMBA = {"activation": "silu", "headdim": 3, "ngroups": 2, "norm_before_gate": False}


def mamba_by_positions(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D):  # noqa: N803
    gate, filtered, steps = zxbcdt.split([12, 32, 4], -1)
    filtered = causal_conv1d(filtered, conv1d_weight, conv1d_bias, "silu")[0]
    state, outputs = torch.zeros(2, 4, 5, 3), []
    for x, step in zip(filtered.unbind(1), torch.nn.functional.softplus(steps + dt_bias).unbind(1), strict=True):
        value, key, query = x[:, :12].view(2, 4, 3), x[:, 12:22].view(2, 2, 5), x[:, 22:].view(2, 2, 5)
        key, query = (it[:, [0, 0, 1, 1]] for it in (key, query))
        written = torch.einsum("bhk,bhv->bhkv", key, step[..., None] * value)
        state = state * (step * A).exp()[..., None, None] + written
        outputs.append(torch.einsum("bhk,bhkv->bhv", query, state) + D[:, None] * value)
    return torch.stack(outputs, 1).flatten(2) * torch.nn.functional.silu(gate)


def test_mamba_in_chunks_is_its_recurrence():
    arguments = mamba_inputs(150)
    found = mamba_split_conv1d_scan_combined(**arguments, **MAMBA, seq_idx=None)
    torch.testing.assert_close(found, mamba_by_positions(**arguments), atol=1e-4, rtol=1e-4)


def test_no_sequence_of_a_row_sees_another_in_mamba():
    arguments = mamba_inputs(201)
    owners = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]
    packed = mamba_split_conv1d_scan_combined(**arguments, **MAMBA, seq_idx=owners)
    for start, end in zip(BOUNDS[:-1].tolist(), BOUNDS[1:].tolist(), strict=True):
        own = {**arguments, "zxbcdt": arguments["zxbcdt"][:, start:end]}
        alone = mamba_split_conv1d_scan_combined(**own, **MAMBA, seq_idx=None)
        torch.testing.assert_close(packed[:, start:end], alone, atol=1e-4, rtol=1e-4)
