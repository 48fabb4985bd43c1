"""Weights of a Hugging Face folder or of a Megatron-Core checkpoint, read and written one parameter at a time.

A distributed checkpoint has whole tensors and does not say who held which part of them, so that it is read in any
layout. Here the model is one rank's alone, on the meta device: it only says what a checkpoint calls its parameters.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemWriter,
    LoadPlan,
    SavePlan,
    TensorStorageMetadata,
    WriteItem,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from megatron_psft import sealed
from megatron_psft.atomic import aside, sync
from megatron_psft.checkpoint.identity import BASE, VERSION, WEIGHTS_ONLY_STEP, Identity, weights_identity
from megatron_psft.checkpoint.state import sharded_weights
from megatron_psft.checkpoint.unpickle import DataReader
from megatron_psft.config.inputs import DataConfig, WeightsConfig
from megatron_psft.config.lora import LoraConfig
from megatron_psft.config.schema import Config
from megatron_psft.distributed.device import prepare
from megatron_psft.distributed.grid import initialize_parallel, process_group
from megatron_psft.errors import UserError
from megatron_psft.hf.mapping import Piece, adapter_tensors, hf_tensors, module_name, pieces, scatter
from megatron_psft.hf.side_files import SideFiles
from megatron_psft.hf.vision import vision_of
from megatron_psft.hf.weights import SafetensorsFolder, fill_shard
from megatron_psft.model.adapters import add_adapters, targeted
from megatron_psft.model.gpt import build_chunk, transformer_config
from megatron_psft.model.parameters import is_expert, whole_name
from megatron_psft.model.shape import ModelShape, read_shape
from megatron_psft.progress import progress
from megatron_psft.sealed import DamageError

Checksums = dict[str, tuple[torch.dtype, str]]
"""Dtype and SHA-256 of tensors by their names."""

Outline = dict[str, ShardedBase]
"""Every parameter's parallel in a checkpoint, by its name in the whole model; it has no data."""


