"""Checkpoints as folders: what is sealed is found and checked, and nothing else passes for it."""

import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_psft import sealed
from megatron_psft.checkpoint import folders
from megatron_psft.checkpoint.folders import step_folder
from megatron_psft.sealed import MARKER, DamageError, first_damage, read_content

CONTENT = {"step": 12, "identity": {"seed": 1, "rope": {"factor": 8.0}, "norm": 1e-5}}
FILES = {
    "__0_0.distcp": b"weights" * 1000,
    "__1_0.distcp": b"moments" * 999,
    "common.pt": b"schedule",
    ".metadata": b"m",
}


def write_checkpoint(run: Path, step: int, content: dict = CONTENT, files: dict[str, bytes] = FILES) -> Path:
    """As two ranks do, one after the other."""
    target = step_folder(run, step)
    staging = sealed.begin(target)
    for name, data in files.items():
        (staging / name).write_bytes(data)
    for rank in range(2):
        sealed.leave_sums(staging, rank)
    sealed.seal(target, content)
    return target


def damages(checkpoint: Path, parts: int = 1) -> list[str]:
    return [damage for part in range(parts) if (damage := first_damage(checkpoint, part=part, parts=parts))]


def test_a_sealed_checkpoint_has_its_files_its_content_and_nothing_else(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 12)
    assert checkpoint.name == "step_0000012"
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000012"]
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != MARKER} == FILES
    assert read_content(checkpoint) == CONTENT
    assert damages(checkpoint) == []


def test_a_checkpoint_that_is_written_again_is_replaced(tmp_path):
    write_checkpoint(tmp_path, 12)
    checkpoint = write_checkpoint(tmp_path, 12, {"step": 0}, {"__0_0.distcp": b"new"})
    assert sorted(path.name for path in checkpoint.iterdir()) == ["__0_0.distcp", MARKER]
    assert read_content(checkpoint) == {"step": 0}
    assert damages(checkpoint) == []
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000012"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink], ids=["truncated", "flipped", "removed"])
@pytest.mark.parametrize("name", [*FILES, MARKER])
def test_damage_to_any_file_is_found_and_named(tmp_path, name, harm):
    checkpoint = write_checkpoint(tmp_path, 12)
    harm(checkpoint / name)
    assert any(str(checkpoint / name) in damage for damage in damages(checkpoint, parts=3))


@given(place=st.integers(min_value=0), bit=st.integers(0, 7))
def test_no_bit_of_the_marker_can_change_unseen(tmp_path_factory, place, bit):
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("run"), 12)
    path = checkpoint / MARKER
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(DamageError, match=re.escape(str(path))):
        read_content(checkpoint)


def test_every_file_is_checked_by_one_of_the_ranks(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 12)
    for name in FILES:
        (checkpoint / name).write_bytes(b"!")
    assert len(damages(checkpoint, parts=len(FILES))) == len(FILES)


def test_step_folders_leave_out_what_is_not_sealed_or_not_a_step(tmp_path):
    for step in (9, 10, 11, 10_000_000):
        write_checkpoint(tmp_path, step)
    sealed.begin(step_folder(tmp_path, 12))
    shutil.copytree(tmp_path / "step_0000009", tmp_path / "step_0000009_good")
    (tmp_path / "step_0000013").write_text("a file")
    (tmp_path / "step_").mkdir()
    kept = folders.set_aside(tmp_path / "step_0000011")
    assert kept == tmp_path / "step_0000011.damaged"
    names = [path.name for path in folders.step_folders(tmp_path)]
    assert names == ["step_0000009", "step_0000010", "step_10000000"]
    assert folders.step_folders(tmp_path / "no-such-folder") == []


def test_a_step_folder_is_told_from_a_run_by_name_or_marker(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 9)
    copy = shutil.copytree(checkpoint, tmp_path / "the_good_one")
    (checkpoint / MARKER).unlink()
    assert folders.is_step_folder(checkpoint)
    assert folders.is_step_folder(copy)
    assert not folders.is_step_folder(tmp_path)
    assert not folders.is_step_folder(tmp_path / "no-such-folder")


def test_a_write_that_failed_leaves_nothing_and_can_be_tried_again(tmp_path):
    target = step_folder(tmp_path, 5)
    (sealed.begin(target) / "__0_0.distcp").write_bytes(b"half")
    sealed.discard(target)
    assert list(tmp_path.iterdir()) == []
    (sealed.begin(target) / "__7_0.distcp").write_bytes(b"killed, not removed")
    assert damages(write_checkpoint(tmp_path, 5)) == []
    assert not (target / "__7_0.distcp").exists()


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4]), (None, [1, 2, 3, 4])])
def test_the_newest_checkpoints_are_kept(tmp_path, keep_last, kept):
    for step in range(1, 5):
        write_checkpoint(tmp_path, step)
    folders.remove_older(tmp_path, keep_last)
    assert sorted(tmp_path.iterdir()) == [step_folder(tmp_path, step) for step in kept]
