"""Transformer Engine's layers, as Megatron-Core has them, in plain PyTorch: for a CPU, where the engine cannot be.

Each has the name and the parameters of the one that it stands in for, since Megatron-Bridge's layer specifications name
these classes, and its conversion these parameters (`linear_qkv.layer_norm_weight`, `linear_fc1.weight3`). So its models
are built and converted here as they are on a GPU, and checkpoints are the same.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from packaging.version import Version
from torch import Tensor
from torch.nn import functional as F

from megatron_psft.model.layers import Attention, PackedRowParams, packed_row_params

_VERSION = "2.9.0"
"""That Megatron-Core is told where it asks: what these layers do, the engine does from before this release on."""


class PortableNorm(torch.nn.Module):
    """RMSNorm or LayerNorm, of the whole hidden size or of a head; its weight may be stored with one taken off."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        assert not config.fused_residual_rmsnorm
        self.eps, self._is_centred = eps, config.layernorm_zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.bias: torch.nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (no attribute of a Parameter)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., hidden_size]` to the same."""
        return _normalized(hidden, self.weight, self.bias, self.eps, is_centred=self._is_centred)


def _normalized(hidden: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, is_centred: bool) -> Tensor:
    weight = weight + 1 if is_centred else weight
    if bias is None:
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, eps)
    return F.layer_norm(hidden, (hidden.shape[-1],), weight, bias, eps)


class PortableLinear(torch.nn.Module):
    """The linear layer that tensor-parallel ranks hold whole, as MLA's projections to low ranks."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str,
        config: TransformerConfig,
        bias: bool,
        skip_bias_add: bool,
        tp_group: torch.distributed.ProcessGroup | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert parallel_mode == "duplicated"
        self.parallel_mode = None  # which Bridge asks for: nothing is cut
        self._skips_bias = skip_bias_add
        self._tp_group = get_tensor_model_parallel_group_if_none(tp_group)
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.empty(output_size, dtype=config.params_dtype)) if bias else None
        for parameter in self.parameters():
            # Each rank may see a part of the sequence alone.
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[..., input_size]` to `[..., output_size]`, and the bias where it is left to others to add."""
        output = F.linear(input_, self.weight, None if self._skips_bias else self.bias)
        return output, self.bias if self._skips_bias else None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return sharded_parameters(self, prefix, {}, sharded_offsets, metadata, self._tp_group)


class PortableRowLinear(RowParallelLinear):
    """Megatron-Core's own, whose output experts with a bias may add to in place."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        return (output.clone() if self.is_expert else output), bias


class PortableNormedColumnLinear(ColumnParallelLinear):
    """Norm and column-parallel linear in one."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        norm = PortableNorm(config, input_size, config.layernorm_epsilon)
        self.layer_norm_weight, self.layer_norm_bias = norm.weight, norm.bias
        self.return_layernorm_output = False

    def forward(self, input_: Tensor, *args: Any, **options: Any) -> tuple[Any, Tensor | None]:
        """As Transformer Engine's with its `return_layernorm_output`: the output, or this and what the norm made."""
        hidden = _normalized(
            input_,
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.config.layernorm_epsilon,
            is_centred=self.config.layernorm_zero_centered_gamma,
        )
        output, bias = super().forward(hidden, *args, **options)
        return ((output, hidden) if self.return_layernorm_output else output), bias


