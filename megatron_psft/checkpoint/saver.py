"""Saves and resumes a run through Megatron-Core's distributed checkpoints, in the same or another parallel layout."""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_psft import sealed
from megatron_psft.checkpoint import folders
from megatron_psft.checkpoint.background import BackgroundCalls
from megatron_psft.checkpoint.find import VERSION, Identity
from megatron_psft.data.loader import BatchLoader
from megatron_psft.distributed.cpu_shims import plain_operations, save_options
from megatron_psft.distributed.grid import Parallel, naming_lost_peers, on_main, sum_over_context
from megatron_psft.distributed.signals import helpers_outlive_signals
from megatron_psft.errors import RankError, UserError
from megatron_psft.hf.weights import is_first_replica, named_parameters
from megatron_psft.metrics.clipped_tokens import ClippedTokens
from megatron_psft.scoring.old_policy import OldPolicyWindow
from megatron_psft.train.optimizer import load_optimizer_state, sharded_optimizer_state

log = logging.getLogger(__name__)

# The distributed optimizer's one format that any tensor, pipeline and data-parallel size can read.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_ADAM_BYTES, _MASTER_BYTES = 8, 4  # per parameter: two fp32 moments, and the fp32 copy of a bf16 weight


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything of a run that changes while it trains. The position in the data is the step: batches are a function of
    it."""

    chunks: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    window: OldPolicyWindow
    clipped_tokens: ClippedTokens | None = None
    """Where the run counts them."""


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
            in_background: whether `save` returns at once; `wait_for_copy` has to come before the state changes.
        """
        self._folder, self._state, self._identity = folder, state, identity
        self._loader, self._parallel, self._keep_last = loader, parallel, keep_last
        with helpers_outlive_signals():
            self._queue = BackgroundCalls() if in_background else None
        self._sealer = ThreadPoolExecutor(max_workers=1)  # of rank 0
        self._sealing: Future[None] | None = None
        self._target = folder

    def save(self, step: int) -> None:
        """Writes the checkpoint of `step` completed steps, and removes what `keep_last` makes superfluous.

        Raises:
            UserError: it could not be written; the checkpoints before it are as they were.
        """
        self.finish()
        self._target = target = folders.step_folder(self._folder, step)
        needed_bytes = self._state_bytes()
        aside = on_main(lambda: _begin(target, needed_bytes))
        with self._writing(), naming_lost_peers(f"checkpoint {target}"), helpers_outlive_signals():
            request = _plan(self._sharded_content(), aside)
            if request.async_fn is not None:  # there may be nothing to write on this rank
                write = partial(_write, request.async_fn, aside, self._parallel.rank)
                request = request._replace(async_fn=write)
            request.add_finalize_fn(partial(self._seal, target, step))
            if self._queue is None:
                request.execute_sync()
            else:
                self._queue.schedule_async_request(request)
        if self._queue is None:
            self.finish()

    def wait_for_copy(self) -> None:
        """Returns when the state that `save` was called for is copied, and may change."""
        if self._queue is not None:
            with self._writing():
                self._queue.wait_for_copy()

    def poll(self) -> None:
        """Has the checkpoint that is written in the background sealed, once all ranks are done with it."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Waits until the checkpoint that is written in the background, if one is, is sealed."""
        self._finalize(blocking=True)
        on_main(self._wait_for_seal)

    def _finalize(self, *, blocking: bool) -> None:
        if self._queue is not None:
            with self._writing(), naming_lost_peers(f"checkpoint {self._target}"):
                self._queue.maybe_finalize_async_calls(blocking=blocking)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error ranks may disagree, and a collective would hang.
        if error is None:
            self.finish()
        self._sealer.shutdown()

    def _sharded_content(self) -> dict[str, Any]:
        state, parallel = self._state, self._parallel
        content = _sharded_state(state, is_loading=False)
        content["old_log_probs"] = {
            str(later): _sharded_old_log_probs(
                later, sum_over_context(self._loader.to_packs(later, old), parallel).cpu(), self._loader, parallel
            )
            for later, old in state.window.stored.items()
            if old
        }
        content["rng"] = _sharded_rng(parallel)
        content |= {"scheduler": state.scheduler.state_dict(), "window_steps": sorted(state.window.stored)}
        if state.clipped_tokens is not None:
            content["clipped_tokens"] = state.clipped_tokens.state()
        return content

    def _state_bytes(self) -> int:
        """About what a checkpoint takes, over all ranks."""
        kept = [p for name, p in named_parameters(self._state.chunks) if is_first_replica(name, self._parallel)]
        own = sum(p.numel() * (p.itemsize + _ADAM_BYTES + _MASTER_BYTES * (p.dtype != torch.float32)) for p in kept)
        total = torch.tensor(own, device=self._parallel.device)
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
            try:
                sealed.seal(target, content)
                folders.remove_older(self._folder, self._keep_last)
            except OSError as error:
                sealed.discard(target)
                raise UserError(_write_failed(str(error), target)) from error

        if self._parallel.is_main:  # in a thread: the disk's confirmation and the removal of files take their time
            self._sealing = self._sealer.submit(seal)

    def _wait_for_seal(self) -> None:
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            sealing.result()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Says what a checkpoint failed of, and removes its remains."""
        try:
            yield
        except CheckpointException as error:  # raised by all ranks, with the causes on rank 0
            causes = [str(cause) for cause, _ in error.failures.values()]
            on_main(lambda: sealed.discard(self._target))
            raise UserError(_write_failed("; ".join(causes[:1]), self._target)) from None
        except (OSError, RuntimeError) as error:  # torch.save answers a full disk with the latter
            raise RankError(f"rank {self._parallel.rank}: {_write_failed(str(error), self._target)}") from error


def load_checkpoint(checkpoint: Path, state: TrainState, loader: BatchLoader, parallel: Parallel) -> None:
    """Fills `state` from a step folder; collective."""
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    content = _sharded_state(state, is_loading=True)
    steps: list[int] = common["window_steps"]
    if parallel.is_last_stage:
        content["old_log_probs"] = {str(step): _sharded_old_log_probs(step, None, loader, parallel) for step in steps}
    is_same_layout = sealed.read_content(checkpoint)["layout"] == _layout(parallel)
    if is_same_layout:
        content["rng"] = _sharded_rng(parallel)
    loaded = dist_checkpointing.load(content, str(checkpoint))
    load_optimizer_state(state.optimizer, loaded["optimizer"])
    for name, chunk in _named_chunks(state.chunks).items():
        chunk.load_state_dict(loaded[name])
    state.scheduler.load_state_dict(common["scheduler"])
    if state.clipped_tokens is not None and "clipped_tokens" in common:  # else counting starts with this run
        state.clipped_tokens.load_state(common["clipped_tokens"])
    for step in steps:
        saved = loaded["old_log_probs"][str(step)] if parallel.is_last_stage else None
        state.window.stored[step] = [] if saved is None else loader.from_packs(step, saved)
    if is_same_layout:  # the generators of other ranks would mean nothing; nothing that trains draws from them today
        _set_rng(loaded["rng"])


def load_weights(checkpoint: Path, chunks: Sequence[DistributedDataParallel]) -> None:
    """Fills a model from any checkpoint's weights, whatever layout and precision these were saved in; collective."""
    models = _named_chunks(chunks)
    loaded = dist_checkpointing.load({name: sharded_weights(model) for name, model in models.items()}, str(checkpoint))
    log.info("weights from %s", checkpoint)
    for name, model in models.items():
        missing, unexpected = model.load_state_dict(loaded[name], strict=False)
        other = [*unexpected, *(key for key in missing if not key.endswith("_extra_state"))]
        assert not other, f"{name} and {checkpoint} differ in {other}"


