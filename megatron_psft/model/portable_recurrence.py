"""What Megatron-Core's recurrent layers take from flash-linear-attention and mamba_ssm, in plain PyTorch: for a CPU.

The layers, their parameters and their checkpoints are Megatron-Core's own.
"""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_psft.model.portable_engine import sharded_parameters

_CHUNK = 64
"""Positions computed at once: work within a chunk grows with its square, between chunks the state is handed on."""


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """A filter over each channel's last positions, followed by SiLU.

    Args:
        x: `[b, s, d]`.
        weight: `[d, w]`, that of the position itself last.
        bias: `[d]`.
        activation: `silu` or `swish`.
        cu_seqlens: bounds of the sequences of a packed row; none sees another.

    Returns:
        `[b, s, d]`, and no state.
    """
    assert activation in ("silu", "swish")
    return _filter(x, weight, bias, _lengths(x, cu_seqlens)), None


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Each vector of the last dimension, of length one."""
    return x * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + eps).to(x.dtype)


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None = None, **options: Any
) -> tuple[Tensor, None]:
    """The recurrence of a gated delta net (arXiv 2412.06464, equation 10), in fp32.

    Args:
        q, k: `[b, s, heads, d_k]`, of length one.
        v: `[b, s, heads, d_v]`.
        g: logarithm of the decay, `[b, s, heads]`.
        beta: how much of what the key recalls is replaced, `[b, s, heads]`.
        cu_seqlens: bounds of the sequences of a packed row; each begins with an empty state.

    Returns:
        `[b, s, heads, d_v]`, and no state.
    """
    assert not options["use_qk_l2norm_in_kernel"]
    assert options["initial_state"] is None
    return _recur(q * k.shape[-1] ** -0.5, k, v, g, beta, lengths=_lengths(q, cu_seqlens)).to(v.dtype), None


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,  # noqa: N803 (the kernel's name)
    D: Tensor,  # noqa: N803
    *,
    activation: str,
    headdim: int,
    ngroups: int,
    seq_idx: Tensor | None,
    **options: Any,
) -> Tensor:
    """A layer of Mamba-2 (arXiv 2405.21060) between its projections and before its norm, the recurrence in fp32.

    Args:
        zxbcdt: `[b, s, d]`: the gate, what is filtered (values, keys and queries), and the time steps, in turn.
        conv1d_weight: `[channels, w]`.
        conv1d_bias: `[channels]`.
        dt_bias, A, D: `[heads]`; A is negative.
        activation: `silu`.
        headdim: of a head's values.
        ngroups: keys and queries; `heads / ngroups` heads share each.
        seq_idx: which sequence of a packed row each position is of, `[1, s]`; each begins with an empty state.

    Returns:
        `[b, s, heads * headdim]`, gated.
    """
    assert activation == "silu"
    assert not options["norm_before_gate"]
    lengths = [zxbcdt.shape[1]] if seq_idx is None else seq_idx[0].unique_consecutive(return_counts=True)[1].tolist()
    heads, channels = len(A), len(conv1d_weight)
    inner = heads * headdim
    gate, filtered, steps = zxbcdt.split([inner, channels, heads], -1)
    filtered = _filter(filtered, conv1d_weight, conv1d_bias, lengths)
    values, *rest = filtered.split([inner, (channels - inner) // 2, (channels - inner) // 2], -1)
    values = values.float().unflatten(-1, (heads, headdim))
    key, query = (x.unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, 2) for x in rest)
    steps = F.softplus(steps.float() + dt_bias)
    output = _recur(query, key, values * steps[..., None], steps * A, lengths=lengths) + values * D.float()[:, None]
    return (output.flatten(2) * F.silu(gate.float())).to(zxbcdt.dtype)


class PortableGroupNorm(torch.nn.Module):
    """RMSNorm of each group of a rank's channels, behind Mamba's gate."""

    tp_group: torch.distributed.ProcessGroup  # the layer says which

    def __init__(self, hidden_size: int, *, eps: float, group_size: int, dtype: torch.dtype, **_: Any) -> None:
        super().__init__()
        self._eps, self._group_size = eps, group_size
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., hidden_size]` to the same."""
        groups = hidden.unflatten(-1, (-1, self._group_size))
        return F.rms_norm(groups, (self._group_size,), None, self._eps).flatten(-2) * self.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return sharded_parameters(self, prefix, {"weight": 0}, sharded_offsets, metadata, self.tp_group)


