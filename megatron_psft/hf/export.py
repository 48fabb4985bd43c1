"""Writes the model as a Hugging Face folder, tensor by tensor."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_psft.config.lora import LoraConfig
from megatron_psft.distributed.collective import on_rank_zero, patient_group
from megatron_psft.distributed.grid import Parallel
from megatron_psft.hf.adapter import AdapterBase, merged, write_adapter
from megatron_psft.hf.folder import replacing
from megatron_psft.hf.mapping import adapter_tensors, hf_tensors, pieces, scatter
from megatron_psft.hf.side_files import SideFiles
from megatron_psft.hf.vision import vision_of
from megatron_psft.hf.weights import save_tensors
from megatron_psft.model.parameters import is_adapter, own_parameters, shard_place
from megatron_psft.model.shape import ModelShape
from megatron_psft.progress import progress

# transformers' own default; what rank 0 holds in memory at a time.
MAX_SHARD_BYTES = 5 * 10**9


def export(
    chunks: Sequence[torch.nn.Module],
    target: Path,
    *,
    shape: ModelShape,
    dtype: torch.dtype,
    side_files: SideFiles,
    parallel: Parallel,
    lora: LoraConfig | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes `target`: safetensors with index, config, generation config, tokenizer and chat template.

    Collective over all ranks; data-parallel replica 0, which is other ranks for experts, sends its shards to rank 0,
    which writes. The folder appears under its name only when it is complete, and of an earlier export of that name the
    files are replaced then, see folder.py.

    Args:
        chunks: the model; its parameters must be current on every rank.
        target: folder to write, seen by rank 0.
        shape: of the model.
        dtype: of the tensors in the files.
        side_files: what goes with the weights.
        parallel: this rank's place.
        lora: of the model's adapters, which are added to its weights; None without any.
        max_shard_bytes: size limit of one file, unless a single tensor is larger.

    Raises:
        UserError: on all ranks, where the folder cannot be written or holds what may not be replaced.
        InfrastructureError: on all ranks, where the disk is full or fails.
    """
    tensors = _weights(chunks, shape, parallel) if lora is None else _merged(chunks, shape, lora, parallel)
    options: dict[str, Any] = {"dtype": dtype, "side_files": side_files, "max_shard_bytes": max_shard_bytes}
    write_gathered(tensors, lambda: write_folder(target, tensors, shape=shape, **options), parallel)


def export_adapter(
    chunks: Sequence[torch.nn.Module],
    target: Path,
    *,
    shape: ModelShape,
    dtype: torch.dtype,
    lora: LoraConfig,
    base: AdapterBase,
    parallel: Parallel,
) -> None:
    """Writes `target` as a `peft` adapter: adapter_config.json and adapter_model.safetensors; else as `export` does.

    Args:
        chunks: the model; its parameters must be current on every rank.
        target: folder to write, seen by rank 0.
        shape: of the model.
        dtype: of the tensors in the file.
        lora: of the adapters.
        base: the model without them.
        parallel: this rank's place.
    """
    tensors = _adapters(chunks, shape, lora, parallel)

    def write() -> None:
        found = {name: tensor.to(dtype).contiguous() for name, tensor in tensors}
        with replacing(target, "export_hf") as folder:
            write_adapter(folder, found, shape, lora, base)

    write_gathered(tensors, write, parallel)


def write_gathered(tensors: Iterable[object], write: Callable[[], None], parallel: Parallel) -> None:
    """`write` on rank 0, of tensors that all ranks gather; collective."""

    def write_all() -> None:
        try:
            write()
        finally:
            _take_all(tensors)  # that the other ranks send, whatever has failed

    with patient_group() as group:
        if not parallel.is_main:
            _take_all(tensors)
        on_rank_zero(write_all, group)


def _take_all(tensors: Iterable[object]) -> None:
    for _ in tensors:
        pass


def write_folder(
    target: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    shape: ModelShape,
    dtype: torch.dtype,
    side_files: SideFiles,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    option: str = "export_hf",
) -> None:
    """Writes what `export` does from all of the model's Hugging Face tensors; a file's are held until it is full, so
    they had better come in about the order of `hf_tensors`. `option` names `target` in errors."""
    vision = vision_of(side_files.model_folder, shape)
    spelled = str if vision is None else vision.name_in_files
    sizes = {spelled(name): dtype.itemsize * prod(dims) for name, dims in hf_tensors(shape).items()}
    write_tensors(
        target,
        ((spelled(name), tensor.to(dtype)) for name, tensor in tensors),
        sizes,
        dtype=dtype,
        side_files=side_files,
        beside=vision,
        max_shard_bytes=max_shard_bytes,
        option=option,
    )


class Beside(Protocol):
    """Tensors that come to an export from elsewhere, as they are."""

    @property
    def nbytes(self) -> Mapping[str, int]:
        """By their names."""
        ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


def write_tensors(
    target: Path,
    tensors: Iterable[tuple[str, Tensor]],
    sizes: Mapping[str, int],
    *,
    dtype: torch.dtype,
    side_files: SideFiles,
    beside: Beside | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    option: str = "export_hf",
) -> None:
    """Writes a folder of `tensors` as they are, whose bytes are `sizes`, and of those `beside` them; `dtype` is what
    config.json says of them. Else as `write_folder`."""
    every = {**sizes, **({} if beside is None else beside.nbytes)}
    with replacing(target, option) as folder:
        writer = _ShardWriter(folder, every, max_shard_bytes)
        for name, tensor in progress(tensors, "export", unit="tensor", total=len(sizes)):
            writer.add(name, tensor)
        for name, tensor in beside or ():
            writer.add(name, tensor)
        writer.finish()
        side_files.write(folder, dtype)