def sharded_weights(model: GPTModel) -> dict[str, ShardedBase]:
    """The parameters of a model chunk as a checkpoint has them, by their names in the chunk.

    Modules' extra state is not among them: only FP8 has any, and which modules do depends on their implementation.
    """
    state = model.sharded_state_dict(metadata=dict(_METADATA))
    return {name: value for name, value in state.items() if not isinstance(value, ShardedObject)}


def _begin(target: Path, needed_bytes: int) -> Path:
    """Makes the folder to write in, where there is room for what is to come."""
    aside = sealed.begin(target)
    free_bytes = shutil.disk_usage(aside).free
    if free_bytes < needed_bytes:
        sealed.discard(target)
        raise UserError(
            f"save ({target.parent}) must have room for a checkpoint, about {needed_bytes / 2**30:.2g} GiB, and has "
            f"{free_bytes / 2**30:.2g} GiB; the checkpoints before it are intact; make room and start again"
        )
    return aside


def _write_failed(cause: str, target: Path) -> str:
    return (
        f"save: a checkpoint could not be written ({cause}); those before it are intact; mend the folder, or make room "
        f"in it, and start again: {target}"
    )


def _plan(content: dict[str, Any], aside: Path) -> AsyncRequest:
    """What each rank is to write into which of its files: the tensors themselves, which must not change until they are
    copied or written."""
    with plain_operations():
        _own_storages(content)
        return dist_checkpointing.save(
            content, str(aside), content_metadata=dict(_METADATA), async_sharded_save=True, **save_options()
        )


