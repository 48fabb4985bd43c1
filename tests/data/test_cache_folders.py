"""What is listed of a cache, and what is removed from it and what is not."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_psft.data.cache_folders import cache_folders, remove, to_prune
from tests.data.cached import TOKENIZER, build, write_data

DAY = 86400
HOLDER = """
import sys
from megatron_psft.data.cache import _open_folder
from pathlib import Path
source = _open_folder(Path(sys.argv[1]), "a")
print(len(source), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cache(tmp_path) -> Path:
    """The cache of two sources, of which no process has anything open."""
    for name, count in (("a", 20), ("b", 5)):
        build(write_data(tmp_path / f"{name}.jsonl", count))
    return tmp_path / "cache"


def states(cache: Path) -> dict[str, str]:
    return {Path(folder.sources[0]).name if folder.sources else "": folder.state for folder in cache_folders(cache)}


def test_folders_are_listed_with_size_use_and_source(cache, tmp_path):
    (old,) = [folder for folder in cache_folders(cache) if folder.sources == (str(tmp_path / "b.jsonl"),)]
    os.utime(old.path / "manifest.json", (time.time() - 9 * DAY,) * 2)
    first, second = cache_folders(cache)
    assert first.path == old.path
    assert first.idle_days == pytest.approx(9, abs=0.1)
    assert second.idle_days == pytest.approx(0, abs=0.1)
    assert second.size == sum(file.stat().st_size for file in second.path.iterdir()) > first.size
    assert (first.state, second.state) == ("current", "current")
    build(tmp_path / "b.jsonl")
    assert cache_folders(cache)[1].path == old.path  # opening it is its last use


def test_sources_that_are_gone_or_changed_are_pruned(cache, tmp_path):
    (tmp_path / "a.jsonl").unlink()
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("\n")
    assert states(cache) == {"a.jsonl": "gone", "b.jsonl": "changed"}
    build(tmp_path / "b.jsonl")
    pruned = list(to_prune(cache_folders(cache), None))
    assert [folder.state for folder in pruned] in (["gone", "changed"], ["changed", "gone"])
    assert all(remove(folder) for folder in pruned)
    assert states(cache) == {"b.jsonl": "current"}
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == [cache_folders(cache)[0].path.name]


def test_folders_unused_for_long_are_pruned_on_demand(cache):
    old, new = cache_folders(cache)
    os.utime(old.path / "manifest.json", (time.time() - 9 * DAY,) * 2)
    assert list(to_prune(cache_folders(cache), None)) == []
    assert [folder.path for folder in to_prune(cache_folders(cache), 8)] == [old.path]
    assert list(to_prune(cache_folders(cache), 10)) == []
    assert new.path.exists()


def test_a_folder_in_use_stays_and_goes_with_its_user(cache):
    folder = cache_folders(cache)[0]
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder.path], stdin=pipe, stdout=pipe, text=True) as user:
        assert int(user.stdout.readline()) in (5, 20)
        assert not remove(folder)
        assert folder.path.is_dir()
        user.kill()
    assert remove(folder)
    assert not folder.path.exists()


def test_unfinished_folders_are_pruned_a_day_after_they_were_left(cache):
    name = cache_folders(cache)[0].path.name
    left = cache / f".{name}.{socket.gethostname()}.1.{time.time_ns()}"
    left.mkdir()
    (left / "tokens.bin").write_bytes(b"1234")
    assert list(to_prune(cache_folders(cache), None)) == []
    for path in (left / "tokens.bin", left):
        os.utime(path, (time.time() - 2 * DAY,) * 2)
    (found,) = to_prune(cache_folders(cache), None)
    assert (found.path, found.size, found.state) == (left, 4, "unfinished")
    assert remove(found)
    assert not left.exists()


def test_what_is_no_cache_is_neither_listed_nor_removed(cache, tmp_path):
    (cache / "notes").mkdir()
    (cache / ("0" * 32)).mkdir()
    (cache / ("1" * 32)).mkdir()
    (cache / ("1" * 32) / "manifest.json").write_text(json.dumps({"name": "another program's"}))
    assert len(cache_folders(cache)) == 2
    assert cache_folders(tmp_path / "none") == []


def test_a_pruned_source_is_tokenized_again(cache, tmp_path):
    for folder in cache_folders(cache):
        assert remove(folder)
    assert len(build(tmp_path / "a.jsonl", TOKENIZER)) == 20
