"""Progress bars of passes: long ones are seen, short ones and those of other ranks are not."""

import pytest

from megatron_psft.metrics import progress as module
from megatron_psft.metrics.progress import progress


def test_every_item_comes_once_whether_a_bar_is_shown_or_not():
    for is_shown in (True, False):
        assert list(progress(range(3, 7), "old policy", unit="step", is_shown=is_shown)) == [3, 4, 5, 6]


def test_a_short_pass_shows_nothing(capsys):
    list(progress(range(100), "old policy", unit="step", is_shown=True))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("is_shown", [True, False])
def test_a_long_pass_counts_what_an_earlier_process_did(capsys, monkeypatch, is_shown):
    monkeypatch.setattr(module, "_SHORT_SECONDS", 0)
    bar = iter(progress(range(2, 5), "reference", unit="batch", is_shown=is_shown, num_done=2))
    assert next(bar) == 2
    shown = capsys.readouterr().err
    assert ("reference:" in shown and "2/5" in shown) == is_shown
