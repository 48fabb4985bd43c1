"""The families that this package builds and converts itself: everything follows from a `ModelShape`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from megatron_psft.checkpoint.identity import Identity, model_identity, weights_identity
from megatron_psft.config.lora import LoraConfig
from megatron_psft.config.schema import Config
from megatron_psft.distributed.collective import on_every_rank
from megatron_psft.distributed.grid import Parallel
from megatron_psft.hf.adapter import AdapterBase, AdapterFolder, RandomAdapters
from megatron_psft.hf.export import export, export_adapter
from megatron_psft.hf.side_files import SideFiles
from megatron_psft.hf.vision import vision_of
from megatron_psft.hf.weights import RandomWeights, SafetensorsFolder, WeightSource, WithMeanRows, fill_parameters
from megatron_psft.metrics import flops
from megatron_psft.model.gpt import ShapedChunks, check_layout, padded_vocab_size, virtual_size
from megatron_psft.model.shape import ModelShape, read_max_positions, read_shape


@dataclass(frozen=True)
class NativeSource(ShapedChunks):
    """A model of one of `FAMILIES`."""

    shape: ModelShape
    max_positions: int | None
    weights: WeightSource | None = None
    """None until it is known what the run starts from."""

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Raises UserError for a `config.json` that is missing, or asks for what is not computed."""
        return cls(read_shape(folder), read_max_positions(folder))

    @property
    def dtype(self) -> torch.dtype:
        return self._known_weights.dtype

    @property
    def adapters(self) -> "ShapedAdapters":
        return ShapedAdapters(self.shape)

    @property
    def passes_tensors_on(self) -> bool:
        """Those of the vision tower."""
        return self.shape.family.vision is not None

    def check(self, config: Config) -> None:
        check_layout(self.shape, config)

    def check_export(self, folder: Path) -> None:
        vision_of(folder, self.shape)

    def with_weights(self, folder: Path, config: Config) -> Self:
        if config.weights.reads_hf_weights:
            return replace(self, weights=SafetensorsFolder(folder, self.shape))
        return replace(self, weights=RandomWeights(self.shape, config.batch.seed))

    def with_rows(self, number: int) -> Self:
        if number <= self.vocab_size:
            return self
        return replace(self, shape=(shape := replace(self.shape, vocab_size=number)), weights=self._resized(shape))

    def _resized(self, shape: ModelShape) -> WeightSource:
        weights = self._known_weights
        if isinstance(weights, SafetensorsFolder):
            return WithMeanRows(weights, self.shape)
        assert isinstance(weights, RandomWeights), "rows are added once"
        return weights.of_shape(shape)

    @property
    def _known_weights(self) -> WeightSource:
        assert self.weights is not None, "with_weights comes first"
        return self.weights

    def virtual_size(self, config: Config) -> int | None:
        return virtual_size(self.shape, config)

    def fill(self, chunks: Sequence[torch.nn.Module], parallel: Parallel) -> None:
        """Each rank reads just its own slices."""
        fill_parameters(chunks, self._known_weights, self.shape, parallel)

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
        export(chunks, target, shape=self.shape, dtype=dtype, side_files=side_files, parallel=parallel, lora=merged)

    def identity(self, tensor_size: int) -> Identity:
        padded = padded_vocab_size(self.vocab_size, tensor_size)
        return model_identity(self.shape) | {"padded vocabulary": padded}

    @property
    def weights_identity(self) -> Identity:
        return weights_identity(self.shape)

    def forward_flops(self, lengths: Iterable[int]) -> float:
        return flops.forward_flops(self.shape, lengths)


@dataclass(frozen=True)
class ShapedAdapters:
    """Adapters beside a model of a shape."""

    shape: ModelShape

    def fill(self, chunks: Sequence[torch.nn.Module], config: Config, base: AdapterBase, parallel: Parallel) -> None:
        fill_parameters(chunks, self._weights(config, base), self.shape, parallel, adapters=True)

    def _weights(self, config: Config, base: AdapterBase) -> WeightSource:
        folder, lora = config.lora.load_lora, config.lora
        if folder is None:
            return RandomAdapters(self.shape, lora, config.batch.seed)
        return on_every_rank(lambda: AdapterFolder(Path(folder), self.shape, lora, base))

    def export(
        self,
        chunks: Sequence[torch.nn.Module],
        target: Path,
        *,
        dtype: torch.dtype,
        lora: LoraConfig,
        base: AdapterBase,
        parallel: Parallel,
    ) -> None:
        export_adapter(chunks, target, shape=self.shape, dtype=dtype, lora=lora, base=base, parallel=parallel)
