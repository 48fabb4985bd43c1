"""Fills a model's parameters, each rank reading just its own slices, from safetensors or a seed; writes safetensors."""

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_psft.distributed.grid import Parallel
from megatron_psft.errors import UserError, reason_of
from megatron_psft.hf.mapping import Piece, embedding_name, head_name, hf_tensors, module_name, pieces
from megatron_psft.model.parameters import is_adapter, named_parameters, shard_place
from megatron_psft.model.shape import ModelShape
from megatron_psft.progress import progress

_MEAN_ROWS = 8192  # held at a time in double precision

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class WeightSource(Protocol):
    """Where Hugging Face tensors come from."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding, which stands for all."""
        ...

    def read(self, piece: Piece) -> Tensor:
        """Returns the block that `piece` names, on the CPU."""
        ...


def check_tensors(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, str],
    place: str,
    model_type: str,
) -> None:
    """Raises UserError where tensors are missing, unknown or of another size.

    Args:
        found: sizes of the tensors in files, by their modules' names.
        expected: by config.json.
        stored: the names in the files.
        place: where the files are, for errors.
        model_type: for errors.
    """
    missing = [name for name in expected if name not in found]
    if missing:
        raise UserError(f"{place} lacks {_some(missing)}; a {model_type} checkpoint must have them")
    unknown = [stored[name] for name in found if name not in expected]
    if unknown:
        raise UserError(f"{place} holds {_some(unknown)}, which a {model_type} model does not use")
    for name, dims in expected.items():
        if found[name] != dims:
            raise UserError(f"{place}: {name} is {found[name]}, but config.json makes it {dims}")


class SafetensorsFolder:
    """The weights of a Hugging Face model folder. Pickled weights are never opened.

    One file is open at a time: what has been read of it counts as memory of this process until it is closed.
    """

    def __init__(self, folder: Path, shape: ModelShape, field: str = "load_hf") -> None:
        """Looks into the files and checks their tensors against `shape`.

        Args:
            folder: that holds them.
            shape: of the model.
            field: of the configuration, for errors.

        Raises:
            UserError: no safetensors, a missing or damaged file, or tensors that are missing, unknown or of another
            size.
        """
        self._folder, self._field = folder, field
        self._embedding, self._head = embedding_name(shape), head_name(shape)
        self._opened: tuple[str, safe_open] | None = None
        self._vision, has_vision = shape.family.vision, False
        self._stored: dict[str, str] = {}  # name of a module's tensor to the name in the file
        self._file_of: dict[str, str] = {}
        self._dims: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}  # as safetensors spells them
        for name in weight_files(folder, field):
            file = self._open(name)
            for stored in file.keys():  # noqa: SIM118 (this is no dictionary)
                view, tensor = file.get_slice(stored), module_name(stored, self._vision)
                if self._vision is not None and tensor.startswith(self._vision.prefix):
                    has_vision = True
                    continue  # vision.py reads them
                self._stored[tensor], self._file_of[tensor] = stored, name
                self._dims[tensor], self._dtypes[tensor] = tuple(view.get_shape()), view.get_dtype()
        if self._vision is not None and not has_vision:
            raise UserError(
                f"{field} ({folder}) lacks {self._vision.prefix}*; a {shape.model_type} checkpoint must have them"
            )
        expected = hf_tensors(shape)
        found = {name: dims for name, dims in self._dims.items() if name in expected or not _is_redundant(name, shape)}
        check_tensors(found, expected, self._stored, f"{field} ({folder})", shape.model_type)
        self._check_tie(shape)

    def _open(self, name: str) -> safe_open:
        if self._opened is None or self._opened[0] != name:
            self._opened = name, open_tensors(self._folder / name, self._field)
        return self._opened[1]

    def close(self) -> None:
        """Lets the open file go; what is read after this opens one again."""
        self._opened = None

    def _check_tie(self, shape: ModelShape) -> None:
        """A head of its own under tie_word_embeddings is a contradiction, which transformers resolves by untying."""
        if shape.tied_embeddings and self._head in self._file_of:
            head, embedding = (
                self._open(self._file_of[name]).get_tensor(self._stored[name]) for name in (self._head, self._embedding)
            )
            if not torch.equal(head, embedding):
                raise UserError(
                    f"{self._field} ({self._folder}): {self._head} differs from {self._embedding}, but config.json has "
                    "tie_word_embeddings true; set it to false"
                )

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding, which stands for all."""
        return self.read(Piece(self._embedding, (0, 1))).dtype

    def other_dtype(self) -> str | None:
        """What to say of a tensor whose dtype is not the embedding's, where there is one."""
        for name, dtype in self._dtypes.items():
            if dtype != self._dtypes[self._embedding]:
                return f"{name} is {dtype} and {self._embedding} is {self._dtypes[self._embedding]}"
        return None

    def read(self, piece: Piece) -> Tensor:
        """Reads only the bytes of the block."""
        return self._open(self._file_of[piece.name]).get_slice(self._stored[piece.name])[piece.index]


