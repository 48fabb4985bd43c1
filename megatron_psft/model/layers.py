"""Norm and attention for machines without Transformer Engine, in plain PyTorch."""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` that may run on a shard of the sequence.

    Megatron-Core's wrapper of the same module refuses sequence parallelism. All that is needed is to mark the weight,
    so that `finalize_model_grads` sums its gradient over the tensor-parallel group, whose ranks each see a part of the
    sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (no attribute of a Parameter)


class Attention(torch.nn.Module):
    """Causal core attention on `scaled_dot_product_attention`.

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
        assert (config.context_parallel_size, config.attention_dropout) == (1, 0.0)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attends within each row of the batch.

        Args:
            query: `[s, b, heads, d]`, the heads of this tensor-parallel rank.
            key, value: `[s, b, groups, d]`; `heads / groups` query heads share each.
            attention_mask: ignored, as the mask is causal; the remaining arguments must be absent.

        Returns:
            `[s, b, heads * d]`.
        """
        assert (attention_bias, packed_seq_params) == (None, None)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.permute(2, 0, 1, 3).flatten(2)
