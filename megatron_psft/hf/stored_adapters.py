"""Adapters in the checkpoint of a run, without the run: written as `peft` has them, or added to the model that they
stand beside."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_psft import sealed
from megatron_psft.checkpoint import folders
from megatron_psft.checkpoint.identity import BASE
from megatron_psft.config.lora import LoraConfig
from megatron_psft.errors import UserError
from megatron_psft.hf.adapter import AdapterBase, merged, write_adapter
from megatron_psft.hf.conversion import HuggingFaceWeights, MegatronWeights, Outline, Weights
from megatron_psft.hf.fingerprint import weights_fingerprint
from megatron_psft.hf.folder import replacing
from megatron_psft.hf.mapping import pieces
from megatron_psft.model.parameters import is_adapter
from megatron_psft.model.shape import ModelShape
from megatron_psft.sealed import DamageError


@dataclass(frozen=True, kw_only=True)
class StoredAdapters:
    """What a checkpoint says of its adapters."""

    checkpoint: Path
    lora: LoraConfig
    base: str
    """What tells the weights of the model that they stand beside."""
    settings: Mapping[str, Any]
    """Of the run that wrote it."""

    def write(self, target: Path, shape: ModelShape, outline: Outline, dtype: torch.dtype | None) -> torch.dtype:
        """Writes `target` as a `peft` adapter in `dtype`, or in that of the run's own export, which is returned."""
        stored = self._weights(shape, outline)
        dtype = dtype or stored.export_dtype
        found = {name: tensor.contiguous() for name, tensor in stored.tensors(dtype)}
        has_folder = self.settings["init_from"] is None and not self.settings["random_init"]
        base = AdapterBase(name=self.settings["load_hf"] if has_folder else None, weights=self.base)
        with replacing(target, "to_hf") as folder:
            write_adapter(folder, found, shape, self.lora, base)
        return dtype

    def merged(self, shape: ModelShape, outline: Outline, model_folder: Path) -> "MergedWeights":
        """The model with the adapters added; `model_folder` is that of `load_hf`.

        Raises:
            UserError: the model that they stand beside is not there.
        """
        model = self._model(shape, outline, model_folder)
        stored = self._weights(shape, outline)
        return MergedWeights(
            model, dict(stored.tensors()), self.lora, torch.bfloat16 if self.settings["bf16"] else None
        )

    def _weights(self, shape: ModelShape, outline: Outline) -> MegatronWeights:
        own = {name: entry for name, entry in outline.items() if is_adapter(name)}
        return MegatronWeights(self.checkpoint, "from_megatron", shape, own, self.lora)

    def _model(self, shape: ModelShape, outline: Outline, model_folder: Path) -> Weights:
        init_from = self.settings["init_from"]
        if self.settings["random_init"]:
            raise UserError(
                f"lora_merge needs the model beside the adapters of {self.checkpoint}, which was drawn at random; "
                "start its run again with --lora-merge and --export-hf"
            )
        if init_from is None:
            found = weights_fingerprint(model_folder, "load_hf")
            if found != self.base:
                raise UserError(
                    f"load_hf ({model_folder}) has the weights ({found}), and the adapters of {self.checkpoint} stand "
                    f"beside ({self.base}); name the model that they were trained on"
                )
            return HuggingFaceWeights(model_folder, "load_hf", shape)
        place = Path(init_from)
        for checkpoint in [place] if folders.is_step_folder(place) else folders.step_folders(place):
            if f"checkpoint {sealed.marker_sum(checkpoint)}" == self.base:
                whole = {name: entry for name, entry in outline.items() if not is_adapter(name)}
                return MegatronWeights(checkpoint, "init_from", shape, whole)
        raise UserError(
            f"lora_merge needs the checkpoint beside whose weights the adapters of {self.checkpoint} stand, which is "
            f"not in {place} any more; put it back"
        )


def stored_adapters(checkpoint: Path) -> StoredAdapters | None:
    """None for a checkpoint that holds a model, or is damaged."""
    try:
        content = sealed.read_content(checkpoint)
    except DamageError:
        return None
    if BASE not in content["identity"]:
        return None
    settings = content["settings"]
    names = {field.name for field in fields(LoraConfig)} - {"load_lora", "lora_merge"}
    values = {name: settings[name] for name in names} | {"lora_targets": tuple(settings["lora_targets"])}
    base = content["identity"][BASE]
    return StoredAdapters(checkpoint=checkpoint, lora=LoraConfig(**values), base=base, settings=settings)


class MergedWeights:
    """A model with adapters added to its weights, in fp32 and rounded once."""

    def __init__(
        self, model: Weights, adapters: Mapping[str, Tensor], lora: LoraConfig, trained_dtype: torch.dtype | None
    ) -> None:
        """Adds nothing yet.

        Args:
            model: without the adapters.
            adapters: by `peft`'s names.
            lora: of the adapters.
            trained_dtype: that the model had in training; as it is stored if None.
        """
        self.shape = model.shape
        self.dtype = trained_dtype or model.dtype
        self.export_dtype = trained_dtype or model.export_dtype
        self._model, self._adapters, self._scale = model, adapters, lora.lora_scale

    def fill(self, name: str, parameter: Tensor) -> None:
        whole = torch.empty(parameter.shape, dtype=self.dtype)
        self._model.fill(name, whole)
        row = 0
        for piece in pieces(name, self.shape, tensor_rank=0, tensor_size=1, local_rows=len(parameter)):
            stop = row + piece.rows[1] - piece.rows[0]
            parameter[row:stop] = merged(piece.name, whole[row:stop], self._adapters, self._scale, piece.index)
            row = stop
        parameter[row:] = whole[row:]

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._model.tensors(self.dtype):
            yield name, merged(name, tensor, self._adapters, self._scale).to(dtype or self.dtype)