class _GroupedLinear(torch.nn.Module):
    """The matrices of all experts of this rank, `weight0` and so on; in a checkpoint as those of single experts."""

    cut_dimension: int

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        bias: bool,
        skip_bias_add: bool,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__()
        self._groups, self.num_gemms = pg_collection, num_gemms
        self.use_bias, self.te_return_bias = bias, skip_bias_add and bias
        self.single_grouped_weight = self.single_grouped_bias = self.delay_wgrad_compute = False
        dims = [output_size, input_size]
        dims[self.cut_dimension] //= pg_collection.expt_tp.size()
        self.out_features, self.in_features = dims
        for index in range(num_gemms):
            setattr(self, f"weight{index}", torch.nn.Parameter(torch.empty(*dims, dtype=config.params_dtype)))
            if bias:
                setattr(self, f"bias{index}", torch.nn.Parameter(torch.empty(dims[0], dtype=config.params_dtype)))

    def forward(self, input_: Tensor, tokens_per_expert: Tensor | Sequence[int]) -> tuple[Tensor, list[Tensor] | None]:
        """`[tokens, in]`, those of the first expert first, to `[tokens, out]`."""
        counts = tokens_per_expert.tolist() if isinstance(tokens_per_expert, Tensor) else list(tokens_per_expert)
        biases = [getattr(self, f"bias{index}") for index in range(self.num_gemms)] if self.use_bias else None
        own = [None] * self.num_gemms if biases is None or self.te_return_bias else biases
        outputs = [
            F.linear(part, getattr(self, f"weight{index}"), own[index])
            for index, part in enumerate(input_.split(counts))
        ]
        return torch.cat(outputs), biases if self.te_return_bias else None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        groups, found = self._groups, {}
        cut = {"weight": self.cut_dimension, **({} if self.cut_dimension else {"bias": 0})}
        total = groups.ep.size() * self.num_gemms
        for index in range(self.num_gemms):
            number = groups.ep.rank() * self.num_gemms + index
            names = [name for name in ("weight", "bias") if hasattr(self, f"{name}{index}")]
            state = make_sharded_tensors_for_checkpoint(
                {name: getattr(self, f"{name}{index}") for name in names},
                "",
                cut,
                (*sharded_offsets, (len(sharded_offsets), number, total)),
                tp_group=groups.expt_tp,
                dp_cp_group=groups.expt_dp,
            )
            for name, tensor in state.items():
                tensor.key = f"{prefix}{name}"
                found[f"{prefix}{name}{index}"] = tensor
        return found


class PortableGroupedColumnLinear(_GroupedLinear):
    cut_dimension = 0


class PortableGroupedRowLinear(_GroupedLinear):
    cut_dimension = 1


class PortableAttention(Attention):
    """`Attention` with what families differ in: a window in some layers, a learned sink beside the keys, in a vision
    tower no causal mask."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        assert attn_mask_type in (AttnMaskType.causal, AttnMaskType.no_mask)
        super().__init__(
            config,
            layer_number,
            AttnMaskType.causal,
            attention_type,
            softmax_scale=softmax_scale,
            pg_collection=pg_collection,
        )
        self._is_causal = attn_mask_type == AttnMaskType.causal
        if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            self.window = None
        self._tp_group = None if pg_collection is None else pg_collection.tp
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        """As `Attention.forward`; a packed row may be Megatron-Core's or Bridge's, and may have a batch dimension of
        one, and then its output has it too."""
        options.pop("num_splits", None)
        row = options.get("packed_seq_params")
        if row is not None and not isinstance(row, PackedRowParams):
            bounds = row.cu_seqlens_q if row.cu_seqlens_q_padded is None else row.cu_seqlens_q_padded
            options["packed_seq_params"] = packed_row_params(tuple(bounds.diff().tolist()), bounds.device)
        has_batch = query.dim() == 4 and row is not None
        if has_batch:
            query, key, value = (x.squeeze(1) for x in (query, key, value))
        output = super().forward(query, key, value, *args, **options)
        return output.unsqueeze(1) if has_batch else output

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not self._is_causal:
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            output = F.scaled_dot_product_attention(query, key, value, scale=self.softmax_scale)
            return output.permute(2, 0, 1, 3).flatten(2)
        if not hasattr(self, "softmax_offset"):
            return super()._attend(query, key, value)
        # The sink is one key more, of no value, whose score does not depend on the query. Written out: of PyTorch's
        # kernels another computes a mask with a gradient than one without, and the old policy's pass has none.
        shared = query.shape[2] // key.shape[2]
        mask = self._mask(query, len(key))
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        scores = (query @ key.transpose(-1, -2)).float().mul(scale).masked_fill(~mask, float("-inf"))
        sink = self.softmax_offset.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        return (weights.to(value.dtype) @ value).permute(2, 0, 1, 3).flatten(2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return sharded_parameters(self, prefix, {"softmax_offset": 0}, sharded_offsets, metadata, self._tp_group)


def sharded_parameters(
    module: torch.nn.Module,
    prefix: str,
    cut: Mapping[str, int],
    sharded_offsets: tuple[Any, ...],
    metadata: dict[str, Any] | None,
    tp_group: torch.distributed.ProcessGroup | None,
) -> dict[str, Any]:
    """A module's own parameters for a checkpoint; `cut` says along which dimension tensor-parallel ranks hold parts."""
    state = module.state_dict(prefix="", keep_vars=True)
    return make_sharded_tensors_for_checkpoint(  # type: ignore[no-any-return]
        state, prefix, cut, sharded_offsets, tp_group=tp_group, dp_cp_group=(metadata or {}).get("dp_cp_group")
    )