class RandomWeights:
    """Freshly drawn weights, the same for any layout: every tensor has its own generator, seeded by its name."""

    def __init__(self, shape: ModelShape, seed: int) -> None:
        self._tensors = hf_tensors(shape)
        self._std, self._seed = shape.initializer_range, seed
        self.dtype: torch.dtype = getattr(torch, shape.dtype)

    def of_shape(self, shape: ModelShape) -> "RandomWeights":
        """Those of another shape, from the same seed."""
        return RandomWeights(shape, self._seed)

    def read(self, piece: Piece) -> Tensor:
        """Draws the whole tensor and returns the block; norms are one, biases zero, the rest normal."""
        dims = self._tensors[piece.name]
        if len(dims) == 1:
            tensor = torch.zeros(dims) if piece.name.endswith("bias") else torch.ones(dims)
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(piece.name.encode()) + self._seed)
            tensor = torch.randn(dims, generator=generator) * self._std
        return tensor[piece.index].to(self.dtype)


class WithMeanRows:
    """Weights with rows added to the embedding and the output layer, each the mean of the rows that there are: a new
    token is about as probable as the others are on average, whatever came before (J. Hewitt, "Initializing New Word
    Embeddings for Pretrained Language Models", 2021)."""

    def __init__(self, weights: SafetensorsFolder, shape: ModelShape) -> None:
        """`shape` is that of `weights`, without the rows."""
        self._weights, self._num_rows = weights, shape.vocab_size
        self._names = {embedding_name(shape), head_name(shape)}
        self._means: dict[str, Tensor] = {}
        self.dtype = weights.dtype

    def read(self, piece: Piece) -> Tensor:
        """Reads only the bytes of the block, and of a tensor with new rows in it all."""
        start, stop = piece.rows
        if piece.name not in self._names or stop <= self._num_rows:
            return self._weights.read(piece)
        new = self._mean(piece.name).expand(stop - max(start, self._num_rows), -1)
        if start >= self._num_rows:
            return new
        return torch.cat([self._weights.read(Piece(piece.name, (start, self._num_rows))), new])

    def _mean(self, name: str) -> Tensor:
        """Of a tensor's rows: [1, hidden], in its dtype."""
        if name not in self._means:
            starts = range(0, self._num_rows, _MEAN_ROWS)
            blocks = (Piece(name, (start, min(start + _MEAN_ROWS, self._num_rows))) for start in starts)
            total = sum(self._weights.read(block).double().sum(0, keepdim=True) for block in blocks)
            self._means[name] = (torch.as_tensor(total) / self._num_rows).to(self.dtype)
        return self._means[name]


@torch.no_grad()
def fill_parameters(
    chunks: Sequence[torch.nn.Module],
    source: WeightSource,
    shape: ModelShape,
    parallel: Parallel,
    *,
    adapters: bool = False,
) -> None:
    """Fills this rank's parameters from `source`, those of the model or else its `adapters`; padding rows of the
    vocabulary become zero."""
    parameters = [(name, parameter) for name, parameter in named_parameters(chunks) if is_adapter(name) == adapters]
    title = "adapters" if adapters else "weights"
    for name, parameter in progress(parameters, title, unit="tensor", is_shown=parallel.is_main):
        tensor_rank, tensor_size = shard_place(name, parallel)
        fill_shard(name, parameter, source, shape, tensor_rank=tensor_rank, tensor_size=tensor_size)


def fill_shard(
    name: str, shard: Tensor, source: WeightSource, shape: ModelShape, *, tensor_rank: int, tensor_size: int
) -> None:
    """Fills one tensor-parallel rank's part of parameter `name`, in its dtype."""
    row = 0
    for piece in pieces(name, shape, tensor_rank=tensor_rank, tensor_size=tensor_size, local_rows=len(shard)):
        block = source.read(piece)
        shard[row : row + len(block)].copy_(block)
        row += len(block)
    shard[row:].zero_()


def open_tensors(path: Path, field: str) -> safe_open:
    """A safetensors file, of which nothing but its header is read. Raises UserError, which names `field`, for one that
    is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{field}: {path} must be a readable safetensors file: {reason_of(error)}") from None


def stored_tensors(folder: Path, file_of: Mapping[str, str], field: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors as they are stored, each with its name, file after file.

    Args:
        folder: of the files.
        file_of: the file's name by that of the tensor.
        field: the setting that `folder` is of, which errors name.
    """
    for file in sorted(set(file_of.values())):
        with open_tensors(folder / file, field) as opened:
            for name in [name for name, of in file_of.items() if of == file]:
                yield name, opened.get_tensor(name)


def weight_files(folder: Path, field: str) -> list[str]:
    """Names of the safetensors files; like transformers, a single file goes before an index."""
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    index = folder / _INDEX
    if index.is_file():
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return sorted(Path(name).name for name in files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{field}: {index} must be a safetensors index: {error!r}") from None
    pickled = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    if pickled:
        raise UserError(
            f"{field} ({folder}) holds only pickled weights ({_some(pickled)}), which are never opened as they can run "
            "code; convert them to safetensors"
        )
    raise UserError(
        f"{field} ({folder}) holds no {_SINGLE} and no {_INDEX}; add the weights (training alone can draw some: "
        "--random-init)"
    )


def _is_redundant(name: str, shape: ModelShape) -> bool:
    """Derived rotary tables, and a tied head, which `_check_tie` compares with the embedding."""
    return name.endswith("rotary_emb.inv_freq") or (shape.tied_embeddings and name == head_name(shape))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] = MappingProxyType({})) -> None:
    """Writes a safetensors file. Raises OSError where the disk fails: safetensors says only in words that it does."""
    try:
        save_file(tensors, path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        said = re.search(r"os error (\d+)", str(error))
        if said is None:
            raise
        raise OSError(int(said[1]), os.strerror(int(said[1])), str(path)) from error