class Weights(Protocol):
    """All of a model's weights."""

    shape: ModelShape
    dtype: torch.dtype
    """As they are stored."""
    export_dtype: torch.dtype
    """That a Hugging Face folder made of them has."""

    def fill(self, name: str, parameter: Tensor) -> None:
        """Reads a parameter of Megatron-Core's model, in the dtype of `parameter`."""
        ...

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yields every Hugging Face tensor with its name, in `dtype` or as it is stored."""
        ...


class HuggingFaceWeights:
    """The weights of a Hugging Face folder."""

    def __init__(self, folder: Path, field: str, shape: ModelShape) -> None:
        """Raises UserError, which names `field` of the configuration, for weights that are damaged or of a model other
        than `shape`."""
        _check_model(folder, field, weights_identity(read_shape(folder, field)), weights_identity(shape))
        self.shape = shape
        self.files = SafetensorsFolder(folder, shape, field)
        self.dtype = self.export_dtype = self.files.dtype

    def fill(self, name: str, parameter: Tensor) -> None:
        fill_shard(name, parameter, self.files, self.shape, tensor_rank=0, tensor_size=1)

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, dims in hf_tensors(self.shape).items():
            yield name, self.files.read(Piece(name, (0, dims[0]))).to(dtype)
        self.files.close()


class MegatronWeights:
    """The weights of a checkpoint, or its adapters."""

    def __init__(
        self, folder: Path, field: str, shape: ModelShape, outline: Outline, lora: LoraConfig | None = None
    ) -> None:
        """Raises UserError, which names `field` of the configuration, for a checkpoint that is damaged or of a model
        other than `shape`. `lora` is of its adapters, where they are what is read."""
        check_intact(folder, field, weights_identity(shape), has_adapters=lora is not None)
        self.shape, self._outline = shape, outline
        self._dims = hf_tensors(shape) if lora is None else adapter_tensors(shape, lora)
        self._reader = DataReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        stored = metadata.state_dict_metadata.items()
        self._stored = {key: value for key, value in stored if isinstance(value, TensorStorageMetadata)}
        # Of any tensor, which stands for all.
        self.dtype = self._stored[next(iter(outline.values())).key].properties.dtype
        # As the export at the end of a run has it.
        self.export_dtype = self.dtype if self.dtype == torch.bfloat16 else getattr(torch, shape.dtype)

    def fill(self, name: str, parameter: Tensor) -> None:
        """By torch's reader: Megatron-Core's, in a world of one, has to read a parameter of all layers."""
        parameter.zero_()  # of a padded vocabulary, the checkpoint may have fewer rows
        items = []
        for shard in _shards(self._outline[name], parameter):
            stored = self._stored[shard.key]
            assert stored.size == torch.Size(shard.global_shape) or shard.allow_shape_mismatch
            items += create_read_items_for_chunk_list(shard.key, stored, [_chunk(shard)])
        self._reader.read_data(LoadPlan(items), _Reading(self._outline[name], parameter)).wait()

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        dims, dtype = self._dims, dtype or self.dtype
        for name, entry in self._outline.items():
            parameter = torch.empty(entry.data.shape, dtype=dtype)
            self.fill(name, parameter)
            blocks = pieces(name, self.shape, tensor_rank=0, tensor_size=1, local_rows=len(parameter))
            tensors = {block.name: torch.empty(dims[block.name], dtype=dtype) for block in blocks}
            scatter(parameter, blocks, tensors)
            del parameter  # not to be held while the tensors are used
            yield from tensors.items()


def check_intact(folder: Path, field: str, wanted: Identity, *, has_adapters: bool = False) -> None:
    """Raises UserError, which names `field` of the configuration, for a checkpoint that is damaged, or not of the model
    whose identity is `wanted`."""
    try:
        content = sealed.read_content(folder)
    except DamageError as error:
        raise UserError(f"{field} ({folder}) must be an intact checkpoint: {error}") from None
    if content["version"] != VERSION:
        raise UserError(f"{field} ({folder}): version ({content['version']}) must be {VERSION}; use its own release")
    if (BASE in content["identity"]) != has_adapters:
        raise UserError(f"{field} ({folder}) holds {'a model' if has_adapters else 'adapters and not a model'}")
    _check_model(folder, field, content["identity"], wanted)
    num_files = len(list(folder.iterdir()))
    for part in progress(range(num_files), "checksums", unit="file"):
        damage = sealed.first_damage(folder, part=part, parts=num_files)
        if damage is not None:
            raise UserError(f"{field} ({folder}) must be an intact checkpoint: {damage}")


def _check_model(folder: Path, field: str, found: Identity, wanted: Identity) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"{field} ({folder}) must be of the same model, but has {name} ({found.get(name)}) instead of ({value})"
            )


def outline_of(shape: ModelShape, lora: LoraConfig | None = None) -> Outline:
    """Builds the model, with the adapters that `lora` asks for, in a world of one process, for as long as that takes;
    the process sees no GPU from then on."""
    # On a GPU, Megatron-Core's and Transformer Engine's layers name their device, which the meta device gives way to.
    platform = prepare("cpu", 0)
    unused = str(Path())  # on these parts of a run's configuration no parameter depends
    weights, data = WeightsConfig(load_hf=unused, save=unused), DataConfig(data=(unused,))
    config = Config(weights=weights, data=data, lora=lora or LoraConfig())
    with process_group(platform, 1):
        parallel = initialize_parallel(config.parallel, virtual_size=None, seed=0, device=platform.device)
        with torch.device("meta"):
            model = build_chunk(shape, config, transformer_config(shape, config, platform), platform, parallel, 0)
            if chosen := targeted(config.lora, shape):
                add_adapters(model, shape, config, chosen, tensor_size=1)
        return {whole_name(name, model): entry for name, entry in sharded_weights(model).items()}


def write_checkpoint(
    target: Path,
    source: Weights,
    outline: Outline,
    dtype: torch.dtype,
    *,
    side_files: SideFiles,
    export_dtype: torch.dtype,
) -> None:
    """Writes a checkpoint of nothing but weights in `dtype`. Beside them lies what makes a Hugging Face folder of them
    again; its config names `export_dtype`.

    The folder appears under its name only when it is complete.
    """
    vision = vision_of(side_files.model_folder, source.shape)
    with aside(target.resolve().parent, target.name) as folder:
        staging = sealed.begin(folder / target.name)
        _write_parameters(staging, source, outline, dtype)
        side_files.write(staging, export_dtype)
        if vision is not None:
            vision.save(staging)
        content = {"version": VERSION, "step": WEIGHTS_ONLY_STEP, "identity": weights_identity(source.shape)}
        sealed.seal(folder / target.name, content)
        (folder / target.name).rename(target)
        sync(target.resolve().parent)


def _write_parameters(folder: Path, source: Weights, outline: Outline, dtype: torch.dtype) -> None:
    """Writes what Megatron-Core's `dist_checkpointing.save` would, which wants all parameters in memory: torch's own
    writer, one file after the other."""
    save_config(CheckpointingConfig("torch_dist"), str(folder))
    torch.save({}, folder / COMMON_STATE_FNAME)  # nothing that is no tensor, in the form that every release reads
    files = [list(names) for _, names in groupby(outline, _file_of)]
    plans = [SavePlan([item for name in names for item in _write_items(outline[name], dtype)]) for names in files]
    plans, metadata = create_default_global_save_plan(plans)
    writer = FileSystemWriter(folder)
    plans = writer.prepare_global_plan(plans)  # one file each, called after its number
    planner = _Writing(source, outline, dtype)
    results: list[list[WriteResult]] = []
    for number, plan in enumerate(progress(plans, "convert", unit="file")):
        results.append(writer.write_data(plan, planner).wait())
        sealed.leave_sums(folder, number)
    writer.finish(metadata, results)


def _file_of(name: str) -> str:
    """What the parameters in a file have in common: they are one, or all experts' of a layer. The writer holds the last
    parameter of each kind that a file has."""
    return name.partition(".mlp.experts.")[0] if is_expert(name) else name


class _Writing(DefaultSavePlanner):
    """Hands the parts of parameters to torch's writer, and reads one parameter at a time for that."""

    def __init__(self, source: Weights, outline: Outline, dtype: torch.dtype) -> None:
        super().__init__()
        self._source, self._outline, self._dtype = source, outline, dtype
        self._names = {_index(shard): name for name, it in outline.items() for shard in _shards(it, it.data)}
        self._parts: dict[MetadataIndex, Tensor] = {}

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        if index not in self._parts:
            self._parts = {}  # before there is another parameter
            entry = self._outline[self._names[index]]
            parameter = torch.empty(entry.data.shape, dtype=self._dtype)
            self._source.fill(self._names[index], parameter)
            self._parts = _parts(entry, parameter)
        return self._parts[index]


