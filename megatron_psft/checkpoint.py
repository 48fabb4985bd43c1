"""Saves and resumes a run through Megatron-Core's distributed checkpoints, in the same or another parallel layout."""

import inspect
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from megatron_psft import step_folders
from megatron_psft.data.loader import BatchLoader
from megatron_psft.errors import RankError, UserError
from megatron_psft.interrupt import helpers_outlive_signals
from megatron_psft.old_policy import OldPolicyWindow
from megatron_psft.optimizer import load_optimizer_state
from megatron_psft.parallel import Parallel, naming_lost_peers, on_main, together
from megatron_psft.step_folders import DamageError

log = logging.getLogger(__name__)

VERSION = 2

# The distributed optimizer's one format that any tensor, pipeline and data-parallel size can read.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
# Megatron-Core from 0.18 on would hand the writing to another package of NVIDIA's where it is not told otherwise.
_HAS_STRATEGIES = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
_STRATEGY = {"async_strategy": "mcore"} if _HAS_STRATEGIES else {}
_ADAM_BYTES, _MASTER_BYTES = 8, 4  # per parameter: two fp32 moments, and the fp32 copy of a bf16 weight

Identity = Mapping[str, Any]
"""What a run must share with the checkpoint it resumes from, field by field; JSON values."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything of a run that changes while it trains. The position in the data is the step: batches are a function of
    it."""

    chunks: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    window: OldPolicyWindow