def _weights(chunks: Sequence[torch.nn.Module], shape: ModelShape, parallel: Parallel) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors, without adapters, as `_gathered_tensors` yields them."""
    local = {name: value for name, value in own_parameters(chunks, parallel).items() if not is_adapter(name)}
    if shape.tied_embeddings:
        local.pop("output_layer.weight", None)
    return _gathered_tensors(local, hf_tensors(shape), shape, parallel)


def _adapters(
    chunks: Sequence[torch.nn.Module], shape: ModelShape, lora: LoraConfig, parallel: Parallel
) -> Iterator[tuple[str, Tensor]]:
    local = {name: value for name, value in own_parameters(chunks, parallel).items() if is_adapter(name)}
    return _gathered_tensors(local, adapter_tensors(shape, lora), shape, parallel)


def _merged(
    chunks: Sequence[torch.nn.Module], shape: ModelShape, lora: LoraConfig, parallel: Parallel
) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors with the adapters added, in fp32 where these change them."""
    adapters = dict(_adapters(chunks, shape, lora, parallel))  # none but on rank 0
    for name, tensor in _weights(chunks, shape, parallel):
        yield name, merged(name, tensor, adapters, lora.lora_scale)


def _gathered_tensors(
    local: dict[str, torch.nn.Parameter], dims: Mapping[str, tuple[int, ...]], shape: ModelShape, parallel: Parallel
) -> Iterator[tuple[str, Tensor]]:
    """Yields every Hugging Face tensor of `dims`, made of the ranks' `local` parameters, whole on rank 0, in their
    order; nothing on the other ranks."""
    owners = _owners(local, parallel)
    order = {name: position for position, name in enumerate(dims)}

    def first_tensor(parameter: str) -> int:
        return order[pieces(parameter, shape, tensor_rank=0, tensor_size=1, local_rows=1)[0].name]

    for name in sorted(owners, key=first_tensor):
        shards = {rank: _to_main(local.get(name), rank, info, parallel) for rank, info in owners[name].items()}
        if not parallel.is_main:
            continue
        whole: dict[str, Tensor] = {}
        _, tensor_size = shard_place(name, parallel)
        for (tensor_rank, local_dims, local_dtype), shard in zip(owners[name].values(), shards.values(), strict=True):
            blocks = pieces(name, shape, tensor_rank=tensor_rank, tensor_size=tensor_size, local_rows=local_dims[0])
            for block in blocks:
                if block.name not in whole:
                    whole[block.name] = torch.empty(dims[block.name], dtype=local_dtype)
            assert shard is not None
            scatter(shard, blocks, whole)
        yield from whole.items()


_ShardInfo = tuple[int, tuple[int, ...], torch.dtype]  # tensor-parallel rank, dimensions, dtype


def _owners(local: dict[str, torch.nn.Parameter], parallel: Parallel) -> dict[str, dict[int, _ShardInfo]]:
    """Parameter name to the ranks that hold a shard of it, in tensor-parallel order."""
    infos = {name: (shard_place(name, parallel)[0], tuple(value.shape), value.dtype) for name, value in local.items()}
    gathered: list[dict[str, _ShardInfo]] = [{} for _ in range(parallel.world_size)]
    dist.all_gather_object(gathered, infos)
    owners: dict[str, dict[int, _ShardInfo]] = {}
    for rank, found in enumerate(gathered):
        for name, info in found.items():
            owners.setdefault(name, {})[rank] = info
    return owners


def _to_main(shard: torch.nn.Parameter | None, rank: int, info: _ShardInfo, parallel: Parallel) -> Tensor | None:
    """Moves one shard from `rank` to the CPU of rank 0; returns it there, None elsewhere."""
    if rank == parallel.rank:
        assert shard is not None
        if parallel.is_main:
            return shard.detach().cpu()
        dist.send(shard.detach().contiguous(), dst=0)
    elif parallel.is_main:
        _, local_dims, dtype = info
        buffer = torch.empty(local_dims, dtype=dtype, device=parallel.device)
        dist.recv(buffer, src=rank)
        return buffer.cpu()
    return None


class _ShardWriter:
    """Collects tensors in a planned order and writes each file as soon as it is full."""

    def __init__(self, folder: Path, sizes: dict[str, int], max_shard_bytes: int) -> None:
        """`sizes` has the bytes of every tensor."""
        self._folder = folder
        self._plan = _plan_shards(sizes, max_shard_bytes)
        self._file_of = {name: file for file, names in self._plan.items() for name in names}
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self._pending[name] = tensor.contiguous()
        self._bytes += tensor.nbytes
        file = self._file_of[name]
        if all(member in self._pending for member in self._plan[file]):
            shard = {member: self._pending.pop(member) for member in self._plan[file]}
            save_tensors(shard, self._folder / file)

    def finish(self) -> None:
        assert not self._pending, f"tensors without a complete file: {list(self._pending)}"
        if len(self._plan) > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": self._file_of}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _plan_shards(sizes: dict[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
    """File name to tensor names, in order, each file within the limit."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor_bytes in sizes.items():
        if shards[-1] and filled + tensor_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards)}
