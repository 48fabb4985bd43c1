"""The vision tower beside a language model: no run trains it, and its tensors come to an export as they are."""

from collections.abc import Iterator
from importlib import import_module
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_psft.errors import UserError
from megatron_psft.hf.folder import CONFIG
from megatron_psft.hf.mapping import module_name
from megatron_psft.hf.weights import check_tensors, open_tensors, save_tensors, stored_tensors, weight_files
from megatron_psft.model.families import VisionTower
from megatron_psft.model.shape import ModelShape

VISION_FILE = "vision.safetensors"
"""In a checkpoint of weights, which has those of the language model in another format."""


class VisionTensors:
    """Those of a folder, read one at a time."""

    def __init__(self, folder: Path, tower: VisionTower, field: str) -> None:
        """Raises UserError, which names `field` of the configuration, where the folder has none."""
        self._folder, self._tower, self._field = folder, tower, field
        self._file_of: dict[str, str] = {}
        self._dims: dict[str, tuple[int, ...]] = {}
        self.nbytes: dict[str, int] = {}
        """By their names in the files."""
        files = [VISION_FILE] if (folder / VISION_FILE).is_file() else []
        if not files and any(folder.glob("*.safetensors")):
            files = weight_files(folder, field)
        for file in files:
            with open_tensors(folder / file, field) as opened:
                for name in opened.keys():  # noqa: SIM118 (this is no dictionary)
                    if module_name(name, tower).startswith(tower.prefix):
                        view = opened.get_slice(name)
                        self._file_of[name], self._dims[name] = file, tuple(view.get_shape())
                        self.nbytes[name] = prod(view.get_shape()) * view[:0].dtype.itemsize
        if not self._file_of:
            raise UserError(
                f"{field} ({folder}) lacks the vision tower ({tower.prefix}*), which an export takes along; name a "
                "folder that has all of the model"
            )

    def check(self, model_type: str) -> None:
        """Raises UserError where tensors are missing, unknown, or of another size than config.json makes them."""
        names = {module_name(name, self._tower): name for name in self._file_of}
        found = {name: self._dims[stored] for name, stored in names.items()}
        expected = {
            self._tower.prefix + name: tuple(tensor.shape)
            for name, tensor in _empty_tower(self._folder, self._tower, model_type).state_dict().items()
        }
        check_tensors(found, expected, names, f"{self._field} ({self._folder})", model_type)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Each with its name in the files."""
        return stored_tensors(self._folder, self._file_of, self._field)

    def name_in_files(self, name: str) -> str:
        """How a tensor of the language model is spelled in files that spell the tower's names like these."""
        if any(stored.startswith(self._tower.prefix) for stored in self._file_of):
            return name
        for ours, theirs in self._tower.published.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    def save(self, folder: Path) -> None:
        """Writes all of them as one file beside a config.json, which is read by whoever reads that."""
        save_tensors(dict(self), folder / VISION_FILE)
        (folder / VISION_FILE).chmod((folder / CONFIG).stat().st_mode & 0o777)  # safetensors': for the owner alone


def _empty_tower(folder: Path, tower: VisionTower, model_type: str) -> torch.nn.Module:
    """As transformers makes it of a config.json, without memory."""
    from transformers import AutoConfig  # seconds

    modeling = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    with torch.device("meta"):
        empty: torch.nn.Module = getattr(modeling, tower.module)(AutoConfig.from_pretrained(folder).vision_config)
    return empty


def vision_of(folder: Path, shape: ModelShape, field: str = "load_hf") -> VisionTensors | None:
    """Those that go with a model of `shape`; None where it has no vision tower. Raises UserError where `folder`, which
    `field` of the configuration names, lacks some or has others."""
    if shape.family.vision is None:
        return None
    vision = VisionTensors(folder, shape.family.vision, field)
    vision.check(shape.model_type)
    return vision
