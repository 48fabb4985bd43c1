"""One optimizer step of a toy model on this machine, and what it was made with."""

import inspect
from collections.abc import Sequence

import numpy as np
from megatron.core.utils import get_model_config, unwrap_model

from megatron_psft.config.inputs import DataConfig, WeightsConfig
from megatron_psft.config.schema import Config, PrecisionConfig
from megatron_psft.data.example import Example
from megatron_psft.data.micro_batch import MicroBatch, fill_rows
from megatron_psft.data.rows import packed_row
from megatron_psft.distributed.device import Platform
from megatron_psft.distributed.grid import initialize_parallel, process_group
from megatron_psft.head.kernels import shard_passes
from megatron_psft.hf.weights import RandomWeights, fill_parameters
from megatron_psft.model.gpt import build_model
from megatron_psft.model.shape import ModelShape
from megatron_psft.objectives.objective import Objective
from megatron_psft.scoring.old_policy import CurrentPolicy
from megatron_psft.train.optimizer import build_optimizer, update
from megatron_psft.train.pipeline import Pipeline

_SHAPE = ModelShape(
    model_type="qwen3",
    num_layers=1,
    hidden_size=128,
    ffn_hidden_size=256,
    num_attention_heads=2,
    num_query_groups=1,
    head_dim=64,
    vocab_size=500,
    norm_eps=1e-6,
    rope_theta=10_000.0,
    rope_scaling=None,
    qkv_bias=False,
    qk_norm=True,
    tied_embeddings=False,
    initializer_range=0.02,
    dtype="float32",
)
_RECORD_TOKENS = (20, 44)
_FUSIONS = ("bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion", "gradient_accumulation_fusion")


def toy_step(platform: Platform, *, bf16: bool) -> dict[str, str]:
    """Makes the step in a process group of one, and returns what was at work: `collectives`, `attention`, `norm`, `loss
    kernels`, `optimizer` and `fusions` by their names in the code. Raises whatever goes wrong."""
    config = Config(
        weights=WeightsConfig(load_hf="toy", save="toy"),
        data=DataConfig(data=("toy",), seq_length=sum(_RECORD_TOKENS)),
        precision=PrecisionConfig(bf16=bf16),
    )
    with process_group(platform, world_size=1):
        parallel = initialize_parallel(config.parallel, virtual_size=None, seed=1, device=platform.device)
        chunks = build_model(_SHAPE, config, platform, parallel)
        fill_parameters(chunks, RandomWeights(_SHAPE, seed=1), _SHAPE, parallel)
        optimizer = build_optimizer(config, chunks)
        pipeline = Pipeline(chunks=chunks, parallel=parallel)
        pipeline.zero_grad()
        pipeline.train([_packed_records()], CurrentPolicy(), objective=Objective(config=config.objective))
        update(optimizer, step=1, device=platform.device)
    (model,) = unwrap_model(chunks)
    layer = model.decoder.layers[0]
    return {
        "collectives": platform.backend,
        "attention": _name(layer.self_attention.core_attention),
        "norm": _name(model.decoder.final_layernorm),
        "loss kernels": _name(shard_passes(platform.device).sums),
        "optimizer": _name(optimizer.chained_optimizers[0].optimizer),
        "fusions": _enabled(get_model_config(chunks[0])),
    }


def _packed_records() -> MicroBatch:
    rng = np.random.default_rng(0)
    examples: Sequence[Example] = [
        Example(
            tokens=rng.integers(_SHAPE.vocab_size, size=length + 1, dtype=np.int32),
            label_mask=np.arange(length + 1) > length // 2,
        )
        for length in _RECORD_TOKENS
    ]
    return fill_rows(examples, packed_row(_RECORD_TOKENS, seq_length=sum(_RECORD_TOKENS)), pad_token_id=0)


def _name(part: object) -> str:
    named = part if inspect.isfunction(part) else type(part)
    return f"{named.__module__}.{named.__qualname__}"


def _enabled(config: object) -> str:
    return ", ".join(name for name in _FUSIONS if getattr(config, name)) or "none"