def _lengths(x: Tensor, cu_seqlens: Tensor | None) -> Sequence[int]:
    return [x.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()


def _filter(x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Sequence[int]) -> Tensor:
    """`[b, s, d]`, in sequences of `lengths`, to the same."""
    # No convolution of PyTorch's: which kernel computes it may depend on whether there will be a gradient.
    width = weight.shape[-1]
    windows = (F.pad(part, (0, 0, width - 1, 0)).unfold(1, width, 1) for part in x.split(lengths, 1))
    output = torch.cat([(part * weight).sum(-1) for part in windows], 1)
    return F.silu(output if bias is None else output + bias)


def _recur(*inputs: Tensor, lengths: Sequence[int]) -> Tensor:
    """`_recurrence` within each sequence of a row: `[b, s, heads, d]` and `[b, s, heads]`, to `[b, s, heads, d_v]`."""
    by_head = [x.float().transpose(1, 2).split(lengths, 2) for x in inputs]
    return torch.cat([_recurrence(*parts) for parts in zip(*by_head, strict=True)], 2).transpose(1, 2)


def _recurrence(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor | None = None) -> Tensor:
    """`S_t = exp(g_t) S_(t-1) + k_t u_t` and `o_t = q_t S_t` over one sequence, `[b, heads, s, d]` and `[b, heads, s]`.

    The update `u_t` is the value; with `beta` it is `beta_t (v_t - k_t exp(g_t) S_(t-1))`, what the state lacks of it.
    """
    outputs = []
    state = query.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1])
    strengths = [None] * len(query.split(_CHUNK, 2)) if beta is None else beta[..., None].split(_CHUNK, 2)
    chunks = zip(*(x.split(_CHUNK, 2) for x in (query, key, value, log_decay)), strengths, strict=True)
    for q, k, update, g, strength in chunks:
        total = g.double().cumsum(-1)  # since the chunk's start; in fp32 differences of such sums would lose digits
        later = torch.ones(*2 * g.shape[-1:], dtype=torch.bool).tril()
        decay = (total[..., :, None] - total[..., None, :]).masked_fill(~later, float("-inf")).exp().float()  # j to i
        from_start, to_end = total.exp().float()[..., None], (total[..., -1:] - total).exp().float()[..., None]
        if strength is not None:
            # Within the chunk, each update needs those before it: a triangular system, with ones on its diagonal.
            recalled = strength * (k @ k.mT) * decay
            lacking = strength * (update - from_start * (k @ state))
            update = torch.linalg.solve_triangular(recalled, lacking, upper=False, unitriangular=True)
        outputs.append(from_start * (q @ state) + ((q @ k.mT) * decay) @ update)
        state = from_start[..., -1:, :] * state + (k * to_end).mT @ update
    return torch.cat(outputs, 2)


@functools.cache
def stand_in_for_kernels() -> None:
    """Has Megatron-Core's recurrent layers compute with these functions, for the whole process."""
    common: Any = importlib.import_module("megatron.core.ssm.gated_delta_net.common")
    layer: Any = importlib.import_module("megatron.core.ssm.gated_delta_net.gdn")
    assert not common.HAVE_FLA, "the kernels themselves are here"
    common.HAVE_FLA, common.l2norm = True, l2norm
    layer.causal_conv1d, layer.chunk_gated_delta_rule = causal_conv1d, chunk_gated_delta_rule
    mixer: Any = importlib.import_module("megatron.core.ssm.mamba_mixer")
    assert not mixer.HAVE_MAMBA_SSM, "the kernels themselves are here"
    mixer.HAVE_MAMBA_SSM, mixer.ExtendedRMSNorm = True, PortableGroupNorm
    mixer.mamba_split_conv1d_scan_combined = mamba_split_conv1d_scan_combined
    mixer._check_mamba_sequence_packing_support = lambda for_inference_not_training: (True, None)
