"""Which steps are scored, when, and by which weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_psft.errors import UserError
from megatron_psft.scoring.host_memory import check_host_memory
from megatron_psft.scoring.old_policy import OldPolicyWindow


class Run:
    """A run whose weights are the number of updates so far; the score of a batch is its step and those weights."""

    def __init__(self, *, interval: int, train_iters: int, warmup_iters: int = 0) -> None:
        self.updates = 0
        self.passes: list[tuple[int, int]] = []
        """(weights, step scored), in order."""
        self.window = OldPolicyWindow(
            interval=interval, warmup_iters=warmup_iters, train_iters=train_iters, score=self._score
        )

    def _score(self, step: int) -> list[torch.Tensor]:
        self.passes.append((self.updates, step))
        return [torch.tensor([[float(step), float(self.updates)]]) + micro_batch / 4 for micro_batch in range(2)]

    def train(self, first: int, stop: int) -> list[int | None]:
        """Steps `first` to `stop`; returns by which weights the old log-probabilities of each were computed."""
        weights = []
        for step in range(first, stop):
            self.updates = step
            begins = self.window.syncs_before(step)
            old_log_probs = self.window.old_log_probs(step)
            assert begins == (old_log_probs is None and not self.window.is_warmup(step))
            weights.append(None if old_log_probs is None else self._weights_of(step, old_log_probs))
        return weights

    def _weights_of(self, step: int, old_log_probs: list[torch.Tensor]) -> int:
        values = torch.cat(old_log_probs)
        assert values[:, 0].tolist() == [step, step + 0.25], "values of another batch, or micro-batches out of order"
        return int(values[0, 1])


def old_weights(step: int, interval: int, warmup_iters: int) -> int | None:
    """The definition: the weights at the start of the step's window; None where they are the current ones."""
    if step < warmup_iters:
        return None
    start = warmup_iters + (step - warmup_iters) // interval * interval
    return None if start == step else start


def test_windows_of_four_steps():
    run = Run(interval=4, train_iters=12)
    assert run.train(0, 12) == [None, 0, 0, 0, None, 4, 4, 4, None, 8, 8, 8]
    assert run.passes == [(0, 1), (0, 2), (0, 3), (4, 5), (4, 6), (4, 7), (8, 9), (8, 10), (8, 11)]
    assert run.window.stored == {}


def test_a_window_of_one_step_scores_nothing():
    run = Run(interval=1, train_iters=5, warmup_iters=2)
    assert run.train(0, 5) == [None] * 5
    assert run.passes == []
    assert [run.window.syncs_before(step) for step in range(5)] == [False, False, True, True, True]


def test_windows_are_counted_after_warm_up():
    run = Run(interval=4, train_iters=9, warmup_iters=3)
    assert run.train(0, 9) == [None, None, None, None, 3, 3, 3, None, 7]
    assert run.passes == [(3, 4), (3, 5), (3, 6), (7, 8)]


def test_the_last_window_ends_with_the_run():
    run = Run(interval=8, train_iters=11)
    assert run.train(0, 11) == [None, *[0] * 7, None, 8, 8]
    assert run.passes[-2:] == [(8, 9), (8, 10)]


@pytest.mark.parametrize("interval", [6, 7, 1000])
def test_an_interval_as_long_as_the_run_keeps_the_model_at_the_end_of_warm_up(interval):
    run = Run(interval=interval, train_iters=6, warmup_iters=2)
    assert run.train(0, 6) == [None, None, None, 2, 2, 2]
    assert run.passes == [(2, 3), (2, 4), (2, 5)]


def test_warm_up_all_the_way_is_plain_sft():
    run = Run(interval=6, train_iters=6, warmup_iters=6)
    assert run.train(0, 6) == [None] * 6
    assert run.passes == []


@given(interval=st.integers(1, 9), train_iters=st.integers(1, 30), warmup_iters=st.integers(0, 12))
def test_every_step_has_the_weights_of_its_window_and_is_scored_once(interval, train_iters, warmup_iters):
    run = Run(interval=interval, train_iters=train_iters, warmup_iters=warmup_iters)
    expected = [old_weights(step, interval, warmup_iters) for step in range(train_iters)]
    assert run.train(0, train_iters) == expected
    assert run.passes == [(weights, step) for step, weights in enumerate(expected) if weights is not None]
    assert run.window.stored == {}, "nothing is kept longer than it is needed"