class _Reading(DefaultLoadPlanner):
    """Hands the parts of one parameter to torch's reader, to be filled."""

    def __init__(self, entry: ShardedBase, parameter: Tensor) -> None:
        super().__init__()
        self._parts = _parts(entry, parameter)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._parts[index]


def _parts(entry: ShardedBase, parameter: Tensor) -> dict[MetadataIndex, Tensor]:
    return {_index(shard): shard.data.view(_chunk(shard).sizes) for shard in _shards(entry, parameter)}


def _write_items(entry: ShardedBase, dtype: torch.dtype) -> list[WriteItem]:
    return [
        WriteItem(
            index=_index(shard),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=_chunk(shard),
                properties=TensorProperties(dtype=dtype),
                size=torch.Size(shard.global_shape),
            ),
        )
        for shard in _shards(entry, entry.data)
    ]


def _index(shard: ShardedTensor) -> MetadataIndex:
    return MetadataIndex(shard.key, torch.Size(shard.global_offset))


def _chunk(shard: ShardedTensor) -> ChunkStorageMetadata:
    """Its parallel in the checkpoint's tensor, which has the parameters of one kind of all layers."""
    sizes = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    return ChunkStorageMetadata(offsets=torch.Size(shard.global_offset), sizes=torch.Size(sizes))


def _shards(entry: ShardedBase, parameter: Tensor) -> Iterable[ShardedTensor]:
    """The parts that Megatron-Core cuts a parameter into, as it does gate and up projection."""
    whole = _with_data(entry, parameter)
    return [whole] if isinstance(whole, ShardedTensor) else nested_values(whole.build())


def _with_data(entry: ShardedBase, parameter: Tensor) -> Any:
    if isinstance(entry, ShardedTensor):
        return replace(entry, data=parameter, dtype=parameter.dtype)
    return replace(entry, data=parameter)


def checksums(weights: Weights, name: str, dtype: torch.dtype | None = None) -> Checksums:
    """Of every Hugging Face tensor, in `dtype` or as it is stored; `name` of the weights is for the progress bar."""
    total = len(hf_tensors(weights.shape))
    tensors = progress(weights.tensors(dtype), name, unit="tensor", total=total)
    return {tensor_name: _checksum(tensor) for tensor_name, tensor in tensors}


def vision_checksums(folder: Path, shape: ModelShape, field: str) -> Checksums:
    """Of the tensors that go with a model of `shape` from `folder`, which `field` names, if any do."""
    vision = vision_of(folder, shape, field)
    return {module_name(name, shape.family.vision): _checksum(tensor) for name, tensor in vision or ()}


def _checksum(tensor: Tensor) -> tuple[torch.dtype, str]:
    return tensor.dtype, sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()
