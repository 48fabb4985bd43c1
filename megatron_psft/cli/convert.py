"""Converts weights between a Hugging Face folder and a Megatron-Core checkpoint, either way, without a training run.

It takes one process and no GPU, and memory for a few tensors besides a safetensors file, or by way of Megatron-Bridge
for the model. Of a training checkpoint the weights alone are taken.
"""

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_psft.checkpoint.folders import is_step_folder, step_folders
from megatron_psft.cli.output import configure_output
from megatron_psft.config.conversion import ConvertConfig, TargetConfig
from megatron_psft.config.flags import require_absent, run_command
from megatron_psft.config.schema import Config, parse_config
from megatron_psft.errors import InfrastructureError, UserError, counted, folder_error, storage_error
from megatron_psft.lock import lock_beside, sole_writer
from megatron_psft.sealed import read_content

if TYPE_CHECKING:  # they take seconds to import, and `--help` answers at once
    import torch

    from megatron_psft.hf.conversion import Outline, Weights
    from megatron_psft.hf.side_files import SideFiles
    from megatron_psft.hf.stored_adapters import StoredAdapters
    from megatron_psft.model.shape import ModelShape

RUN_CONFIG = "config.yaml"

EXAMPLES = """examples:
  a published model as a checkpoint, and a run that starts from it in any layout:
    psft convert --from-hf Qwen/Qwen2.5-7B-Instruct --to-megatron models/qwen
    torchrun --nproc-per-node 8 -m megatron_psft --load-hf models/qwen --random-init --load models/qwen \\
        --tensor-model-parallel-size 4 --data train.jsonl --save runs/first
  the newest checkpoint of a run, or an earlier one, as a Hugging Face folder:
    psft convert --from-megatron runs/first --to-hf runs/first/hf
    psft convert --from-megatron runs/first/step_0000100 --to-hf runs/first/hf-100
  a run of adapters as a peft adapter, or as a model with them added:
    psft convert --from-megatron runs/lora --to-hf runs/lora/adapter
    psft convert --from-megatron runs/lora --to-hf runs/lora/merged --lora-merge
  its weights alone, which another run on other data can start from:
    psft convert --from-megatron runs/first --to-megatron models/first
  a model that Megatron-Bridge builds, there and back, from a run of psft train or of Bridge's own loop:
    psft convert --via-bridge --from-hf google/gemma-3-1b-it --to-megatron models/gemma
    psft convert --via-bridge --from-megatron runs/gemma --to-hf runs/gemma/hf
    psft convert --via-bridge --from-megatron runs/nemo --load-hf Qwen/Qwen3-4B --to-hf runs/nemo/hf
  whether both sides still hold the same:
    psft convert --from-megatron runs/first --to-hf runs/first/hf --check

There is no flag for a parallel layout, as a checkpoint has none: it keeps every tensor whole, and what is written here
loads with any tensor, pipeline, context and data-parallel size.

Exit code: 0; 1 where --check finds a difference; 2 after a mistake; 4 where a disk is full or fails."""


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where the parts of a model lie."""

    weights: Path
    model: Path
    """Has config.json."""
    tokenizer: Path
    run: Config | None
    """What the run that has trained the weights was started with, where it is known."""


def main(argv: Sequence[str]) -> int:
    """Converts or compares, and returns the exit code: 0, 1 after a difference, 2 after a user's mistake, or 4 where a
    disk is full or fails."""
    configure_output()
    return run_command(ConvertConfig, convert, argv, prog="psft convert", epilog=EXAMPLES)


def convert(config: ConvertConfig) -> int:
    """Returns the exit code. Raises UserError for what cannot be read or written."""
    field, path = config.target.place
    if config.target.check:
        return convert_or_check(config)
    with sole_writer(field, path, lock_beside(path)):
        require_absent(config.target, field, "folder")  # again: who had the lock may have written it
        return convert_or_check(config)


def convert_or_check(config: ConvertConfig) -> int:
    if config.target.via_bridge:
        convert_by_bridge(config)
        return 0
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: what only passes through needs no GPU
    import torch

    from megatron_psft.distributed.megatron_import import import_megatron

    import_megatron()

    from megatron_psft.hf.conversion import outline_of
    from megatron_psft.hf.hub import load_tokenizer
    from megatron_psft.model.parameters import is_adapter
    from megatron_psft.sources.choice import shape_of
    from megatron_psft.train.exported import resized_shape

    folders = find_folders(config)
    field = "load_hf" if config.source.from_hf is None else "from_hf"
    shape = shape_of(folders.model, field, "--export-hf of its run writes the folder, and --via-bridge converts it")
    if folders.run is not None and folders.run.weights.resize_vocab:
        shape = resized_shape(shape, load_tokenizer(folders.tokenizer))
    adapters = find_adapters(config, folders)
    outline = outline_of(shape, None if adapters is None else adapters.lora)
    chosen_dtype = None if config.target.dtype is None else getattr(torch, config.target.dtype)
    if adapters is not None and not config.target.lora_merge:
        path = config.target.place[1]
        written_dtype = adapters.write(path, shape, outline, chosen_dtype)
        print(f"adapters of rank {adapters.lora.lora_rank} as {str(written_dtype).removeprefix('torch.')} in {path}")
        return 0
    if adapters is None:
        weights = open_source(config, folders, shape, outline)
    else:
        weights = adapters.merged(shape, outline, folders.model)
        outline = {name: entry for name, entry in outline.items() if not is_adapter(name)}
    if chosen_dtype is not None:
        dtype = export_dtype = chosen_dtype
    else:
        export_dtype = weights.export_dtype
        dtype = weights.dtype if config.target.to_hf is None else export_dtype
    if config.target.check:
        return compare(config.target, weights, outline, dtype, folders)
    write(config.target, weights, outline, dtype, export_dtype, folders)
    return 0


def convert_by_bridge(config: ConvertConfig) -> None:
    """Raises UserError for what is not converted so, or where Megatron-Bridge is not installed."""
    source, (field, target) = config.source, config.target.place
    if (source.from_hf is None) == (config.target.to_hf is None):
        raise UserError(f"{field} ({target}) must be the other format than the source's with via_bridge")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as for any conversion
    from megatron_psft.distributed.megatron_import import import_megatron

    import_megatron()

    from megatron_psft.sources.bridge_conversion import BridgeConversion

    folders = find_folders(config)
    conversion = BridgeConversion(folders.model, "load_hf" if source.from_hf is None else "from_hf")
    require_room(field, target, conversion.nbytes)
    side_files = side_files_of(folders, None)
    with writing(field, target):
        if source.from_hf is None:
            conversion.write_folder(folders.weights, target, side_files)
        else:
            conversion.write_checkpoint(target, side_files)
    print(f"{target} by Megatron-Bridge")


def find_adapters(config: ConvertConfig, folders: Folders) -> "StoredAdapters | None":
    """Those that the source holds, if it does. Raises UserError for what is not done with them, or without."""
    from megatron_psft.hf.stored_adapters import stored_adapters

    target, (field, path) = config.target, config.target.place
    adapters = None if config.source.from_megatron is None else stored_adapters(folders.weights)
    if adapters is None and target.lora_merge:
        raise UserError(f"lora_merge (True) needs adapters, and {folders.weights} holds a model; remove it")
    if adapters is not None and not target.lora_merge:
        if target.to_hf is None or target.check:
            raise UserError(f"{field} ({path}) is of a model, and {folders.weights} holds adapters; add --lora-merge")
        if target.max_shard_gb is not None:
            raise UserError(f"max_shard_gb ({target.max_shard_gb}) has no effect on an adapter; remove it")
        if config.source.load_hf is not None:
            check_base(adapters, config.source.load_hf)
    return adapters


def check_base(adapters: "StoredAdapters", load_hf: str) -> None:
    """Raises UserError where the model that is named is not the one that the adapters stand beside. That may be no
    Hugging Face model; then this one gives config.json alone."""
    from megatron_psft.hf.fingerprint import weights_fingerprint
    from megatron_psft.hf.hub import model_folder

    if adapters.settings["random_init"] or adapters.settings["init_from"] is not None:
        return
    found = weights_fingerprint(model_folder("load_hf", load_hf, with_weights=True), "load_hf")
    if found != adapters.base:
        raise UserError(
            f"load_hf ({load_hf}) has the weights ({found}), and the adapters of {adapters.checkpoint} stand beside "
            f"({adapters.base}); name the model that they were trained on, or leave load_hf out"
        )


def find_folders(config: ConvertConfig) -> Folders:
    """Raises UserError where a part is missing."""
    from megatron_psft.hf.hub import model_folder

    source, run = config.source, None
    tokenizer = source.tokenizer
    if source.from_hf is not None:
        weights = model = model_folder("from_hf", source.from_hf, with_weights=True)
    else:
        assert source.from_megatron is not None
        via_bridge = config.target.via_bridge
        weights, load_hf = newest_checkpoint(Path(source.from_megatron), via_bridge), source.load_hf
        if load_hf is None and not via_bridge and (weights / "config.json").is_file():
            load_hf = str(weights)
        run = run_config(weights)
        if load_hf is None:
            if run is None:
                path = weights.parent / RUN_CONFIG
                lacks = "does not say of which model it is" if via_bridge else "holds no config.json"
                raise UserError(f"load_hf must be given: {weights} {lacks}, and there is no {path}")
            load_hf, tokenizer = run.weights.load_hf, tokenizer or run.weights.tokenizer
        model = model_folder("load_hf", load_hf, with_weights=config.target.lora_merge or via_bridge)
    tokenizer_folder = model if tokenizer is None else model_folder("tokenizer", tokenizer, with_weights=False)
    return Folders(weights=weights, model=model, tokenizer=tokenizer_folder, run=run)


def newest_checkpoint(path: Path, via_bridge: bool = False) -> Path:
    if is_step_folder(path):
        return path
    if via_bridge:
        from megatron_psft.sources.bridge_conversion import bridge_checkpoint

        of_bridge = bridge_checkpoint(path)
        if of_bridge is not None:
            return of_bridge
    found = step_folders(path)
    if not found:
        raise UserError(
            f"from_megatron ({path}) must be a complete step folder, a run folder that holds one, or a folder that "
            "this command wrote; check the path"
        )
    return found[-1]


def run_config(checkpoint: Path) -> Config | None:
    """What the run of a step folder was started with; None for a checkpoint that no run has beside it."""
    path = checkpoint.parent / RUN_CONFIG
    return parse_config(["--config", str(path)]) if path.is_file() else None


def open_source(config: ConvertConfig, folders: Folders, shape: "ModelShape", outline: "Outline") -> "Weights":
    from megatron_psft.hf.conversion import HuggingFaceWeights, MegatronWeights

    if config.source.from_hf is None:
        return MegatronWeights(folders.weights, "from_megatron", shape, outline)
    weights = HuggingFaceWeights(folders.weights, "from_hf", shape)
    other = weights.files.other_dtype()
    if config.target.dtype is None and other is not None:
        raise UserError(f"from_hf ({folders.weights}) must have one dtype, but {other}; choose one with --dtype")
    return weights


def write(
    target: TargetConfig,
    weights: "Weights",
    outline: "Outline",
    dtype: "torch.dtype",
    export_dtype: "torch.dtype",
    folders: Folders,
) -> None:
    from megatron_psft.hf.conversion import write_checkpoint
    from megatron_psft.hf.export import MAX_SHARD_BYTES, write_folder
    from megatron_psft.hf.mapping import hf_tensors
    from megatron_psft.hf.vision import vision_of
    from megatron_psft.model.shape import read_shape

    field, path = target.place
    num_parameters = sum(map(math.prod, hf_tensors(weights.shape).values()))
    vision = vision_of(folders.model, weights.shape)
    vision_bytes = 0 if vision is None else sum(vision.nbytes.values())
    require_room(field, path, num_parameters * dtype.itemsize + vision_bytes)
    vocab_size = weights.shape.vocab_size
    has_more_rows = vocab_size != read_shape(folders.model).vocab_size
    side_files = side_files_of(folders, vocab_size if has_more_rows else None)
    with writing(field, path):
        if target.to_hf is None:
            write_checkpoint(path, weights, outline, dtype, export_dtype=export_dtype, side_files=side_files)
        else:
            limit = MAX_SHARD_BYTES if target.max_shard_gb is None else int(target.max_shard_gb * 10**9)
            tensors = weights.tensors(dtype)
            write_folder(
                path,
                tensors,
                shape=weights.shape,
                dtype=dtype,
                max_shard_bytes=limit,
                option=field,
                side_files=side_files,
            )
    print(f"{counted(num_parameters, 'parameter')} as {str(dtype).removeprefix('torch.')} in {path}")


@contextmanager
def writing(field: str, path: Path) -> Iterator[None]:
    """Says what the writing of `path` failed of."""
    from safetensors import SafetensorError

    try:
        yield
    except InfrastructureError as error:  # of Megatron-Core's writer, or of rank 0
        raise InfrastructureError(f"{field} ({path}) could not be written: {error}; fix it and start again") from None
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch hides the disk's own complaint
        if not isinstance(cause, OSError | SafetensorError):
            raise
        text = f"{field} ({path}) could not be written: {cause}; fix it and start again"
        raise (storage_error(cause, text) if isinstance(cause, OSError) else UserError(text)) from None


def side_files_of(folders: Folders, vocab_size: int | None) -> "SideFiles":
    """Raises UserError for a tokenizer that cannot be loaded, or has ids that the model has no row for. `vocab_size`
    is None where it is that of the model's folder.

    Weights that a run has trained, or with a tokenizer from elsewhere, are written so that they load with it; a model
    of somebody else's is copied as it is.
    """
    from megatron_psft.checkpoint.identity import WEIGHTS_ONLY_STEP
    from megatron_psft.data.chat import RenderSettings
    from megatron_psft.hf.hub import embedding_rows, load_tokenizer
    from megatron_psft.hf.side_files import SideFiles
    from megatron_psft.hf.tokenizer import check_rows
    from megatron_psft.train.exported import end_of_turn_id

    is_trained = is_step_folder(folders.weights) and read_content(folders.weights)["step"] != WEIGHTS_ONLY_STEP
    has_one = (folders.tokenizer / "tokenizer.json").is_file()
    if not has_one or (folders.tokenizer == folders.model and not is_trained):
        return SideFiles(model_folder=folders.model, tokenizer_folder=folders.tokenizer)
    tokenizer = load_tokenizer(folders.tokenizer)
    rows = embedding_rows(folders.model) if vocab_size is None else vocab_size
    if rows is not None:
        check_rows(tokenizer, rows)
    settings = RenderSettings() if folders.run is None else RenderSettings.of_data(folders.run.data)
    return SideFiles(
        model_folder=folders.model,
        tokenizer_folder=folders.tokenizer,
        tokenizer=tokenizer,
        chat_template=settings.chat_template,
        stop_id=end_of_turn_id(tokenizer, settings) if is_trained else None,
        vocab_size=vocab_size,
    )


def require_room(field: str, target: Path, needed_bytes: int) -> None:
    """Makes the folder that `target` is to lie in. Raises UserError where that fails, and
    InfrastructureError where the disk does, or has no room."""
    parent = target.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(parent).free
    except OSError as error:
        raise folder_error(field, target, error) from None
    if free_bytes < needed_bytes:
        needed, free = (f"{size / 2**30:.2g} GiB" for size in (needed_bytes, free_bytes))
        text = f"{field} ({target}) must have room for {needed}, and has {free}; make room and start again"
        raise InfrastructureError(text)


def compare(
    target: TargetConfig, weights: "Weights", outline: "Outline", dtype: "torch.dtype", folders: Folders
) -> int:
    """Prints what differs, and returns the exit code."""
    from megatron_psft.hf.conversion import HuggingFaceWeights, MegatronWeights, checksums, vision_checksums
    from megatron_psft.hf.vision import VISION_FILE

    field, path = target.place
    found: Weights
    if target.to_hf is None:
        found = MegatronWeights(path, field, weights.shape, outline)
    else:
        found = HuggingFaceWeights(path, field, weights.shape)
    ours, theirs = checksums(weights, "source", dtype), checksums(found, "target")
    if target.to_hf is not None or (path / VISION_FILE).is_file():  # a run's own checkpoints have no vision tower
        ours |= vision_checksums(folders.model, weights.shape, "load_hf")
        theirs |= vision_checksums(path, weights.shape, field)
    different = [name for name in ours if ours[name] != theirs.get(name)]
    for name in different:
        print(f"differs: {name}: {describe(ours[name])}, in {path} {describe(theirs.get(name))}")
    tensors = counted(len(ours), "tensor")
    print(f"{len(different)} of {tensors} differ" if different else f"{tensors}, all equal")
    return 1 if different else 0


def describe(value: tuple["torch.dtype", str] | None) -> str:
    if value is None:
        return "missing"
    dtype, checksum = value
    return f"{str(dtype).removeprefix('torch.')} {checksum[:16]}"
