"""Where ranks stand, and failures that all of them share."""

import os
from collections.abc import Sequence
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist

from megatron_psft.config.schema import ParallelConfig
from megatron_psft.distributed.collective import on_every_rank
from megatron_psft.distributed.device import detect
from megatron_psft.distributed.grid import initialize_parallel, process_group
from megatron_psft.errors import UserError


def _place(config: ParallelConfig, world_size: int, virtual_size: int | None = None):
    here = detect(0)
    with process_group(here, world_size):
        place = initialize_parallel(config, virtual_size=virtual_size, seed=1, device=here.device)
        roles = (place.is_main, place.is_first_stage, place.is_last_stage, place.reports_sums)
        return asdict(place), roles


@pytest.mark.parametrize(
    ("tensor_size", "context_size", "data_size", "pipeline_size"),
    [(1, 1, 1, 1), (1, 1, 2, 1), (2, 1, 1, 2), (1, 2, 2, 1), (2, 2, 1, 2), (2, 1, 2, 2)],
)
def test_ranks_count_through_tensor_then_context_then_data_then_pipeline(
    pool, tensor_size, context_size, data_size, pipeline_size
):
    world_size = tensor_size * context_size * data_size * pipeline_size
    config = ParallelConfig(
        tensor_model_parallel_size=tensor_size,
        pipeline_model_parallel_size=pipeline_size,
        context_parallel_size=context_size,
    )
    results = pool.run(_place, world_size, config, world_size)
    counting = []
    for rank, (place, roles) in enumerate(results):
        pipeline_rank, rest = divmod(rank, tensor_size * context_size * data_size)
        data_rank, rest = divmod(rest, tensor_size * context_size)
        context_rank, tensor_rank = divmod(rest, tensor_size)
        assert place == {
            "rank": rank,
            "world_size": world_size,
            "tensor_rank": tensor_rank,
            "tensor_size": tensor_size,
            "pipeline_rank": pipeline_rank,
            "pipeline_size": pipeline_size,
            "virtual_size": 1,
            "context_rank": context_rank,
            "context_size": context_size,
            "data_rank": data_rank,
            "data_size": data_size,
            "expert_rank": 0,
            "expert_size": 1,
            "expert_tensor_rank": tensor_rank,
            "expert_tensor_size": tensor_size,
            "expert_data_rank": data_rank * context_size + context_rank,
            "expert_data_size": data_size * context_size,
            "device": torch.device("cpu"),
        }
        is_first, is_last = pipeline_rank == 0, pipeline_rank == pipeline_size - 1
        assert roles == (rank == 0, is_first, is_last, is_last and tensor_rank == 0)
        counting += [(data_rank, context_rank)] if roles[-1] else []
    expected = [(data_rank, context_rank) for data_rank in range(data_size) for context_rank in range(context_size)]
    assert counting == expected, "each part of each replica's rows counts once"


@pytest.mark.parametrize(
    ("expert_tensor_size", "expected"),
    [
        # Expert, expert-tensor and expert-data rank of ranks that are two tensor-parallel by two data-parallel.
        (None, [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]),
        (1, [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]),
    ],
)
def test_experts_have_a_grid_of_their_own(pool, expert_tensor_size, expected):
    config = ParallelConfig(
        tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=expert_tensor_size
    )
    places = [place for place, _ in pool.run(_place, 4, config, 4)]
    ranks = [(place["expert_rank"], place["expert_tensor_rank"], place["expert_data_rank"]) for place in places]
    assert ranks == expected
    sizes = {(place["expert_size"], place["expert_tensor_size"], place["expert_data_size"]) for place in places}
    assert sizes == {(2, expert_tensor_size or 2, 2 // (expert_tensor_size or 2))}


def test_interleaving_says_how_many_chunks_a_rank_has(pool):
    config = ParallelConfig(pipeline_model_parallel_size=2)
    assert [place["virtual_size"] for place, _ in pool.run(_place, 2, config, 2, 3)] == [3, 3]


def _act_together(failing_ranks: Sequence[int]):
    """What `together` returned or raised on this rank, and whether collectives still work after it."""
    with process_group(detect(0), int(os.environ["WORLD_SIZE"])):
        rank = dist.get_rank()

        def action() -> list[int]:
            if rank in failing_ranks:
                raise UserError(f"no file on rank {rank}")
            return [rank]

        try:
            outcome = on_every_rank(action)
        except UserError as error:
            outcome = str(error)
        ranks = torch.tensor(rank)
        dist.all_reduce(ranks)
        return outcome, ranks.item()


def test_together_returns_each_rank_its_own_result(pool):
    assert pool.run(_act_together, 3, []) == [([rank], 3) for rank in range(3)]
    assert pool.run(_act_together, 1, []) == [([0], 0)]


@pytest.mark.parametrize("failing_ranks", [[0], [1], [2], [2, 1], [0, 1, 2]], ids=str)
def test_one_ranks_error_is_everybodys(pool, failing_ranks):
    assert pool.run(_act_together, 3, failing_ranks) == [(f"no file on rank {min(failing_ranks)}", 3)] * 3


def _return_nothing():
    with process_group(detect(0), 1):
        return on_every_rank(lambda: None)


def test_nothing_is_a_result_too(pool):
    assert pool.run(_return_nothing, 1) == [None]


def _fail_with_a_bug():
    with process_group(detect(0), 1):
        try:
            on_every_rank(lambda: {}["missing"])
        except KeyError as error:
            return str(error)


def test_a_bug_keeps_its_own_exception(pool):
    assert pool.run(_fail_with_a_bug, 1) == ["'missing'"]


def _without_launcher():
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    here, seen = detect(0), []
    for _ in range(2):
        with process_group(here, 1):
            total = torch.ones(1)
            dist.all_reduce(total)
            seen.append((dist.get_rank(), dist.get_world_size(), total.item()))
        seen.append(dist.is_initialized())
    return seen


def test_a_lone_process_is_a_world_of_one(pool):
    assert pool.run(_without_launcher, 1) == [[(0, 1, 1.0), False] * 2]


def _leave_by_an_error():
    from megatron.core import parallel_state

    here = detect(0)
    try:
        with process_group(here, 2):
            initialize_parallel(
                ParallelConfig(tensor_model_parallel_size=2), virtual_size=None, seed=1, device=here.device
            )
            raise UserError("stop")
    except UserError as error:
        return str(error), dist.is_initialized(), parallel_state.model_parallel_is_initialized()


def test_an_error_leaves_no_group_behind(pool):
    assert pool.run(_leave_by_an_error, 2) == [("stop", False, False)] * 2
