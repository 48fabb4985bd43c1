"""Models that NVIDIA's Megatron-Bridge builds and converts, trained as those of this package are."""

import importlib.metadata
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_psft.checkpoint.identity import Identity
from megatron_psft.config.lora import LoraConfig
from megatron_psft.config.schema import Config
from megatron_psft.distributed.device import Platform
from megatron_psft.distributed.grid import Parallel
from megatron_psft.errors import UserError
from megatron_psft.hf.export import write_gathered, write_tensors
from megatron_psft.hf.side_files import SideFiles
from megatron_psft.model.adapters import add_adapters, targeted
from megatron_psft.model.build import mark_sharded_weights
from megatron_psft.model.experts import mark_experts
from megatron_psft.model.parameters import is_adapter
from megatron_psft.model.shape import ModelShape
from megatron_psft.sources.bridge_adapters import adapter_shape
from megatron_psft.sources.bridge_files import PassedOn, StoredTensor, read_tensors
from megatron_psft.sources.bridge_import import check_kernels, import_bridge
from megatron_psft.sources.bridge_layout import check_layout, num_experts, settings_of
from megatron_psft.sources.bridge_rules import check_config, is_passed_on, is_tied
from megatron_psft.sources.native import ShapedAdapters
from megatron_psft.sources.source import AdapterSource

log = logging.getLogger(__name__)

_UNRELATED = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache")
"""Fields of a `config.json` that tell no model from another."""

_ROUTER_BIAS = "e_score_correction_bias"
"""End of the names of biases by which routers choose experts."""