class Saver:
    """Writes the checkpoints of a run, one at a time; as a context it finishes the last one. All collective."""

    def __init__(
        self,
        folder: Path,
        state: TrainState,
        identity: Identity,
        loader: BatchLoader,
        parallel: Parallel,
        *,
        keep_last: int | None,
        in_background: bool,
    ) -> None:
        """Describes the checkpoints.

        Args:
            folder: of the run, shared by all nodes.
            state: what is saved.
            identity: what a run that resumes must have in common with this one.
            loader: of the training batches.
            parallel: this rank's place.
            keep_last: newest checkpoints to keep; all where None.
            in_background: whether `save` returns as soon as the state is copied.
        """
        self._folder, self._state, self._identity = folder, state, identity
        self._loader, self._parallel, self._keep_last = loader, parallel, keep_last
        self._queue = AsyncCallsQueue() if in_background else None
        self._target = folder

    def save(self, step: int) -> None:
        """Writes the checkpoint of `step` completed steps, and removes what `keep_last` makes superfluous.

        Raises:
            UserError: it could not be written; the checkpoints before it are as they were.
        """
        self.finish()
        self._target = target = step_folders.step_folder(self._folder, step)
        needed_bytes = self._state_bytes()
        aside = on_main(lambda: _begin(target, needed_bytes))
        with self._writing(), naming_lost_peers(f"checkpoint {target}"), helpers_outlive_signals():
            request = dist_checkpointing.save(
                self._sharded_content(),
                str(aside),
                content_metadata=dict(_METADATA),
                async_sharded_save=True,
                **_STRATEGY,
            )
            if request.async_fn is not None:  # there may be nothing to write on this rank
                write = partial(_write, request.async_fn, aside, self._parallel.rank)
                request = request._replace(async_fn=write)
            request.add_finalize_fn(partial(self._seal, target, step))
            if self._queue is None:
                request.execute_sync()
            else:
                self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Seals the checkpoint that is written in the background, where all ranks are done with it."""
        if self._queue is not None:
            with self._writing(), naming_lost_peers(f"checkpoint {self._target}"):
                self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Waits for the checkpoint that is written in the background, if one is, and seals it."""
        if self._queue is not None:
            with self._writing(), naming_lost_peers(f"checkpoint {self._target}"):
                self._queue.maybe_finalize_async_calls(blocking=True)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error ranks may disagree, and a collective would hang.
        if error is None:
            self.finish()

    def _sharded_content(self) -> dict[str, Any]:
        state, parallel = self._state, self._parallel
        content = _sharded_state(state, is_loading=False)
        content["old_log_probs"] = {
            str(later): _sharded_old_log_probs(later, torch.cat(old) if old else None, self._loader, parallel)
            for later, old in state.window.stored.items()
            if old
        }
        content["rng"] = _sharded_rng(parallel)
        return {**content, "scheduler": state.scheduler.state_dict(), "window_steps": sorted(state.window.stored)}

    def _state_bytes(self) -> int:
        """About what a checkpoint takes, over all ranks."""
        parameters = [parameter for chunk in self._state.chunks for parameter in chunk.parameters()]
        per_master = _MASTER_BYTES if parameters and parameters[0].dtype != torch.float32 else 0
        own = sum(p.numel() * (p.itemsize + _ADAM_BYTES + per_master) for p in parameters)
        total = torch.tensor(own if self._parallel.data_rank == 0 else 0, device=self._parallel.device)
        dist.all_reduce(total)
        return int(total)

    def _seal(self, target: Path, step: int) -> None:
        content = {
            "version": VERSION,
            "step": step,
            "identity": dict(self._identity),
            "layout": _layout(self._parallel),
        }

        def seal() -> None:
            step_folders.seal(target, content)
            step_folders.remove_older(self._folder, self._keep_last)

        on_main(seal)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Says what a checkpoint failed of, and removes its remains."""
        advice = f"those before it are intact; mend the folder, or make room in it, and start again: {self._target}"
        try:
            yield
        except CheckpointException as error:  # raised by all ranks, with the causes on rank 0
            causes = [str(cause) for cause, _ in error.failures.values()]
            on_main(lambda: step_folders.discard(self._target))
            raise UserError(f"save: a checkpoint could not be written ({'; '.join(causes[:1])}); {advice}") from None
        except (OSError, RuntimeError) as error:  # torch.save answers a full disk with the latter
            raise RankError(
                f"rank {self._parallel.rank}: a checkpoint could not be written ({error}); {advice}"
            ) from error


def find_checkpoint(save: Path, load: Path | None, identity: Identity) -> tuple[Path, int] | None:
    """The checkpoint to resume from and its completed steps; collective.

    That is the newest intact one of the run folder `save`, where it holds any, else the newest of the run folder
    `load`, or `load` itself. Damaged ones of `save` lose their name, so that they neither count nor are taken again.

    Raises:
        UserError: `save` holds only damaged checkpoints; `load` is needed and holds none, or a damaged one; the
            checkpoint was written by another version or by a run that differs in a field of `identity`.
    """
    saved = _see(save)
    for checkpoint in reversed(saved):
        damage = _find_damage(checkpoint, identity)
        if damage is None:
            return checkpoint, _step_of(checkpoint)
        kept = on_main(partial(step_folders.set_aside, checkpoint))
        log.warning("WARNING: %s: this checkpoint is damaged; it is now called %s and not used", damage, kept.name)
    if saved:
        raise UserError(f"save ({save}) holds no intact checkpoint any more; name another save folder to start anew")
    if load is None:
        return None
    checkpoint, others = _choose(load)
    damage = _find_damage(checkpoint, identity)
    if damage is not None:
        intact = next((other for other in reversed(others) if _find_damage(other, identity) is None), None)
        remedy = "none beside it is intact" if intact is None else f"the newest intact one is --load {intact}"
        raise UserError(f"load ({load}) must be an intact checkpoint: {damage}; {remedy}")
    return checkpoint, _step_of(checkpoint)


def load_checkpoint(checkpoint: Path, state: TrainState, loader: BatchLoader, parallel: Parallel) -> None:
    """Fills `state` from a step folder; collective."""
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    content = _sharded_state(state, is_loading=True)
    steps: list[int] = common["window_steps"]
    if parallel.is_last_stage:
        content["old_log_probs"] = {str(step): _sharded_old_log_probs(step, None, loader, parallel) for step in steps}
    is_same_layout = step_folders.read_content(checkpoint)["layout"] == _layout(parallel)
    if is_same_layout:
        content["rng"] = _sharded_rng(parallel)
    loaded = dist_checkpointing.load(content, str(checkpoint))
    for name, chunk in _named_chunks(state.chunks).items():
        chunk.load_state_dict(loaded[name])
    load_optimizer_state(state.optimizer, loaded["optimizer"])
    state.scheduler.load_state_dict(common["scheduler"])
    for step in steps:
        saved = loaded["old_log_probs"][str(step)] if parallel.is_last_stage else None
        state.window.stored[step] = [] if saved is None else _micro_batches(saved, loader.seq_length(step), loader)
    if is_same_layout:  # the generators of other ranks would mean nothing; nothing that trains draws from them today
        _set_rng(loaded["rng"])


def _begin(target: Path, needed_bytes: int) -> Path:
    """Makes the folder to write in, where there is room for what is to come."""
    aside = step_folders.begin(target)
    free_bytes = shutil.disk_usage(aside).free
    if free_bytes < needed_bytes:
        step_folders.discard(target)
        raise UserError(
            f"save ({target.parent}) must have room for a checkpoint, about {needed_bytes / 2**30:.2g} GiB, and has "
            f"{free_bytes / 2**30:.2g} GiB; the checkpoints before it are intact; make room and start again"
        )
    return aside


def _write(write: Callable[..., None], aside: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """Megatron-Core's writing of this rank's files, and their checksums; in the background both."""
    write(*args, **kwargs)
    step_folders.leave_sums(aside, rank)


def _see(folder: Path) -> list[Path]:
    """Checkpoints of a run folder, oldest first, which every rank must see as rank 0 does; collective."""
    found = on_main(lambda: step_folders.step_folders(folder))

    def look() -> None:
        for checkpoint in found:
            if not checkpoint.is_dir():
                raise UserError(
                    f"{folder} must be a folder that all nodes share: rank {dist.get_rank()} lacks {checkpoint}"
                )

    together(look)
    return found


def _choose(load: Path) -> tuple[Path, list[Path]]:
    """The checkpoint that `load` names, and all of its run; collective."""
    if on_main(lambda: step_folders.is_step_folder(load)):
        return load, [other for other in _see(load.parent) if other != load]
    found = _see(load)
    if not found:
        raise UserError(f"load ({load}) must be a complete step folder or a run folder that holds one; check the path")
    return found[-1], found[:-1]


def _find_damage(checkpoint: Path, identity: Identity) -> str | None:
    """What is wrong with a checkpoint, if anything is; every rank reads its share of the files. Collective.

    Raises:
        UserError: it belongs to another version or another run.
    """

    def read() -> str | None:
        try:
            content = step_folders.read_content(checkpoint)
        except DamageError as error:
            return str(error)
        _check_identity(checkpoint, content, identity)
        return None

    damage = on_main(read)
    if damage is not None:
        return damage
    world_size = dist.get_world_size()
    found: list[str | None] = [None] * world_size
    dist.all_gather_object(found, step_folders.find_damage(checkpoint, part=dist.get_rank(), parts=world_size))
    return next((text for text in found if text is not None), None)


def _check_identity(checkpoint: Path, content: Mapping[str, Any], identity: Identity) -> None:
    if content["version"] != VERSION:
        version = content["version"]
        raise UserError(f"{checkpoint}: version ({version}) must be {VERSION}; use the release that wrote it")
    for field, wanted in identity.items():
        found = content["identity"].get(field)
        if found != wanted:
            raise UserError(
                f"{checkpoint}: the run that wrote it had {field} ({found}), this one has ({wanted}); "
                "use its settings, or another save folder to start anew"
            )


def _step_of(checkpoint: Path) -> int:
    return on_main(lambda: int(step_folders.read_content(checkpoint)["step"]))


def _named_chunks(chunks: Sequence[DistributedDataParallel]) -> dict[str, GPTModel]:
    """Model chunks under the names that Megatron-Core's optimizers expect."""
    models = unwrap_model(list(chunks))
    return {"model": models[0]} if len(models) == 1 else {f"model{i}": model for i, model in enumerate(models)}


