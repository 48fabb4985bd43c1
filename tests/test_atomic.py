"""Files change in one move, through names that are nobody else's."""

from pathlib import Path

import pytest

from megatron_psft.atomic import replace_file


@pytest.mark.parametrize("suffix", [".new", ".partial", ".tmp", "~"])
def test_files_of_like_names_stay_as_they_are(tmp_path, suffix):
    other = tmp_path / f"report.html{suffix}"
    other.write_text("mine")
    for text in ("first", "second"):
        replace_file(tmp_path / "report.html", text)
        assert (tmp_path / "report.html").read_text() == text
    assert other.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    replace_file(tmp_path / "report.html", "first")

    def fail(self: Path, target: Path) -> None:
        raise OSError("no space")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        replace_file(tmp_path / "report.html", "second")
    assert (tmp_path / "report.html").read_text() == "first"