def _own_storages(content: dict[str, Any]) -> None:
    """Makes what is part of a tensor on the CPU one of its own, over the same memory: Megatron-Core would copy it, of a
    gated MLP's weights and moments all, while training waits. Pinned memory, which DLPack takes for CUDA's, stays as it
    is."""
    apply_factories(content)  # which divide such weights
    for value in nested_values(content):
        data = value.data if isinstance(value, ShardedTensor) else None
        if data is not None and data.device.type == "cpu" and not data.is_pinned():
            value.data = torch.from_dlpack(data.detach())


def _write(write: Callable[..., None], aside: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """Megatron-Core's writing of this rank's files, and their checksums; in the background both."""
    with _without_crc32():
        write(*args, **kwargs)
    sealed.leave_sums(aside, rank)


@contextmanager
def _without_crc32() -> Iterator[None]:
    """`torch.save` takes half its time for a CRC-32 that nothing reads; the marker has the SHA-256 of every file."""
    takes_crc32 = get_crc32_options()
    set_crc32_options(compute_crc32=False)
    try:
        yield
    finally:
        set_crc32_options(takes_crc32)


def _named_chunks(chunks: Sequence[DistributedDataParallel]) -> dict[str, GPTModel]:
    """Model chunks under the names that Megatron-Core's optimizers expect."""
    models = unwrap_model(list(chunks))
    return {"model": models[0]} if len(models) == 1 else {f"model{i}": model for i, model in enumerate(models)}


def _sharded_state(state: TrainState, *, is_loading: bool) -> dict[str, Any]:
    models = {
        name: model.sharded_state_dict(metadata=dict(_METADATA)) for name, model in _named_chunks(state.chunks).items()
    }
    own = models["model"] if len(models) == 1 else models
    optimizer = sharded_optimizer_state(state.optimizer, own, is_loading=is_loading, metadata=dict(_METADATA))
    return {**models, "optimizer": optimizer}


def _sharded_old_log_probs(step: int, rows: Tensor | None, loader: BatchLoader, parallel: Parallel) -> ShardedTensor:
    """The old log-probabilities of one global batch as a checkpoint tensor `[global batch, longest pack]`, this
    replica's packs of it.

    It holds no padding that a layout may add, and each pack whole, so that any layout can read it.
    """
    data = torch.zeros(loader.packs_per_rank, loader.unpadded_length(step)) if rows is None else rows
    return ShardedTensor.from_rank_offsets(
        f"old_log_probs.{step}",
        data,
        (0, parallel.data_rank, parallel.data_size),
        replica_id=parallel.context_rank * parallel.tensor_size + parallel.tensor_rank,
    )


def _layout(parallel: Parallel) -> dict[str, int]:
    """Which rank does what."""
    names = ("tensor_size", "pipeline_size", "virtual_size", "context_size", "data_size")
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
