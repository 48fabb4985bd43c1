"""What a model that sees needs on a CPU besides model/portable_engine.py, whose stand-ins for the layers of Transformer
Engine are those of language models."""

from typing import Any
from unittest import mock

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn import functional as F

from megatron_psft.model import portable_engine
from megatron_psft.model.layers import packed_row_params


class SeeingAttention(portable_engine.PortableAttention):
    """With rows as Bridge packs them, and without a causal mask in a vision tower."""

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: AttnMaskType, *args: Any, **options: Any
    ) -> None:
        super().__init__(config, layer_number, AttnMaskType.causal, *args, **options)
        self._is_causal = attn_mask_type == AttnMaskType.causal

    def forward(
        self, *args: Any, packed_seq_params: PackedSeqParams | None = None, attn_mask_type: Any = None, **options: Any
    ) -> Tensor:
        if packed_seq_params is not None:
            bounds = packed_seq_params.cu_seqlens_q_padded
            bounds = packed_seq_params.cu_seqlens_q if bounds is None else bounds
            options["packed_seq_params"] = packed_row_params(tuple(bounds.diff().tolist()), bounds.device)
        return super().forward(*args, **options)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._is_causal:
            return super()._attend(query, key, value)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(2)


def stand_in() -> None:
    """For the whole process, before Megatron-Bridge is imported."""
    SeeingAttention.__name__ = "TEDotProductAttention"
    with mock.patch.dict(portable_engine._STAND_INS, TEDotProductAttention=SeeingAttention):
        portable_engine.stand_in_for_engine()
