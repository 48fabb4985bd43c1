"""When a run is told that it throws most of its gradient away."""

import pytest

from megatron_psft.config.schema import ObjectiveConfig
from megatron_psft.metrics.clip_watch import ClipWatch
from megatron_psft.scoring.old_policy import OldPolicyWindow


def warned(fractions: dict[int, float], *, interval: int | str = 4, warmup_iters: int = 0) -> dict[int, str]:
    """What is said after which step (from 0)."""
    config = ObjectiveConfig(old_policy_interval=interval, sft_warmup_iters=warmup_iters)
    window = OldPolicyWindow(config, train_iters=1000, score=lambda step: [])
    watch = ClipWatch(window.window_of)
    return {step: text for step, fraction in fractions.items() if (text := watch.add(step, fraction)) is not None}


def windows(*of_window: float, interval: int = 4, first: int = 0) -> dict[int, float]:
    """Each 0 in its first step and then the value."""
    steps = [0.0 if place == 0 else value for value in of_window for place in range(interval)]
    return dict(enumerate(steps, first))


def test_a_window_that_clips_most_tokens_is_warned_of_when_it_is_over():
    (step, text), *others = warned(windows(0.1, 0.8, 0.1)).items()
    assert (step, others) == (7, [])
    assert text == (
        "WARNING: 60 % of the label tokens of steps 5 to 8 were clipped: most of this epoch's gradient is thrown away; "
        "lower lr or shorten the window (old_policy_interval)"
    )


def test_one_step_above_the_half_is_no_reason():
    assert warned(dict(enumerate([0.0, 0.0, 0.6, 0.9] * 20))) == {}
    assert warned(windows(*[2 / 3] * 20)) == {}, "exactly the half in the mean"


def test_it_is_said_once_in_ten_windows():
    assert list(warned(windows(*[0.9] * 25))) == [3, 43, 83]


def test_warm_up_is_in_no_window():
    assert list(warned(windows(0.9, 0.9, first=3), warmup_iters=3)) == [6]
    assert warned(dict.fromkeys(range(30), 0.9), warmup_iters=30) == {}


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_window_that_a_resumed_run_has_not_seen_whole_is_not_judged(missing):
    steps = {step: value for step, value in windows(0.9, 0.9).items() if step >= missing}
    assert list(warned(steps)) == [7]


def test_of_a_window_without_an_end_a_hundred_steps_are_judged():
    steps = {step: 0.0 if step < 100 else 0.9 for step in range(350)}
    assert list(warned(steps, interval="fixed")) == [199]
