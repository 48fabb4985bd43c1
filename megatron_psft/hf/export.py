"""Writes the model as a Hugging Face folder, tensor by tensor."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from megatron_psft.distributed.grid import Parallel
from megatron_psft.errors import UserError
from megatron_psft.hf.mapping import hf_tensors, pieces, scatter
from megatron_psft.model.parameters import own_parameters, shard_place
from megatron_psft.model.shape import ModelShape

# transformers' own default; what rank 0 holds in memory at a time.
MAX_SHARD_BYTES = 5 * 10**9

# What besides weights makes a model folder, copied as it is. config.json is written anew for its dtype.
_MODEL_FILES = ("generation_config.json",)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def check_target(target: Path, inputs: Mapping[str, Path]) -> None:
    """Raises UserError where export would fail, or overwrite what is no earlier export.

    Args:
        target: the folder that export replaces.
        inputs: folders that must outlive it, under the names of their fields.
    """
    if target.exists() and not (target / "config.json").is_file() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"export_hf ({target}) exists and is no model folder; name an empty or new folder")
    for field, folder in inputs.items():
        if folder.resolve().is_relative_to(target.resolve()):
            raise UserError(f"export_hf ({target}) would replace {field} ({folder}); name another folder")
    try:
        target.resolve().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"export_hf ({target}) must be a folder that can be written: {error.strerror}") from None


def export(
    chunks: Sequence[torch.nn.Module],
    target: Path,
    *,
    shape: ModelShape,
    dtype: torch.dtype,
    model_folder: Path,
    tokenizer_folder: Path,
    parallel: Parallel,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes `target`: safetensors with index, config, generation config, tokenizer and chat template.

    Collective over all ranks; data-parallel replica 0, which is other ranks for experts, sends its shards to rank 0,
    which writes. The folder appears under its name only when it is complete, and an earlier export of that name is
    replaced then.

    Args:
        chunks: the model; its parameters must be current on every rank.
        target: folder to write, seen by rank 0.
        shape: of the model.
        dtype: of the tensors in the files.
        model_folder: where config and generation config come from.
        tokenizer_folder: where the tokenizer comes from.
        parallel: this rank's place.
        max_shard_bytes: size limit of one file, unless a single tensor is larger.
    """
    tensors = _gathered_tensors(chunks, shape, parallel)
    if parallel.is_main:
        write_folder(
            target,
            tensors,
            shape=shape,
            dtype=dtype,
            model_folder=model_folder,
            tokenizer_folder=tokenizer_folder,
            max_shard_bytes=max_shard_bytes,
        )
    else:
        for _ in tensors:
            pass
    dist.barrier()


def write_folder(
    target: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    shape: ModelShape,
    dtype: torch.dtype,
    model_folder: Path,
    tokenizer_folder: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes what `export` does from all of the model's Hugging Face tensors; a file's are held until it is full, so
    they had better come in about the order of `hf_tensors`."""
    target = target.resolve()
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dims = hf_tensors(shape)
    try:
        writer = _ShardWriter(partial, dims, dtype, max_shard_bytes)
        for name, tensor in tqdm(tensors, total=len(dims), desc="export", unit="tensor"):
            writer.add(name, tensor.to(dtype))
        writer.finish()
        copy_side_files(partial, model_folder, tokenizer_folder, dtype)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _replace(target, partial)


def _gathered_tensors(
    chunks: Sequence[torch.nn.Module], shape: ModelShape, parallel: Parallel
) -> Iterator[tuple[str, Tensor]]:
    """Yields every Hugging Face tensor whole on rank 0, layer by layer; nothing on the other ranks."""
    local = own_parameters(chunks, parallel)
    if shape.tied_embeddings:
        local.pop("output_layer.weight", None)
    owners = _owners(local, parallel)
    dims = hf_tensors(shape)
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

    def __init__(
        self, folder: Path, dims: dict[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int
    ) -> None:
        self._folder = folder
        self._plan = _plan_shards(dims, dtype.itemsize, max_shard_bytes)
        self._file_of = {name: file for file, names in self._plan.items() for name in names}
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self._pending[name] = tensor.contiguous()
        self._bytes += tensor.nbytes
        file = self._file_of[name]
        if all(member in self._pending for member in self._plan[file]):
            shard = {member: self._pending.pop(member) for member in self._plan[file]}
            save_file(shard, self._folder / file, metadata={"format": "pt"})

    def finish(self) -> None:
        assert not self._pending, f"tensors without a complete file: {list(self._pending)}"
        if len(self._plan) > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": self._file_of}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _plan_shards(dims: dict[str, tuple[int, ...]], item_bytes: int, max_shard_bytes: int) -> dict[str, list[str]]:
    """File name to tensor names, in order, each file within the limit."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in dims.items():
        tensor_bytes = item_bytes * torch.Size(size).numel()
        if shards[-1] and filled + tensor_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards)}


def copy_side_files(target: Path, model_folder: Path, tokenizer_folder: Path, dtype: torch.dtype) -> None:
    """Copies what belongs to a model besides its weights; its config names `dtype`."""
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    # transformers 5 spells it `dtype`, transformers 4 reads only `torch_dtype`; both read the latter.
    config.pop("dtype", None)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for folder, names in ((model_folder, _MODEL_FILES), (tokenizer_folder, _TOKENIZER_FILES)):
        for name in names:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)


def _replace(target: Path, partial: Path) -> None:
    """Puts the finished folder under its name; an earlier export is gone only after that name is free."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
