"""What a run asks of the source of its model."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, Self

import torch

from megatron_psft.checkpoint.identity import Identity
from megatron_psft.config.lora import LoraConfig
from megatron_psft.config.schema import Config
from megatron_psft.distributed.grid import Parallel
from megatron_psft.hf.adapter import AdapterBase
from megatron_psft.hf.side_files import SideFiles
from megatron_psft.model.build import ChunkSource


class AdapterSource(Protocol):
    """What a run with adapters asks of a source that has them."""

    def fill(self, chunks: Sequence[torch.nn.Module], config: Config, base: AdapterBase, parallel: Parallel) -> None:
        """Fills the adapters of this rank, from `load_lora` or from the seed; collective."""
        ...

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
        """Writes the adapters as `peft` does; else as `ModelSource.export`."""
        ...


class ModelSource(ChunkSource, Protocol):
    """A model, and how it is built, filled and exported. What it is asked in this order: `check`, then `with_weights`
    and `with_rows`, then what builds and trains."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that a run starts from, and so of the export of a run in fp32."""
        ...

    @property
    def max_positions(self) -> int | None:
        """Of the longest text that the model was made for; None where it does not say."""
        ...

    @property
    def adapters(self) -> AdapterSource:
        """Asked where `check` has let a run with adapters pass."""
        ...

    @property
    def passes_tensors_on(self) -> bool:
        """Whether an export takes tensors of `load_hf` along that are not trained."""
        ...

    def check(self, config: Config) -> None:
        """Raises UserError where the model cannot be trained, or cut into parts, as `config` asks."""
        ...

    def check_export(self, folder: Path) -> None:
        """Raises UserError where `folder`, that `load_hf` is, lacks tensors that an export takes along."""
        ...

    def with_weights(self, folder: Path, config: Config) -> Self:
        """The source of a run that starts from the weights in `folder`, or from others as `config` says. Raises
        UserError for a folder whose weights are missing, damaged, or not this model's."""
        ...

    def with_rows(self, number: int) -> Self:
        """The source with at least so many rows of the embedding. Raises UserError where none can be added."""
        ...

    def virtual_size(self, config: Config) -> int | None:
        """Model chunks per pipeline rank, or None without interleaving."""
        ...

    def fill(self, chunks: Sequence[torch.nn.Module], parallel: Parallel) -> None:
        """Fills this rank's parameters, but those of adapters; collective."""
        ...

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
        """Writes the model as a Hugging Face folder; collective.

        Args:
            chunks: the model; its parameters must be current on every rank.
            target: folder to write, seen by rank 0.
            dtype: of the tensors in the files.
            side_files: what goes with the weights.
            parallel: this rank's place.
            merged: of the model's adapters, which are added to its weights; None without any.

        Raises:
            UserError: on all ranks, where the folder cannot be written or holds what may not be replaced.
            InfrastructureError: on all ranks, where the disk is full or fails.
        """
        ...

    def identity(self, tensor_size: int) -> Identity:
        """What tells the model from others, and all else that its parameters in a checkpoint depend on."""
        ...

    @property
    def weights_identity(self) -> Identity:
        """The same of a checkpoint that holds nothing but weights, in any layout."""
        ...

    def forward_flops(self, lengths: Iterable[int]) -> float:
        """Operations of one forward pass over records of these lengths in tokens."""
        ...
