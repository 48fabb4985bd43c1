"""Which steps are scored, when, and by which weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_psft.config.schema import ObjectiveConfig
from megatron_psft.errors import UserError
from megatron_psft.scoring.host_memory import check_host_memory
from megatron_psft.scoring.old_policy import CurrentPolicy, NoOldPolicy, OldPolicyWindow, Scores, objective_at


class Run:
    """A run whose weights are the number of updates so far; the score of a batch is its step and those weights."""

    def __init__(self, *, train_iters: int, interval=8, warmup_iters: int = 0, **options) -> None:
        self.updates = 0
        self.passes: list[tuple[int, int]] = []
        """(weights, step scored), in order."""
        self.places: list[int | None] = []
        """The place of each trained step in its window."""
        objective = ObjectiveConfig(
            objective=options.pop("objective", "psft"), old_policy_interval=interval, sft_warmup_iters=warmup_iters
        )
        self.window = OldPolicyWindow(objective, train_iters=train_iters, score=self._score, **options)

    def _score(self, step: int) -> list[torch.Tensor]:
        self.passes.append((self.updates, step))
        return [torch.tensor([float(step), float(self.updates)]) + micro_batch / 4 for micro_batch in range(2)]

    def train(self, first: int, stop: int) -> list:
        """Steps `first` to `stop`; returns by which weights the old log-probabilities of each were computed, or the
        kind of old policy that has none."""
        weights = []
        for step in range(first, stop):
            self.updates = step
            syncs = self.window.syncs_before(step)
            if syncs:
                self.window.sync(step)
            old_policy = self.window.at(step)
            assert self.window.at(step) == old_policy, "reading changes nothing"
            assert not self.window.syncs_before(step)
            assert syncs == (old_policy == CURRENT)
            self.places.append(self.window.window_step(step))
            weights.append(self._weights_of(step, old_policy) if isinstance(old_policy, Scores) else old_policy)
        return weights

    def _weights_of(self, step: int, scores: Scores) -> int:
        first, second = scores.log_probs
        assert (first[0], second[0]) == (step, step + 0.25), "values of another batch, or micro-batches out of order"
        return int(first[1])


NONE, CURRENT = NoOldPolicy(), CurrentPolicy()


def old_weights(step: int, interval: int, warmup_iters: int):
    """The definition: the weights at the start of the step's window, if they are not the current ones."""
    if step < warmup_iters:
        return NONE
    start = warmup_iters + (step - warmup_iters) // interval * interval
    return CURRENT if start == step else start


def test_windows_of_four_steps():
    run = Run(interval=4, train_iters=12)
    assert run.train(0, 12) == [CURRENT, 0, 0, 0, CURRENT, 4, 4, 4, CURRENT, 8, 8, 8]
    assert run.passes == [(0, 1), (0, 2), (0, 3), (4, 5), (4, 6), (4, 7), (8, 9), (8, 10), (8, 11)]
    assert run.window.state(12) == {}


def test_a_window_of_one_step_scores_nothing():
    run = Run(interval=1, train_iters=5, warmup_iters=2)
    assert run.train(0, 5) == [NONE, NONE, CURRENT, CURRENT, CURRENT]
    assert run.passes == []


def test_windows_are_counted_after_warm_up():
    run = Run(interval=4, train_iters=9, warmup_iters=3)
    assert run.train(0, 9) == [NONE, NONE, NONE, CURRENT, 3, 3, 3, CURRENT, 7]
    assert run.passes == [(3, 4), (3, 5), (3, 6), (7, 8)]


def test_the_last_window_ends_with_the_run():
    run = Run(interval=8, train_iters=11)
    assert run.train(0, 11) == [CURRENT, *[0] * 7, CURRENT, 8, 8]
    assert run.passes[-2:] == [(8, 9), (8, 10)]


@pytest.mark.parametrize("interval", [6, 7, 1000, "fixed"])
def test_an_interval_as_long_as_the_run_keeps_the_model_at_the_end_of_warm_up(interval):
    run = Run(interval=interval, train_iters=6, warmup_iters=2)
    assert run.train(0, 6) == [NONE, NONE, CURRENT, 2, 2, 2]
    assert run.passes == [(2, 3), (2, 4), (2, 5)]


def test_warm_up_all_the_way_is_plain_sft():
    run = Run(interval=6, train_iters=6, warmup_iters=6)
    assert run.train(0, 6) == [NONE] * 6
    assert run.passes == []


@pytest.mark.parametrize("objective", ["sft", "dft", "sft-kl"])
def test_an_objective_without_an_old_policy_has_none_at_any_step(objective):
    run = Run(objective=objective, train_iters=6)
    assert run.train(0, 6) == [NONE] * 6
    assert run.passes == []


def test_warm_up_is_of_psft_alone():
    for objective, expected in (("psft", ["sft", "sft", "psft"]), ("dft", ["dft"] * 3), ("sft", ["sft"] * 3)):
        config = ObjectiveConfig(objective=objective, sft_warmup_iters=2)
        assert [objective_at(config, step).config.objective for step in range(3)] == expected


def test_a_sync_that_is_interrupted_has_not_come():
    run = Run(interval=4, train_iters=8)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.window.sync(0, between_batches=stop)
    assert run.window.syncs_before(0)
    assert run.window.state(0) == {}
    assert run.train(0, 2) == [CURRENT, 0]


