"""Builds models with Transformer Engine's layers and with portable ones, and prints as JSON what tells them apart:
names of parameters and their marks, keys of checkpoints, and what is lost of a checkpoint that the other reads.

    PYTHONPATH=FOLDER python -m tests.model.engine.names
"""

# isort: off
import tests.model.engine.stand_ins  # noqa: F401 (before all that imports Transformer Engine)

# isort: on
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, apply_factories
from megatron.core.extensions import transformer_engine as extension
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_psft.checkpoint import unpickle
from megatron_psft.checkpoint.optimizer_state import load_optimizer_state, sharded_optimizer_state
from megatron_psft.checkpoint.replicas import load_by_turns
from megatron_psft.checkpoint.state import _METADATA, _sharded_module
from megatron_psft.config.lora import LoraConfig
from megatron_psft.config.schema import Config, parse_config
from megatron_psft.distributed.device import Platform
from megatron_psft.distributed.grid import Parallel, initialize_parallel, process_group
from megatron_psft.distributed.megatron_lines import save_options
from megatron_psft.hf.weights import RandomWeights, fill_parameters
from megatron_psft.model import gpt
from megatron_psft.model.parameters import named_parameters
from megatron_psft.model.shape import ModelShape, shape_from_config
from megatron_psft.train.optimizer import build_optimizer

_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
_BASE = {**_SIZES, "num_hidden_layers": 2, "vocab_size": 211, "dtype": "bfloat16"}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "qwen2", **_BASE},
    "tied": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True, **_BASE},
    "experts": {"model_type": "qwen3_moe", "head_dim": 32, "decoder_sparse_step": 2, **_EXPERTS, **_BASE},
}
"""Of models; the second layer of the last has experts, the first has none."""

_FLAGS = "--load-hf x --save x --data x --train-iters 2 --global-batch-size 1 --bf16 --use-distributed-optimizer"
_LAYOUT = "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 4 --global-batch-size 4"
_MARKS = {"tensor_model_parallel": False, "partition_dim": -1, "sequence_parallel": False, "allreduce": True}
"""By which Megatron-Core reduces gradients and takes their norm, and what it takes for one that is missing."""


class Model:
    """A model and its optimizer, in which every number comes from a seed."""

    def __init__(self, shape: ModelShape, config: Config, platform: Platform, parallel: Parallel, seed: int) -> None:
        self.chunks = gpt.build_model(shape, config, platform, parallel)
        fill_parameters(self.chunks, RandomWeights(shape, seed), shape, parallel)
        self.optimizer = build_optimizer(config, self.chunks)
        self._parallel = parallel
        for states in self._states():
            for name in ("exp_avg", "exp_avg_sq"):
                states[name].uniform_(generator=torch.Generator().manual_seed(seed))

    def content(self, *, is_loading: bool) -> dict[str, Any]:
        weights = _sharded_module(self.chunks[0].module.module)
        options = {"is_loading": is_loading, "metadata": dict(_METADATA)}
        return {"model": weights, "optimizer": sharded_optimizer_state(self.optimizer, weights, **options)}

    def save(self, folder: Path) -> None:
        folder.mkdir()
        content = self.content(is_loading=False)
        dist_checkpointing.save(content, str(folder), content_metadata=dict(_METADATA), **save_options())

    def load(self, folder: Path) -> None:
        content = self.content(is_loading=True)
        loaded = load_by_turns(content, self._parallel, lambda content: unpickle.load(folder, content))
        load_optimizer_state(self.optimizer, loaded["optimizer"])
        self.chunks[0].module.module.load_state_dict(loaded["model"], strict=False)

    def values(self) -> dict[str, torch.Tensor]:
        """Weights and states by what a checkpoint calls them and where in its tensors they lie."""
        tensors = (value for value in self.sharded() if isinstance(value, ShardedTensor))
        return {f"{value.key} {value.global_offset}": value.data.detach().clone() for value in tensors}

    def sharded(self) -> list[Any]:
        content = self.content(is_loading=False)
        apply_factories(content)
        return [value for value in nested_values(content) if isinstance(value, ShardedBase)]

    def _states(self) -> list[dict[str, torch.Tensor]]:
        inner = [chained.optimizer for chained in self.optimizer.chained_optimizers]
        return [states for each in inner for states in each.state.values()]


def main() -> None:
    assert extension.HAVE_TE
    here = Platform(device=torch.device("cpu"), backend="gloo", has_transformer_engine=True)
    kinds = {"engine": here, "portable": replace(here, has_transformer_engine=False)}
    shapes = {name: shape_from_config(values, name) for name, values in CONFIGS.items()}
    found: dict[str, Any] = {"parameters": _parameters(shapes, kinds), "checkpoint": {}}
    config = parse_config(_FLAGS.split())
    with process_group(here, 1), tempfile.TemporaryDirectory() as folder:
        parallel = initialize_parallel(config.parallel, virtual_size=None, seed=1, device=here.device)
        for name, shape in shapes.items():
            models = {kind: Model(shape, config, kinds[kind], parallel, seed) for seed, kind in enumerate(kinds)}
            found["checkpoint"][name] = {
                kind: sorted({f"{type(value).__name__} {value.key}" for value in model.sharded()})
                for kind, model in models.items()
            }
        found["not as written"] = _moved(models, Path(folder))
    print(json.dumps(found))  # noqa: T201


def _parameters(shapes: dict[str, ModelShape], kinds: dict[str, Platform]) -> dict[str, dict[str, Any]]:
    """Shapes and marks of rank 3's parameters among eight ranks that are not there."""
    config = parse_config(f"{_FLAGS} {_LAYOUT}".split())
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    with mock.patch.object(dist, "new_group", partial(_fake_group, dist.new_group)):
        parallel = initialize_parallel(config.parallel, virtual_size=None, seed=1, device=torch.device("cpu"))
    found = {
        name: {kind: _described(gpt.build_model(shape, config, here, parallel)) for kind, here in kinds.items()}
        for name, shape in shapes.items()
    }
    with_adapters = replace(config, lora=LoraConfig(lora_rank=4))
    found["adapters"] = {
        kind: _described(gpt.build_model(shapes["dense"], with_adapters, here, parallel))
        for kind, here in kinds.items()
    }
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return found


def _fake_group(new_group: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return new_group(*args, **{**kwargs, "backend": "fake"})


def _described(chunks: list[Any]) -> dict[str, Any]:
    modules = {type(module).__module__.partition(".")[0] for module in chunks[0].modules()}
    parameters = {
        name: [list(parameter.shape), *(getattr(parameter, mark, default) for mark, default in _MARKS.items())]
        for name, parameter in named_parameters(chunks)
    }
    flags = (getattr(module, "fuse_wgrad_accumulation", None) for module in chunks[0].modules())
    adds = sorted({flag for flag in flags if flag is not None})
    return {"has engine": "transformer_engine" in modules, "adds to main_grad": adds, **parameters}


def _moved(models: dict[str, Model], folder: Path) -> dict[str, list[str]]:
    """What is not as it was written in a model that has read a checkpoint of the other, by the kind of the reader; and
    what was so before it read anything."""
    written = {kind: model.values() for kind, model in models.items()}
    for kind, model in models.items():
        model.save(folder / kind)
    found = {"before": _differing(*written.values())}
    for reader, writer in (("engine", "portable"), ("portable", "engine")):
        models[reader].load(folder / writer)
        found[reader] = _differing(models[reader].values(), written[writer])
    return found


def _differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    names = sorted(one.keys() | other.keys())
    return [name for name in names if name not in one or name not in other or not torch.equal(one[name], other[name])]


if __name__ == "__main__":
    main()
