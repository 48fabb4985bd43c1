"""Progress of passes: a bar on a terminal, lines in a file, nothing for short ones and those of other ranks."""

import itertools
import sys

import pytest

from megatron_psft import progress as module
from megatron_psft.progress import Progress, progress


@pytest.fixture
def clock(monkeypatch):
    """Moves on by so many seconds whenever it is read."""

    def step(seconds: float) -> None:
        ticks = itertools.count(0.0, seconds)
        monkeypatch.setattr(module.time, "monotonic", lambda: next(ticks))

    return step


@pytest.mark.parametrize("is_shown", [True, False])
def test_every_item_comes_once_whether_it_is_shown_or_not(is_shown):
    assert list(progress(range(3, 7), "old policy", unit="step", is_shown=is_shown)) == [3, 4, 5, 6]


def test_a_short_pass_shows_nothing(capsys):
    list(progress(range(100), "old policy", unit="step"))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("is_shown", [True, False])
def test_a_bar_counts_what_an_earlier_process_did(capsys, monkeypatch, is_shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(module, "_SHORT_SECONDS", 0.0)
    bar = progress(range(2, 5), "reference", unit="batch", is_shown=is_shown, num_done=2)
    assert next(bar) == 2
    shown = capsys.readouterr().err
    assert ("reference:" in shown and "2/5" in shown) == is_shown


def test_a_long_pass_writes_a_line_a_minute_into_a_file(clock, capsys):
    clock(20.0)  # so 10,000 items take 56 hours
    list(progress(range(2, 10_000), "reference", unit="batch", num_done=2))
    shown = capsys.readouterr().err
    lines = shown.splitlines()
    assert lines[0] == "reference: 0 %, 5 of 10000, 01:00 elapsed, 55:31:40 left"
    assert len(lines) == 9_998 // 3
    assert "\r" not in shown


def test_lines_do_not_multiply_with_items(clock, capsys):
    clock(0.0078125)
    with Progress("tokenizing", total=3_000_000, unit="B") as shown:
        for _ in range(30_000):
            shown.update(100, note="7 records")
    assert capsys.readouterr().err.splitlines() == [
        "tokenizing: 26 %, 768k of 3.00MB, 01:00 elapsed, 02:54 left",
        "tokenizing: 51 %, 1.54M of 3.00MB, 02:00 elapsed, 01:54 left",
        "tokenizing: 77 %, 2.30M of 3.00MB, 03:00 elapsed, 00:54 left",
    ]


def test_other_ranks_write_no_lines(clock, capsys):
    clock(100.0)
    list(progress(range(5), "old policy", unit="step", is_shown=False))
    assert capsys.readouterr() == ("", "")


def test_a_pass_of_unknown_length_says_what_it_has_done(clock, capsys):
    clock(60.0)
    list(progress(iter("ab"), "check", unit="answer"))
    assert capsys.readouterr().err.splitlines() == ["check: 1, 01:00 elapsed", "check: 2, 02:00 elapsed"]
