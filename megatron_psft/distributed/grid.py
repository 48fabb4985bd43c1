"""The only door to `megatron.core.parallel_state`: sets the process groups up and hands out ranks, sizes and groups."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_psft.config.schema import ParallelConfig
from megatron_psft.distributed.device import Platform
from megatron_psft.distributed.rendezvous import Meeting, meet
from megatron_psft.errors import RankError, first_line, is_shared


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Where this process stands in the grid of processes; sizes, but those of experts, multiply to `world_size`.

    For experts the processes of a pipeline stage form another grid: expert by expert-tensor by expert-data parallel.
    """

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    virtual_size: int
    """Model chunks per pipeline rank, 1 without interleaving."""
    context_rank: int
    context_size: int
    data_rank: int
    data_size: int
    expert_rank: int
    expert_size: int
    """Groups that the experts are split into."""
    expert_tensor_rank: int
    expert_tensor_size: int
    """Ranks that share each expert."""
    expert_data_rank: int
    """Among the ranks with the same part of the same experts."""
    expert_data_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes metrics."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """True where the embedding lives."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True where the output layer lives and losses are computed."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def reports_sums(self) -> bool:
        """True on the ranks whose sums over their own tokens enter the global sums: of each data-parallel replica one
        per context-parallel part of the rows."""
        return self.is_last_stage and self.tensor_rank == 0

    @property
    def context_group(self) -> dist.ProcessGroup:
        """The ranks that share this rank's rows."""
        return parallel_state.get_context_parallel_group()

    def replica_group(self, *, for_experts: bool) -> dist.ProcessGroup:
        """The ranks with the same part of the model's experts, or of all else of it."""
        if for_experts:
            return parallel_state.get_expert_data_parallel_group()
        return parallel_state.get_data_parallel_group(with_context_parallel=True)


def initialize_parallel(
    config: ParallelConfig, *, virtual_size: int | None, seed: int, device: torch.device
) -> Parallel:
    """Creates Megatron-Core's process groups. `config` must fit the world size (`config.validate`)."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_size,
        distributed_timeout_minutes=config.distributed_timeout_minutes,  # type: ignore[arg-type]
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Parallel(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_size=virtual_size or 1,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_rank=parallel_state.get_expert_tensor_parallel_rank(),
        expert_tensor_size=parallel_state.get_expert_tensor_parallel_world_size(),
        expert_data_rank=parallel_state.get_expert_data_parallel_rank(),
        expert_data_size=parallel_state.get_expert_data_parallel_world_size(),
        device=device,
    )


@contextmanager
def process_group(
    platform: Platform, world_size: int, timeout_minutes: float = 30.0, *, meeting: Meeting | None = None
) -> Iterator[None]:
    """The processes that torchrun started, joined for the length of a run; a lone process is a world of one.

    A collective that some rank has not joined after `timeout_minutes` fails on the others. After an error that only
    this rank may know of, the groups are left as they are: NCCL would wait for the others, which wait for this rank.

    Args:
        platform: what the process computes on.
        world_size: number of processes.
        timeout_minutes: of a collective.
        meeting: where they have met; here if None.

    Raises:
        RankError: another process is gone.
    """
    timeout = timedelta(minutes=timeout_minutes)
    if world_size > 1:
        meeting = meeting or meet(int(os.environ["RANK"]), world_size, timeout_minutes)
        store = dist.PrefixStore("default_pg", meeting.store)
        try:
            dist.init_process_group(
                platform.backend, store=store, rank=meeting.rank, world_size=world_size, timeout=timeout
            )
        except RuntimeError as error:
            reason = first_line(error)
            raise RankError(
                f"rank {meeting.rank}: the ranks could not be joined; see their output: {reason}"
            ) from error
    else:
        dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    except BaseException as error:
        if world_size == 1 or is_shared(error):
            _take_down()
        raise
    _take_down()


def _take_down() -> None:
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
