"""Weights of a model that Megatron-Bridge builds, between a Hugging Face folder and checkpoints, in one process on the
CPU, which has the whole model in memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint import CheckpointException, TensorStorageMetadata

from megatron_psft import sealed
from megatron_psft.atomic import aside, sync
from megatron_psft.checkpoint.folders import is_step_folder
from megatron_psft.checkpoint.identity import VERSION, WEIGHTS_ONLY_STEP
from megatron_psft.checkpoint.state import load_weights, sharded_weights
from megatron_psft.checkpoint.unpickle import DataReader
from megatron_psft.config.inputs import DataConfig, WeightsConfig
from megatron_psft.config.schema import Config, PrecisionConfig
from megatron_psft.distributed.device import prepare
from megatron_psft.distributed.grid import Parallel, initialize_parallel, process_group
from megatron_psft.distributed.megatron_lines import save_options, start_results_server
from megatron_psft.distributed.orphans import end_with_parent
from megatron_psft.errors import InfrastructureError, UserError, first_line
from megatron_psft.hf.conversion import check_intact
from megatron_psft.hf.side_files import SideFiles
from megatron_psft.model.shape import read_config
from megatron_psft.sources.bridge import BridgeSource
from megatron_psft.sources.bridge_rules import with_language_model

_TRACKER = "latest_checkpointed_iteration.txt"
_OF_OPTIMIZERS = ("optimizer.", "chained_")


class BridgeConversion:
    """A Hugging Face folder, and the model that Bridge builds from its `config.json`."""

    def __init__(self, folder: Path, field: str) -> None:
        """The process sees no GPU from here on. Raises UserError, which names `field`, for a folder that holds no
        model that is converted by Bridge."""
        self._platform = prepare("cpu", 0)
        fields = read_config(folder, field)
        if not isinstance(fields, Mapping):
            raise UserError(f"{field} ({folder}): config.json must hold a JSON object, not {type(fields).__name__}")
        source = BridgeSource.of(folder, with_language_model(fields), field, is_trained=False)
        self._source = source.with_weights(folder, self._config(bf16=False))

    @property
    def nbytes(self) -> int:
        """Of all tensors of the folder."""
        return self._source.nbytes

    def write_checkpoint(self, target: Path, side_files: SideFiles) -> None:
        """Writes a checkpoint of nothing but the folder's weights, in bf16 where all are, else in fp32. It appears
        under its name only when it is complete. Raises InfrastructureError where the disk is full or fails."""
        with self._model(bf16=self._source.is_bf16) as (model, parallel):
            self._source.fill([model], parallel)
            with aside(target.resolve().parent, target.name) as folder:
                staging = sealed.begin(folder / target.name)
                start_results_server(end_with_parent)
                _save(model, staging)
                sealed.leave_sums(staging, 0)
                side_files.write(staging, self._source.dtype)
                identity = dict(self._source.weights_identity)
                content = {"version": VERSION, "step": WEIGHTS_ONLY_STEP, "identity": identity}
                sealed.seal(folder / target.name, content)
                (folder / target.name).rename(target)
                sync(target.resolve().parent)

    def write_folder(self, checkpoint: Path, target: Path, side_files: SideFiles) -> None:
        """Writes the Hugging Face folder of a checkpoint of a run's or of Bridge's own loop, in bf16 where that is,
        else in the format of the folder. Raises UserError where it is damaged, or of another model."""
        if is_step_folder(checkpoint):
            check_intact(checkpoint, "from_megatron", self._source.weights_identity)
        stored = _stored_weights(checkpoint)
        is_bf16 = all(it.properties.dtype == torch.bfloat16 for name, it in stored.items() if not _has_own_format(name))
        with self._model(bf16=is_bf16) as (model, parallel):
            _check_same_tensors(checkpoint, stored, model)
            load_weights(checkpoint, [model], parallel)
            dtype = torch.bfloat16 if is_bf16 else self._source.dtype
            self._source.export([model], target, dtype=dtype, side_files=side_files, parallel=parallel)

    def _config(self, *, bf16: bool) -> Config:
        unused = str(Path())  # on these parts of a run's configuration no parameter depends
        weights, data = WeightsConfig(load_hf=unused, save=unused), DataConfig(data=(unused,))
        return Config(weights=weights, data=data, precision=PrecisionConfig(bf16=bf16))

    @contextmanager
    def _model(self, *, bf16: bool) -> Iterator[tuple[MegatronModule, Parallel]]:
        """In a world of one process, for as long as the context lasts."""
        config, platform = self._config(bf16=bf16), self._platform
        self._source.check(config)
        with process_group(platform, 1):
            parallel = initialize_parallel(config.parallel, virtual_size=None, seed=0, device=platform.device)
            megatron_config = self._source.transformer_config(config, platform)
            yield self._source.build_chunk(config, megatron_config, platform, parallel, 0), parallel


def _save(model: MegatronModule, folder: Path) -> None:
    """Raises InfrastructureError where the disk is full or fails."""
    try:
        dist_checkpointing.save({"model": sharded_weights(model)}, str(folder), **save_options())
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise InfrastructureError(first_line(cause)) from None


def bridge_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run folder of Bridge's loop, or one that `folder` itself is; None for neither. Raises
    UserError for a run folder without the checkpoint that it says is its newest."""
    if (folder / "run_config.yaml").is_file():
        return folder
    tracker = folder / _TRACKER
    if not tracker.is_file():
        return None
    name = tracker.read_text(encoding="utf-8").strip()
    newest = folder / f"iter_{name:0>7}"
    if not newest.is_dir():
        raise UserError(f"from_megatron ({folder}): {_TRACKER} says ({name}), and there is no {newest.name}")
    return newest


def _stored_weights(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """All tensors of a checkpoint but those of its optimizer."""
    stored = DataReader(checkpoint).read_metadata().state_dict_metadata.items()
    return {
        name: it for name, it in stored if isinstance(it, TensorStorageMetadata) and not name.startswith(_OF_OPTIMIZERS)
    }


def _has_own_format(name: str) -> bool:
    """Whether Megatron-Core has the tensor in fp32, whatever the model is in."""
    return name.endswith("expert_bias")


def _check_same_tensors(checkpoint: Path, stored: Mapping[str, TensorStorageMetadata], model: MegatronModule) -> None:
    """Raises UserError where the checkpoint lacks a tensor of the model, or has one of another size, or more."""
    parts = [it.build() if isinstance(it, ShardedTensorFactory) else it for it in sharded_weights(model).values()]
    wanted = {it.key: tuple(it.global_shape) for it in nested_values({"": parts}) if isinstance(it, ShardedTensor)}
    found = {name: tuple(it.size) for name, it in stored.items()}
    different = sorted(name for name in wanted.keys() | found if wanted.get(name) != found.get(name))
    if different:
        name = different[0]
        raise UserError(
            f"from_megatron ({checkpoint}) must be of the model that load_hf is, and differs in {len(different)} "
            f"tensors: {name} is {found.get(name, 'missing')} instead of {wanted.get(name, 'missing')}"
        )