def _sharded_state(state: TrainState, *, is_loading: bool) -> dict[str, Any]:
    models = {
        name: model.sharded_state_dict(metadata=dict(_METADATA)) for name, model in _named_chunks(state.chunks).items()
    }
    own = models["model"] if len(models) == 1 else models
    optimizer = state.optimizer.sharded_state_dict(own, is_loading=is_loading, metadata=dict(_METADATA))
    return {**models, "optimizer": optimizer}


def _sharded_old_log_probs(step: int, rows: Tensor | None, loader: BatchLoader, parallel: Parallel) -> ShardedTensor:
    """The old log-probabilities of one global batch as a checkpoint tensor `[global batch, s]`, this replica's rows of
    it.

    Its width is the batch's longest row without the padding that a layout may add, so that any layout can read it.
    """
    width = loader.unpadded_length(step)
    data = torch.zeros(loader.rows_per_rank, width) if rows is None else rows[:, :width].contiguous()
    return ShardedTensor.from_rank_offsets(
        f"old_log_probs.{step}",
        data,
        (0, parallel.data_rank, parallel.data_size),
        replica_id=parallel.tensor_rank,
    )


def _micro_batches(rows: Tensor, seq_length: int, loader: BatchLoader) -> list[Tensor]:
    padded = torch.nn.functional.pad(rows, (0, seq_length - rows.shape[1]))
    return list(padded.split(loader.micro_batch_size))


def _layout(parallel: Parallel) -> dict[str, int]:
    """Which rank does what."""
    names = ("tensor_size", "pipeline_size", "virtual_size", "data_size")
    return {name: getattr(parallel, name) for name in names}


def _sharded_rng(parallel: Parallel) -> ShardedObject:
    """The states of this rank's random generators."""
    states = {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),  # the CPU's where there is no GPU, see platform.py
        "tensor_parallel": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("rng", states, (parallel.world_size,), (parallel.rank,))


def _set_rng(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    torch.cuda.set_rng_state(states["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tensor_parallel"])