@pytest.mark.parametrize("interval", [3, "fixed"])
def test_steps_are_counted_into_windows(interval):
    window = Run(interval=interval, train_iters=9, warmup_iters=2).window
    expected = [range(0), range(0), *([range(2, 5)] * 3 + [range(5, 8)] * 3 + [range(8, 9)])]
    if interval == "fixed":
        expected = [range(0), range(0), *[range(2, 9)] * 7]
    assert [window.window_of(step) for step in range(9)] == expected


@given(interval=st.integers(1, 9), train_iters=st.integers(1, 30), warmup_iters=st.integers(0, 12))
def test_every_step_has_the_weights_of_its_window_and_is_scored_once(interval, train_iters, warmup_iters):
    run = Run(interval=interval, train_iters=train_iters, warmup_iters=warmup_iters)
    expected = [old_weights(step, interval, warmup_iters) for step in range(train_iters)]
    assert run.train(0, train_iters) == expected
    assert run.passes == [(weights, step) for step, weights in enumerate(expected) if isinstance(weights, int)]
    counted = [(step - warmup_iters) % interval if step >= warmup_iters else None for step in range(train_iters)]
    assert run.places == counted
    assert run.window.state(train_iters) == {}, "nothing is kept longer than it is needed"


@given(interval=st.integers(1, 9), train_iters=st.integers(1, 30), warmup_iters=st.integers(0, 12), data=st.data())
def test_a_run_restored_anywhere_goes_on_as_if_it_had_not_stopped(interval, train_iters, warmup_iters, data):
    stop = data.draw(st.integers(0, train_iters), label="stop")
    description = {"interval": interval, "train_iters": train_iters, "warmup_iters": warmup_iters}
    first, second, uninterrupted = Run(**description), Run(**description), Run(**description)
    before = first.train(0, stop)
    start = data.draw(st.sampled_from([None, first.window.start]), label="start")  # None in an earlier release
    second.window.load_state(first.window.state(stop), start=start)
    assert before + second.train(stop, train_iters) == uninterrupted.train(0, train_iters)
    assert first.passes + second.passes == uninterrupted.passes
    assert first.places + second.places == uninterrupted.places


def test_steps_that_a_longer_run_adds_begin_a_window_that_ends_where_it_always_would(caplog):
    caplog.set_level("INFO")
    short = Run(interval=4, train_iters=6)
    short.train(0, 6)
    longer = Run(interval=4, train_iters=14)
    longer.window.load_state(short.window.state(6))
    assert longer.train(6, 14) == [CURRENT, 6, CURRENT, 8, 8, 8, CURRENT, 12]
    assert longer.passes == [(6, 7), (8, 9), (8, 10), (8, 11), (12, 13)]
    assert longer.places == [0, 1, 0, 1, 2, 3, 0, 1]
    (line,) = caplog.messages
    assert line.startswith("old policy: synced before step 7, within the window of steps 5 to 8, ")


def test_the_place_in_a_window_that_a_longer_run_began_is_kept():
    """It is not told by the count of steps."""
    longer, resumed = Run(interval=4, train_iters=14), Run(interval=4, train_iters=14)
    longer.train(6, 7)
    resumed.window.load_state(longer.window.state(7), start=longer.window.start)
    assert resumed.train(7, 9) == [6, CURRENT]
    assert resumed.places == [1, 0]


def test_a_shorter_run_leaves_the_rest_of_a_restored_window_alone():
    long = Run(interval=8, train_iters=8)
    long.train(0, 3)
    shorter = Run(interval=8, train_iters=5)
    shorter.window.load_state(long.window.state(3))
    assert shorter.train(3, 5) == [0, 0]
    assert shorter.passes == []


def test_ranks_without_the_output_layer_take_part_in_every_pass_and_begin_the_same_windows():
    passes = []
    objective = ObjectiveConfig(old_policy_interval=3, sft_warmup_iters=1)
    window = OldPolicyWindow(objective, train_iters=7, score=lambda step: passes.append(step) or [])
    syncs, kinds = [], []
    for step in range(7):
        if window.syncs_before(step):
            window.sync(step)
            syncs.append(step)
        kinds.append(window.at(step))
    assert syncs == [1, 4]
    assert kinds == [NONE, CURRENT, Scores([]), Scores([]), CURRENT, Scores([]), Scores([])]
    assert passes == [2, 3, 5, 6]


def test_a_window_is_scored_before_its_first_step_is_trained_on():
    """All of it is there after the first step, so that a checkpoint within the window holds it."""
    run = Run(interval=4, train_iters=8)
    run.train(0, 1)
    assert sorted(run.window.state(1)) == [1, 2, 3]
    run.train(1, 3)
    assert sorted(run.window.state(3)) == [3]
    assert all(log_probs.device.type == "cpu" for log_probs in run.window.state(3)[3])


def test_what_is_to_be_kept_is_told_once_and_before_the_first_pass():
    told: list[list[int]] = []

    def score(step: int) -> list[torch.Tensor]:
        assert told
        return []

    objective = ObjectiveConfig(old_policy_interval=3, sft_warmup_iters=1)
    window = OldPolicyWindow(objective, train_iters=9, score=score, prepare=lambda steps: told.append(list(steps)))
    for step in (1, 4, 7):
        window.sync(step)
    assert told == [[2, 3]]


def test_a_window_of_one_step_has_nothing_to_tell():
    def refuse(*_: object) -> list[torch.Tensor]:
        raise AssertionError

    window = OldPolicyWindow(ObjectiveConfig(old_policy_interval=1), train_iters=3, score=refuse, prepare=refuse)
    for step in range(3):
        window.sync(step)
        assert window.at(step) == CURRENT


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
