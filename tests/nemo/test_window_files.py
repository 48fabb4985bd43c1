"""What is left of a window when a run resumes within it."""

import pickle

import pytest
import torch

from megatron_psft.errors import UserError
from tests.nemo.bridge import needs_bridge
from tests.support.reducers import Reducer, torch_saved

pytestmark = needs_bridge

LAYOUT = (2, 2, 1, 1, 4)


def files(*, rank: int = 0, layout: tuple[int, ...] = LAYOUT):
    from megatron_psft.nemo.window_files import WindowFiles

    return WindowFiles(layout=layout, interval=4, rank=rank)


def window(first: int, *, offset: int = 0):
    """Of two micro-batches; `offset` is added to every log-probability."""
    from megatron_psft.nemo.window_files import ScoredWindow

    steps = range(first + 1, first + 4)
    return ScoredWindow(
        log_probs={step: [torch.full((n,), float(step + offset)) for n in (3, 0)] for step in steps},
        label_ids={step: [torch.full((n,), 10 * step, dtype=torch.int32) for n in (3, 0)] for step in steps},
    )


def test_the_steps_to_come_are_read(tmp_path):
    for rank in (0, 1):
        files(rank=rank).write(tmp_path, 8, window(8, offset=rank))
    left = files(rank=1).read(tmp_path, 10)
    expected = {10: [[11.0] * 3, []], 11: [[12.0] * 3, []]}
    assert {step: [part.tolist() for part in parts] for step, parts in left.log_probs.items()} == expected
    expected = {10: [[100] * 3, []], 11: [[110] * 3, []]}
    assert {step: [part.tolist() for part in parts] for step, parts in left.label_ids.items()} == expected


def test_a_window_that_version_0_1_wrote_is_read(tmp_path):
    files().write(tmp_path, 8, window(8))
    (path,) = tmp_path.rglob("rank_*.pt")
    stored = {step: [torch.tensor([[7.0, 16_777_215.0], [-1.0, -2.0]])] for step in (9, 10, 11)}
    torch.save({"layout": LAYOUT, "stored": stored}, path)
    left = files().read(tmp_path, 11)
    assert [part.tolist() for part in left.log_probs[11]] == [[-1.0, -2.0]]
    assert [part.tolist() for part in left.label_ids[11]] == [[7, 16_777_215]]
    assert left.label_ids[11][0].dtype == torch.int32


def test_nothing_in_a_window_s_file_is_run(tmp_path):
    files().write(tmp_path, 8, window(8))
    (path,) = tmp_path.rglob("rank_*.pt")
    for planted in (torch_saved(Reducer(tmp_path / "marker")), pickle.dumps(Reducer(tmp_path / "marker")), b"", b"PK"):
        path.write_bytes(planted)
        with pytest.raises(UserError, match=rf"{path} is not as a run writes it"):
            files().read(tmp_path, 10)
    assert not (tmp_path / "marker").exists()


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
