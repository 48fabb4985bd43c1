"""Where ranks meet before their first collective."""

import os
import time
from dataclasses import replace
from datetime import timedelta

from megatron_psft.distributed import rendezvous
from megatron_psft.distributed.rendezvous import meet
from megatron_psft.errors import RankError


def _place() -> tuple[int, int]:
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _agree_twice() -> list[str]:
    rank, world_size = _place()
    meeting = meet(rank, world_size)
    answers = [meeting.agree(f"{round}{rank}", " ".join) for round in "ab"]
    meeting.leave()
    return answers


def test_all_have_the_answer_of_rank_0_each_time(pool):
    assert pool.run(_agree_twice, 3) == [["a0 a1 a2", "b0 b1 b2"]] * 3
    assert pool.run(_agree_twice, 1) == [["a0", "b0"]]


def _be_silent(silent: int) -> str:
    """What a rank is told when one has come, but says nothing."""
    rank, world_size = _place()
    rendezvous._ANSWER_DELAY = timedelta(seconds=0.6)
    meeting = replace(meet(rank, world_size), timeout=timedelta(seconds=0.6))
    try:
        if rank == silent:
            time.sleep(3)
            return "silent"
        return meeting.agree("here", " ".join)
    except RankError as error:
        return str(error)


def test_a_rank_that_hangs_is_named_in_time(pool):
    zero, silent, two = pool.run(_be_silent, 3, 1)
    assert zero == "rank 0: ranks 1 have not come within distributed_timeout_minutes (0.01); see their output"
    assert silent == "silent"
    assert two.startswith("rank 2: rank 0 does not answer at the start: it hangs or is gone; see its output: ")


def _meet_alone() -> str | None:
    rank, world_size = _place()
    if rank == 1:
        return None
    try:
        meet(rank, world_size, timeout_minutes=0.02)
    except RankError as error:
        return str(error)
    return "met"


def test_a_rank_that_never_comes_is_a_lost_peer(pool):
    alone, absent = pool.run(_meet_alone, 2)
    assert absent is None
    assert alone.startswith("rank 0: the ranks could not meet at 127.0.0.1:")
