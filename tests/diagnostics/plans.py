"""Plans of small models without files."""

from dataclasses import replace

import torch

from megatron_psft.config.schema import BatchConfig, ParallelConfig, PrecisionConfig
from megatron_psft.diagnostics.plan import Plan
from megatron_psft.distributed.device import Platform
from megatron_psft.model.shape import ExpertShape, ModelShape
from tests.support.layouts import Layout, make_config

GPU = Platform(device=torch.device("cuda"), backend="nccl", has_transformer_engine=True)
CPU = Platform(device=torch.device("cpu"), backend="gloo", has_transformer_engine=False)
SHAPE = ModelShape(
    model_type="llama",
    num_layers=8,
    hidden_size=1024,
    ffn_hidden_size=4096,
    num_attention_heads=16,
    num_query_groups=4,
    head_dim=64,
    vocab_size=32768,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    qkv_bias=False,
    qk_norm=False,
    tied_embeddings=False,
    initializer_range=0.02,
    dtype="bfloat16",
)
EXPERTS = replace(
    SHAPE,
    experts=ExpertShape(count=16, per_token=2, ffn_hidden_size=512, normalizes=True, dense_layers=(0,)),
)


def make_plan(world_size=1, platform=GPU, shape=SHAPE, seq_length=4096, sections=None, **parallel) -> Plan:
    config = make_config(Layout())
    config = replace(
        config,
        data=replace(config.data, seq_length=seq_length),
        batch=BatchConfig(train_iters=100, global_batch_size=8),
        precision=PrecisionConfig(bf16=True),
        parallel=ParallelConfig(**parallel),
    )
    return Plan(config=replace(config, **(sections or {})), shape=shape, world_size=world_size, platform=platform)
