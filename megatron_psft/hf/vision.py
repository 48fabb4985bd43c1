"""The vision tower beside a language model: no run trains it, and its tensors come to an export as they are."""

from collections.abc import Iterator
from math import prod
from pathlib import Path

from torch import Tensor

from megatron_psft.errors import UserError
from megatron_psft.hf.folder import CONFIG
from megatron_psft.hf.mapping import module_name
from megatron_psft.hf.weights import open_tensors, save_tensors, stored_tensors, weight_files
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
                        self._file_of[name] = file
                        self.nbytes[name] = prod(view.get_shape()) * view[:0].dtype.itemsize
        if not self._file_of:
            raise UserError(
                f"{field} ({folder}) lacks the vision tower ({tower.prefix}*), which an export takes along; name a "
                "folder that has all of the model"
            )

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


def vision_of(folder: Path, shape: ModelShape, field: str = "load_hf") -> VisionTensors | None:
    """Those that go with a model of `shape`; None where it has no vision tower. Raises UserError where `folder`, which
    `field` of the configuration names, lacks them."""
    tower = shape.family.vision
    return None if tower is None else VisionTensors(folder, tower, field)
