"""Builds Megatron-Core's `GPTModel` for a shape."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.nn import functional as F

from megatron_psft.config.schema import Config
from megatron_psft.distributed.device import Platform
from megatron_psft.distributed.grid import Parallel
from megatron_psft.errors import UserError
from megatron_psft.model import build
from megatron_psft.model.adapters import add_adapters, targeted
from megatron_psft.model.experts import check_expert_layout, expert_options, mark_experts
from megatron_psft.model.fp8 import check_dimensions, fp8_options
from megatron_psft.model.layers import Attention, RMSNorm
from megatron_psft.model.rope import Llama3RopeScaling, YarnRopeScaling
from megatron_psft.model.shape import ModelShape

# Each rank's part of the vocabulary is a multiple of 128, which matrix units like. Padding for 8 ranks even on fewer
# makes the padded size the same for every tensor-parallel size that divides 8, so that checkpoints move freely between
# them.
VOCAB_ALIGNMENT, VOCAB_RANKS = 128, 8


def padded_vocab_size(vocab_size: int, tensor_size: int) -> int:
    """The vocabulary rounded up to what `tensor_size` ranks split evenly and well aligned."""
    multiple = VOCAB_ALIGNMENT * math.lcm(VOCAB_RANKS, tensor_size)
    return -(-vocab_size // multiple) * multiple


def check_layout(shape: ModelShape, config: Config) -> None:
    """Raises UserError where the model cannot be cut as `config.parallel` asks."""
    tensor, pipeline = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    is_sparse = all(shape.has_experts(layer) for layer in range(shape.num_layers))
    for name in ("num_attention_heads", "num_query_groups", *(() if is_sparse else ("ffn_hidden_size",))):
        value = getattr(shape, name)
        if value % tensor:
            raise UserError(
                f"{name} ({value}) must be a multiple of tensor_model_parallel_size ({tensor}); change the latter"
            )
    if shape.num_layers % pipeline:
        raise UserError(
            f"num_layers ({shape.num_layers}) must be a multiple of pipeline_model_parallel_size ({pipeline}); "
            "change the latter"
        )
    per_chunk = config.parallel.num_layers_per_virtual_pipeline_stage
    per_stage = shape.num_layers // pipeline
    if per_chunk and (per_stage % per_chunk or per_stage == per_chunk):
        raise UserError(
            f"num_layers_per_virtual_pipeline_stage ({per_chunk}) must be a proper divisor of the layers per stage "
            f"({per_stage}); change it or remove it"
        )
    if config.parallel.context_parallel_size > 1 and _needs_window(shape, config):
        raise UserError(
            f"context_parallel_size ({config.parallel.context_parallel_size}) must be 1 where seq_length "
            f"({config.data.seq_length}) exceeds the sliding_window ({shape.sliding_window}) of this "
            f"{shape.model_type} model, which is not computed across ranks; change either"
        )
    _check_recomputed(shape, config)
    check_expert_layout(shape, config)
    targeted(config.lora, shape)
    check_dimensions(shape, config)


def _check_recomputed(shape: ModelShape, config: Config) -> None:
    has_experts = {shape.has_experts(layer) for layer in range(shape.num_layers)}
    for module, is_there in (("mlp", False in has_experts), ("moe", True in has_experts)):
        if module in config.recompute.recompute_modules and not is_there:
            raise UserError(
                f"recompute_modules ({module}) has no effect, as no layer of this {shape.model_type} model has it; "
                "remove it"
            )


def transformer_config(shape: ModelShape, config: Config, platform: Platform) -> TransformerConfig:
    """Megatron-Core's configuration of the model, its layout and its precision."""
    dtype = torch.bfloat16 if config.precision.bf16 else torch.float32
    parallel = config.parallel
    chunks = virtual_size(shape, config)
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        # Dropout would make the two passes of one policy disagree: the ratio after a sync must be 1.
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **_attention_options(shape, config),
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        virtual_pipeline_model_parallel_size=chunks,
        batch_p2p_comm=platform.is_gpu and chunks is None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.precision.bf16,
        # Every weight is read or drawn by `hf.weights`; Megatron-Core's own draw would be thrown away.
        perform_initialization=False,
        use_cpu_initialization=not platform.is_gpu,
        # One denominator for the whole global batch; any other setting makes the gradient depend on the layout.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        # The fused kernels need CUDA.
        bias_activation_fusion=platform.is_gpu,
        bias_dropout_fusion=platform.is_gpu,
        apply_rope_fusion=platform.has_transformer_engine,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=platform.fuses_gradients,
        recompute_granularity=config.recompute.recompute_granularity,
        recompute_method=config.recompute.recompute_method,
        recompute_num_layers=config.recompute.recompute_num_layers,
        recompute_modules=list(config.recompute.recompute_modules),
        **expert_options(shape, config, platform),
        **fp8_options(config.precision),
    )