@given(interval=st.integers(1, 9), train_iters=st.integers(1, 30), warmup_iters=st.integers(0, 12), data=st.data())
def test_a_run_restored_anywhere_goes_on_as_if_it_had_not_stopped(interval, train_iters, warmup_iters, data):
    stop = data.draw(st.integers(0, train_iters), label="stop")
    description = {"interval": interval, "train_iters": train_iters, "warmup_iters": warmup_iters}
    first, second, uninterrupted = Run(**description), Run(**description), Run(**description)
    before = first.train(0, stop)
    second.window.stored.update(first.window.stored)
    assert before + second.train(stop, train_iters) == uninterrupted.train(0, train_iters)
    assert first.passes + second.passes == uninterrupted.passes


def test_steps_that_a_longer_run_adds_begin_a_window_that_ends_where_it_always_would():
    short = Run(interval=4, train_iters=6)
    short.train(0, 6)
    longer = Run(interval=4, train_iters=14)
    longer.window.stored.update(short.window.stored)
    assert longer.train(6, 14) == [None, 6, None, 8, 8, 8, None, 12]
    assert longer.passes == [(6, 7), (8, 9), (8, 10), (8, 11), (12, 13)]


def test_a_shorter_run_leaves_the_rest_of_a_restored_window_alone():
    long = Run(interval=8, train_iters=8)
    long.train(0, 3)
    shorter = Run(interval=8, train_iters=5)
    shorter.window.stored.update(long.window.stored)
    assert shorter.train(3, 5) == [0, 0]
    assert shorter.passes == []


def test_ranks_without_the_output_layer_take_part_in_every_pass_and_begin_the_same_windows():
    passes = []
    window = OldPolicyWindow(interval=3, warmup_iters=1, train_iters=7, score=lambda step: passes.append(step) or [])
    begins = []
    for step in range(7):
        begins.append(window.syncs_before(step))
        assert not window.old_log_probs(step)
    assert begins == [False, True, False, False, True, False, False]
    assert passes == [2, 3, 5, 6]


def test_a_window_is_scored_before_its_first_step_is_trained_on():
    """All of `stored` is there after the first step, so that a checkpoint within the window holds it."""
    run = Run(interval=4, train_iters=8)
    run.train(0, 1)
    assert sorted(run.window.stored) == [1, 2, 3]
    run.train(1, 3)
    assert sorted(run.window.stored) == [3]
    assert all(log_probs.device.type == "cpu" for log_probs in run.window.stored[3])


def test_what_is_to_be_kept_is_told_once_and_before_the_first_pass():
    told: list[list[int]] = []

    def score(step: int) -> list[torch.Tensor]:
        assert told
        return []

    window = OldPolicyWindow(
        interval=3, warmup_iters=1, train_iters=9, score=score, prepare=lambda steps: told.append(list(steps))
    )
    for step in range(9):
        window.old_log_probs(step)
    assert told == [[2, 3]]


def test_a_window_of_one_step_has_nothing_to_tell():
    def refuse(*_: object) -> list[torch.Tensor]:
        raise AssertionError

    window = OldPolicyWindow(interval=1, warmup_iters=0, train_iters=3, score=refuse, prepare=refuse)
    assert [window.old_log_probs(step) for step in range(3)] == [None] * 3


def _check_memory(bytes_per_rank: int) -> str | None:
    from megatron_psft.config.schema import ParallelConfig
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import initialize_parallel, process_group

    here = detect(0)
    with process_group(here, 2):
        place = initialize_parallel(
            ParallelConfig(pipeline_model_parallel_size=2), virtual_size=None, seed=1, device=here.device
        )
        try:
            check_host_memory(bytes_per_rank, 7, place)
        except UserError as error:
            return str(error)
    return None


def test_a_window_beyond_the_hosts_memory_is_refused_on_all_ranks(pool):
    assert pool.run(_check_memory, 2, 2**20) == [None, None]
    first, second = pool.run(_check_memory, 2, 2**60)
    assert first == second
    # One of the two ranks is of the last stage.
    assert "old_policy_interval: the log-probabilities of 7 steps need 1.07e+09 GiB of host memory" in first
