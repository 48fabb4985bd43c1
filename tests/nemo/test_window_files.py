"""What is left of a window when a run resumes within it."""

import pytest
import torch

from megatron_psft.errors import UserError
from tests.nemo.bridge import needs_bridge

pytestmark = needs_bridge

LAYOUT = (2, 2, 1, 1, 4)


def files(*, rank: int = 0, layout: tuple[int, ...] = LAYOUT):
    from megatron_psft.nemo.window_files import WindowFiles

    return WindowFiles(layout=layout, interval=4, rank=rank)


def window(first: int) -> dict[int, list[torch.Tensor]]:
    return {step: [torch.full((2, 3), float(step))] for step in range(first + 1, first + 4)}


def test_the_steps_to_come_are_read(tmp_path):
    for rank in (0, 1):
        files(rank=rank).write(tmp_path, 8, {step: [values[0] + rank] for step, values in window(8).items()})
    left = files(rank=1).read(tmp_path, 10)
    assert {step: values[0][0, 0].item() for step, values in left.items()} == {10: 11.0, 11: 12.0}


def test_windows_of_checkpoints_are_kept_and_no_others(tmp_path):
    for first in (0, 4, 8, 12):
        files().write(tmp_path, first, window(first))
        (tmp_path / f"iter_{6:07d}").mkdir(exist_ok=True)  # within the window of 4
    assert sorted(int(folder.name) for folder in (tmp_path / "psft_window").iterdir()) == [4, 12]
    (tmp_path / f"iter_{6:07d}").rmdir()
    files().write(tmp_path, 16, window(16))
    assert [int(folder.name) for folder in (tmp_path / "psft_window").iterdir()] == [16]


def test_window_of_a_run_that_went_further_goes(tmp_path):
    files().write(tmp_path, 12, window(12))
    files().write(tmp_path, 8, window(8))
    assert [int(folder.name) for folder in (tmp_path / "psft_window").iterdir()] == [8]


def test_missing_window_names_the_file_and_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"has no .*rank_00000\.pt; resume from a checkpoint between two windows"):
        files().read(tmp_path, 6)


def test_window_of_another_layout_is_refused(tmp_path):
    files().write(tmp_path, 4, window(4))
    with pytest.raises(UserError, match="scored with another number of ranks"):
        files(layout=(2, 1, 1, 1, 4)).read(tmp_path, 6)