_STAND_INS: Mapping[str, type] = {
    "TENorm": PortableNorm,
    "TELinear": PortableLinear,
    "TEColumnParallelLinear": type("TEColumnParallelLinear", (ColumnParallelLinear,), {}),
    "TERowParallelLinear": PortableRowLinear,
    "TELayerNormColumnParallelLinear": PortableNormedColumnLinear,
    "TEColumnParallelGroupedLinear": PortableGroupedColumnLinear,
    "TERowParallelGroupedLinear": PortableGroupedRowLinear,
    "TEDotProductAttention": PortableAttention,
}
"""By the names of Megatron-Core's classes."""

for _name, _class in _STAND_INS.items():
    _class.__name__ = _name  # by which Bridge tells how a weight is cut


@functools.cache
def stand_in_for_engine() -> None:
    """Has Megatron-Core choose these layers where it would choose Transformer Engine's, for the whole process; later
    calls do nothing. Models of this package's own do not depend on that choice."""
    import megatron.core.extensions.transformer_engine as engine
    import megatron.core.extensions.transformer_engine_spec_provider
    import megatron.core.models.gpt.experimental_attention_variant_module_specs as variant_specs
    import megatron.core.models.gpt.gpt_layer_specs as specs
    import megatron.core.transformer.moe.moe_layer as moe_layer
    import megatron.core.transformer.multi_latent_attention as latent_attention
    import megatron.core.transformer.transformer_block as block
    import megatron.core.utils

    assert not engine.HAVE_TE, "the engine itself is here"
    megatron.core.utils._te_version = Version(_VERSION)
    modules = [it for name, it in list(sys.modules.items()) if name.startswith("megatron.core.") and it is not None]
    for name, stand_in in _STAND_INS.items():
        former: Callable[..., Any] | None = getattr(engine, name)
        for module in modules:
            if former is not None and vars(module).get(name) is former:
                setattr(module, name, stand_in)
        setattr(engine, name, stand_in)
    # What these import only where the engine is.
    provider = sys.modules["megatron.core.extensions.transformer_engine_spec_provider"]
    for name in ("TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"):
        setattr(provider, name, _STAND_INS[name])
    for module in (specs, variant_specs):
        module.HAVE_TE, module.TESpecProvider = True, provider.TESpecProvider
    specs.TENorm = PortableNorm
    block.LayerNormImpl = block.TENorm = PortableNorm
    moe_layer.HAVE_TE, moe_layer.TELinear = True, PortableLinear
    for name in ("TELinear", "TEColumnParallelLinear", "TELayerNormColumnParallelLinear"):
        setattr(latent_attention, name, _STAND_INS[name])
