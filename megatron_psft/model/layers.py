"""Norm and attention for machines without Transformer Engine, in plain PyTorch."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_psft.distributed.context_split import context_positions


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` that may run on a shard of the sequence.

    Megatron-Core's wrapper of the same module refuses sequence parallelism. All that is needed is to mark the weight,
    so that `finalize_model_grads` sums its gradient over the tensor-parallel group, whose ranks each see a part of the
    sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (no attribute of a Parameter)


@dataclass
class PackedRowParams(PackedSeqParams):
    """Megatron-Core's description of a packed row, with its numbers on the host, where the loop over segments runs."""

    segments: tuple[int, ...] = ()
    """Lengths before the split over context-parallel ranks, each cut evenly by it."""
    seq_idx: Tensor | None = None
    """Which segment each position of the row is of, int32 `[1, row]`: what Mamba's layers go by."""

    def row_order(self, ranks: int) -> Tensor:
        """Where in the concatenated parts of all context-parallel ranks each position of the row is, int64 `[row]`."""
        if ranks not in self._row_orders:
            held = np.concatenate([context_positions(self.segments, rank, ranks) for rank in range(ranks)])
            self._row_orders[ranks] = torch.from_numpy(np.argsort(held)).to(self.cu_seqlens_q.device)
        return self._row_orders[ranks]

    @cached_property
    def _row_orders(self) -> dict[int, Tensor]:
        return {}


def packed_row_params(segments: tuple[int, ...], device: torch.device) -> PackedRowParams:
    """What attention, rotary embedding and recurrences need to keep the segments of a row apart.

    There is one set of bounds: padding within a segment stands behind its record, where no token of it looks.
    """
    bounds = torch.tensor([0, *accumulate(segments)], dtype=torch.int32, device=device)
    owners = np.repeat(np.arange(len(segments), dtype=np.int32), segments)
    return PackedRowParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        # Transformer Engine reads these under context parallelism; the same tensor says that there is no gap.
        cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds,
        max_seqlen_q=max(segments),
        max_seqlen_kv=max(segments),
        segments=segments,
        seq_idx=torch.from_numpy(owners)[None].to(device),
    )


class Attention(torch.nn.Module):
    """Causal core attention on `scaled_dot_product_attention`: within each row, or within each segment of a packed row,
    whose positions may be spread over context-parallel ranks.

    Padding stands on the right, so that causality alone keeps it out of every real token's sight and no mask is needed.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert (attention_type, attn_mask_type) == ("self", AttnMaskType.causal)
        assert config.attention_dropout == 0.0
        self.softmax_scale = softmax_scale
        # As Megatron-Core has it: how many positions before its own a position sees.
        self.window = None if config.window_size is None else config.window_size[0]
        self.context_size = config.context_parallel_size
        self.context_group = None if pg_collection is None else pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRowParams | None = None,
    ) -> Tensor:
        """Attends within each row of the batch, or within each segment of a packed row.

        Args:
            query: `[s, b, heads, d]`, the heads of this tensor-parallel rank; `[s, heads, d]` of a packed row, the
                positions of this context-parallel rank.
            key, value: the same with `groups` for `heads`; `heads / groups` query heads share each.
            attention_mask: ignored, as the mask is causal; `attention_bias` must be absent.
            packed_seq_params: from `packed_row_params`, for a packed row.

        Returns:
            `[s, b, heads * d]`, or `[s, heads * d]` of a packed row.
        """
        assert attention_bias is None
        if packed_seq_params is None:
            assert self.context_size == 1, "only packed rows are split over context-parallel ranks"
            return self._attend(query, key, value)
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        if self.context_size == 1:
            parts = (x.split(packed_seq_params.segments) for x in (query, key, value))
            outputs = [self._attend(*part) for part in zip(*parts, strict=True)]
        else:
            outputs = self._attend_in_chunks(query, self._gather(key, value, packed_seq_params), packed_seq_params)
        return torch.cat(outputs).squeeze(1)

    def _gather(self, key: Tensor, value: Tensor, row: PackedRowParams) -> Tensor:
        """Key and value of all of the row, `[2, row, b, groups, d]`; the gradients of all ranks' uses are added up."""
        both = gather_from_sequence_parallel_region(torch.stack([key, value], dim=1), group=self.context_group)
        return both.index_select(0, row.row_order(self.context_size)).transpose(0, 1)

    def _attend_in_chunks(self, query: Tensor, key_value: Tensor, row: PackedRowParams) -> list[Tensor]:
        """This rank's two chunks of each segment, which see the segment up to their own end."""
        assert self.context_group is not None
        ranks, rank = self.context_size, self.context_group.rank()
        outputs, start, own = [], 0, 0
        for length in row.segments:
            chunk = length // (2 * ranks)
            for index in (rank, 2 * ranks - 1 - rank):
                key, value = key_value[:, start : start + (index + 1) * chunk]
                outputs.append(self._attend(query[own : own + chunk], key, value))
                own += chunk
            start += length
        return outputs

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The queries are the last positions of the keys, `[s, b, heads, d]` against `[t, b, groups, d]`."""
        queries, keys = len(query), len(key)
        is_plain = queries == keys and (self.window is None or self.window >= keys - 1)
        mask = None if is_plain else self._mask(query, keys)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _mask(self, query: Tensor, keys: int) -> Tensor:
        """What each query sees, `[s, t]`."""
        ahead = keys - len(query)
        mask = query.new_ones(len(query), keys, dtype=torch.bool).tril(ahead)
        return mask if self.window is None else mask.triu(ahead - self.window)
