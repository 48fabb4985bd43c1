"""The safetensors of a model that Megatron-Bridge converts: what there is of them, and those that only pass through."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_psft.errors import UserError
from megatron_psft.hf.weights import open_tensors, stored_tensors, weight_files

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    file: str
    dims: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.dims) * self.dtype.itemsize


def read_tensors(folder: Path, field: str = "load_hf") -> dict[str, StoredTensor]:
    """Every tensor of a folder by its name. Raises UserError, which names `field`, for files that are missing or
    damaged, and for a tensor that is none of numbers in floating point, as quantized ones are."""
    found = {}
    for file in weight_files(folder, field):
        with open_tensors(folder / file, field) as opened:
            for name in opened.keys():  # noqa: SIM118 (this is no dictionary)
                view = opened.get_slice(name)
                if view.get_dtype() not in _DTYPES:
                    raise UserError(
                        f"{field} ({folder}): {name} is {view.get_dtype()}, and only weights in floating point are "
                        "trained; name a folder that has them"
                    )
                found[name] = StoredTensor(file, tuple(view.get_shape()), _DTYPES[view.get_dtype()])
    return found


class PassedOn:
    """Tensors that go from the folder into an export as they are, read one at a time."""

    def __init__(self, folder: Path, tensors: Mapping[str, StoredTensor], is_passed_on: Callable[[str], bool]) -> None:
        self._folder = folder
        self._tensors = {name: it for name, it in tensors.items() if is_passed_on(name)}
        self.nbytes = {name: it.nbytes for name, it in self._tensors.items()}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return stored_tensors(self._folder, {name: it.file for name, it in self._tensors.items()}, "load_hf")