def _attention_options(shape: ModelShape, config: Config) -> dict[str, Any]:
    """Fields of `TransformerConfig` for what is not plain causal attention; none for most models."""
    options: dict[str, Any] = {}
    if _needs_window(shape, config):
        assert shape.sliding_window is not None
        options["window_size"] = (shape.sliding_window - 1, 0)  # positions before and behind its own
    if isinstance(shape.rope_scaling, YarnRopeScaling):
        # Queries and keys have the factor each; the fused rotation has no place for it.
        options["softmax_scale"] = shape.rope_scaling.attention_factor**2 / math.sqrt(shape.head_dim)
    return options


def _needs_window(shape: ModelShape, config: Config) -> bool:
    """Whether a record can be longer than what a position sees."""
    return shape.sliding_window is not None and config.data.seq_length > shape.sliding_window


def virtual_size(shape: ModelShape, config: Config) -> int | None:
    """Model chunks per pipeline rank, or None without interleaving."""
    per_chunk = config.parallel.num_layers_per_virtual_pipeline_stage
    if per_chunk is None:
        return None
    return shape.num_layers // config.parallel.pipeline_model_parallel_size // per_chunk


def build_model(
    shape: ModelShape, config: Config, platform: Platform, parallel: Parallel
) -> list[DistributedDataParallel]:
    """Returns this rank's model chunks, one without interleaving; their weights are still to be filled."""
    return build.build_model(ShapedChunks(shape), config, platform, parallel)


@dataclass(frozen=True)
class ShapedChunks:
    """What the chunks of a shape's model are built by."""

    shape: ModelShape

    @property
    def vocab_size(self) -> int:
        return self.shape.vocab_size

    def transformer_config(self, config: Config, platform: Platform) -> TransformerConfig:
        return transformer_config(self.shape, config, platform)

    def build_chunk(
        self, config: Config, megatron_config: TransformerConfig, platform: Platform, parallel: Parallel, index: int
    ) -> GPTModel:
        """With the run's adapters, where it has any."""
        model = build_chunk(self.shape, config, megatron_config, platform, parallel, index)
        if config.lora.has_adapters:
            chosen = targeted(config.lora, self.shape)
            add_adapters(model, self.shape, config, chosen, tensor_size=parallel.tensor_size)
        else:
            build.fuse_weight_gradients(model)
        return model


def build_chunk(
    shape: ModelShape,
    config: Config,
    megatron_config: TransformerConfig,
    platform: Platform,
    parallel: Parallel,
    index: int,
) -> GPTModel:
    """Returns one of this rank's model chunks, without data parallelism; its weights are still to be filled."""
    vp_stage = index if parallel.virtual_size > 1 else None
    model = GPTModel(
        config=megatron_config,
        transformer_layer_spec=_layer_spec(shape, megatron_config, platform, vp_stage),
        vocab_size=padded_vocab_size(shape.vocab_size, parallel.tensor_size),
        max_sequence_length=config.data.seq_length,
        pre_process=parallel.is_first_stage and index == 0,
        post_process=parallel.is_last_stage and index == parallel.virtual_size - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        vp_stage=vp_stage,
    )
    build.mark_sharded_weights(model)
    mark_experts(model)
    scale_rope(model, shape)
    return model


def _layer_spec(
    shape: ModelShape, megatron_config: TransformerConfig, platform: Platform, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    if platform.has_transformer_engine:
        if shape.experts is None:
            return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=shape.qk_norm)
        return get_gpt_decoder_block_spec(megatron_config, use_transformer_engine=True, vp_stage=vp_stage)
    first = get_transformer_layer_offset(megatron_config, vp_stage)
    layers = range(first, first + get_num_layers_to_build(megatron_config, vp_stage))
    return TransformerBlockSubmodules(
        layer_specs=[_portable_layer(shape, has_experts=shape.has_experts(layer)) for layer in layers],
        layer_norm=RMSNorm,
    )


def _portable_layer(shape: ModelShape, *, has_experts: bool) -> ModuleSpec:
    num_experts = shape.experts.count if shape.experts is not None and has_experts else None
    spec = get_gpt_layer_local_spec(num_experts, normalization="RMSNorm", qk_layernorm=shape.qk_norm)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.core_attention = Attention
    if shape.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if num_experts is not None:
        # As in Transformer Engine's layers, whose norm is part of a plain MLP only: checkpoints are read by either.
        del layer.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return spec


def scale_rope(model: GPTModel, shape: ModelShape) -> None:
    """Applies a frequency scaling with all its numbers; of Llama 3's, the model's own flag knows only the factor."""
    rope, scaling = model.rotary_pos_emb, shape.rope_scaling
    if isinstance(scaling, Llama3RopeScaling):
        rope.inv_freq = rope._apply_scaling(
            rope.inv_freq,
            factor=scaling.factor,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            original_max_position_embeddings=scaling.original_max_position_embeddings,
        )
    elif scaling is not None:
        first, last = scaling.blended(shape.head_dim, shape.rope_theta)
        divided = ((torch.arange(len(rope.inv_freq), device=rope.inv_freq.device) - first) / (last - first)).clamp(0, 1)
        rope.inv_freq = rope.inv_freq * (1 - divided) + rope.inv_freq / scaling.factor * divided