@dataclass(frozen=True)
class BridgeSource:
    """A model of one of the families of bridge_rules.py."""

    folder: Path
    fields: Mapping[str, Any]
    """The `config.json`."""
    auto_bridge: Any
    setting: str = "load_hf"
    """That names the folder."""
    tensors: Mapping[str, StoredTensor] | None = None
    """Those of the folder; None until the run is known to start from them."""

    @classmethod
    def of(cls, folder: Path, fields: Mapping[str, Any], setting: str = "load_hf", *, is_trained: bool = True) -> Self:
        """Imports Megatron-Bridge. Raises UserError where it, or what it needs, is not there, and where it was not
        compared on such a model."""
        check_config(fields, str(folder / "config.json"), is_trained=is_trained)
        check_kernels(fields["model_type"])
        bridge = import_bridge()
        _check_readable(folder, setting)
        return cls(folder, fields, bridge, setting)

    @cached_property
    def _bridge(self) -> Any:
        return self.auto_bridge.from_hf_pretrained(str(self.folder))

    @property
    def vocab_size(self) -> int:
        """Never padded: Bridge would export the padding."""
        return int(self.fields["vocab_size"])

    @property
    def dtype(self) -> torch.dtype:
        """Of most weights, by their elements."""
        elements: dict[torch.dtype, int] = {}
        for it in self._known_tensors.values():
            elements[it.dtype] = elements.get(it.dtype, 0) + prod(it.dims)
        return max(elements, key=elements.__getitem__)

    @property
    def is_bf16(self) -> bool:
        """Whether a model in bf16 holds every number of the folder: Megatron-Core has biases of routers in fp32."""
        return all(
            it.dtype == torch.bfloat16 or name.endswith(_ROUTER_BIAS)
            for name, it in self._known_tensors.items()
            if not self._passes_on(name)
        )

    @property
    def max_positions(self) -> int | None:
        value = self.fields.get("max_position_embeddings")
        return value if isinstance(value, int) else None

    @property
    def adapters(self) -> AdapterSource:
        return ShapedAdapters(self._adapter_shape)

    @property
    def _adapter_shape(self) -> ModelShape:
        return adapter_shape(self.fields, num_experts(self.fields))

    @property
    def passes_tensors_on(self) -> bool:
        """A run starts from the folder, whose tensors are all there anyway."""
        return False

    def check(self, config: Config) -> None:
        check_layout(self.fields, config)

    def check_export(self, folder: Path) -> None:
        """Nothing: see `passes_tensors_on`."""

    def with_weights(self, folder: Path, config: Config) -> Self:
        return replace(self, folder=folder, tensors=read_tensors(folder, self.setting))

    def with_rows(self, number: int) -> Self:
        if number > self.vocab_size:
            raise UserError(
                f"resize_vocab (True) cannot add rows to a model from Megatron-Bridge, with {self.vocab_size}, where "
                f"the tokenizer needs {number}; add them to load_hf ({self.folder}) beforehand"
            )
        return self

    @property
    def _known_tensors(self) -> Mapping[str, StoredTensor]:
        assert self.tensors is not None, "with_weights comes first"
        return self.tensors

    def virtual_size(self, config: Config) -> int | None:
        return None

    def transformer_config(self, config: Config, platform: Platform) -> TransformerConfig:
        """Bridge's provider of the model, which is a `TransformerConfig`."""
        provider = self._bridge.to_megatron_provider(load_weights=False)
        for name, value in settings_of(self.fields, config, platform).items():
            if hasattr(provider, name):  # providers differ in what they have
                setattr(provider, name, value)
        provider.finalize()
        log.info(
            "model from Megatron-Bridge %s: dropout, auxiliary losses, updates of expert biases and multi-token "
            "prediction are off",
            importlib.metadata.version("megatron-bridge"),
        )
        return provider  # type: ignore[no-any-return]

    def build_chunk(
        self, config: Config, megatron_config: TransformerConfig, platform: Platform, parallel: Parallel, index: int
    ) -> MegatronModule:
        provider: Any = megatron_config
        provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        model = provider.provide(pre_process=parallel.is_first_stage, post_process=parallel.is_last_stage)
        _set_epsilons(model, megatron_config.layernorm_epsilon)
        mark_sharded_weights(model)
        mark_experts(model)
        if config.lora.has_adapters:
            shape = self._adapter_shape
            add_adapters(model, shape, config, targeted(config.lora, shape), tensor_size=parallel.tensor_size)
        for parameter in model.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        return model  # type: ignore[no-any-return]

    def fill(self, chunks: Sequence[torch.nn.Module], parallel: Parallel) -> None:
        """Bridge streams tensor by tensor; before it does, what it would leave out is looked for."""
        models = unwrap_model(list(chunks))
        for module in (module for model in models for module in model.modules()):
            if isinstance(module, TopKRouter):
                module._maintain_float32_expert_bias()  # which it else does as it first computes, of rounded numbers
        self._check_complete(models)
        self._bridge.load_hf_weights(models)

    def _check_complete(self, models: list[torch.nn.Module]) -> None:
        """Raises UserError, on all ranks, where a parameter would not be filled, or a tensor not be read. Bridge only
        warns, and leaves in the parameter what memory held."""
        tasks = [
            it for it in self._bridge.get_conversion_tasks(models) if it is not None and it.megatron_module is not None
        ]
        read: set[str] = set()
        for task in tasks:
            names = task.mapping.hf_param
            read |= set(names.values()) if isinstance(names, dict) else {names}
        filled = {id(task.param_weight) for task in tasks}
        # Where the head is the embedding, a last stage has a copy of its own, which Bridge brings there.
        copies = {"output_layer.weight"} if is_tied(self.fields) else set()
        parameters = [entry for model in models for entry in model.named_parameters()]
        unfilled = [name for name, it in parameters if not (id(it) in filled or name in copies or is_adapter(name))]
        everywhere: list[tuple[set[str], list[str]] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, (read, unfilled))
        all_read = {name for found in everywhere if found is not None for name in found[0]}
        all_unfilled = sorted({name for found in everywhere if found is not None for name in found[1]})
        unread = sorted(name for name in self._known_tensors if name not in all_read and not self._passes_on(name))
        for what, names in (
            ("leaves parameters unfilled", all_unfilled),
            ("does not read tensors of the folder", unread),
        ):
            if names:
                raise UserError(
                    f"{self.setting} ({self.folder}): Megatron-Bridge {what}: {', '.join(names[:3])} ({len(names)} in "
                    "all); this model cannot come from it"
                )

    def _passes_on(self, name: str) -> bool:
        return is_passed_on(name, self.fields) or self._is_tied_head(name)

    def _is_tied_head(self, name: str) -> bool:
        return name == "lm_head.weight" and is_tied(self.fields)

    def export(
        self,
        chunks: Sequence[torch.nn.Module],
        target: Path,
        *,
        dtype: torch.dtype,
        side_files: SideFiles,
        parallel: Parallel,
        merged: LoraConfig | None = None,
    ) -> None:
        """Tensors that are stored in another format than most, as biases of experts in fp32, keep theirs."""
        assert merged is None, "check refuses lora_merge"
        beside = PassedOn(self.folder, self._known_tensors, lambda name: is_passed_on(name, self.fields))
        trained = {name: it for name, it in self._known_tensors.items() if not self._passes_on(name)}
        formats = {name: dtype if it.dtype == self.dtype else it.dtype for name, it in trained.items()}
        sizes = {name: prod(it.dims) * formats[name].itemsize for name, it in trained.items()}
        tensors = self._tensors_of(unwrap_model(list(chunks)), formats)
        options: dict[str, Any] = {"dtype": dtype, "side_files": side_files, "beside": beside}
        write_gathered(tensors, lambda: write_tensors(target, tensors, sizes, **options), parallel)

    def _tensors_of(
        self, models: list[torch.nn.Module], formats: Mapping[str, torch.dtype]
    ) -> Iterator[tuple[str, Tensor]]:
        """Whole, on every rank."""
        for name, tensor in self._bridge.export_hf_weights(models, cpu=True, show_progress=False):
            if not self._is_tied_head(name):
                yield name, tensor.to(formats[name])

    def identity(self, tensor_size: int) -> Identity:
        return {**self.weights_identity, "padded vocabulary": self.vocab_size}

    @property
    def weights_identity(self) -> Identity:
        fields = {name: value for name, value in self.fields.items() if name not in _UNRELATED}
        return {
            "model source": "bridge",
            "model model_type": self.fields["model_type"],  # first, as what differs first is named
            **json.loads(json.dumps({f"model {name}": it for name, it in fields.items()})),
        }

    def forward_flops(self, lengths: Iterable[int]) -> float:
        """Of the matrices alone, with those of the experts that compute a token; attention itself is not counted."""
        return 2.0 * self._active_weights * sum(lengths)

    @property
    def nbytes(self) -> int:
        """Of all tensors of the folder."""
        return sum(it.nbytes for it in self._known_tensors.values())

    @cached_property
    def _active_weights(self) -> float:
        count = num_experts(self.fields)
        share = 1.0 if count is None else self.fields["num_experts_per_tok"] / count
        total = 0.0
        for name, it in self._known_tensors.items():
            is_embedding = name.endswith(("embed_tokens.weight", "embeddings.weight")) and not is_tied(self.fields)
            if len(it.dims) > 1 and not is_embedding and not self._passes_on(name):
                total += prod(it.dims) * (share if ".experts." in name else 1.0)
        return total


def _check_readable(folder: Path, setting: str) -> None:
    """Raises UserError where transformers, by which Bridge reads it, cannot make sense of the `config.json`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder)
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{setting} ({folder}): transformers cannot read its config.json: {reason}") from error


def _set_epsilons(model: torch.nn.Module, epsilon: float) -> None:
    """Gives the norms behind attention and MLP, as Gemma 3 has them, the model's: Bridge leaves them the engine's."""
    for module in model.modules():
        norm = getattr(module, "post_layernorm", None)
        if norm is not None:
            assert hasattr(norm, "eps"), type(norm)
            norm.eps = epsilon
