"""The cache gives what was tokenized, once, whoever else runs, dies or damages it."""

import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_psft.data import cache as cache_module
from megatron_psft.data import tokenizing
from megatron_psft.data.cache import DamagedCacheError
from megatron_psft.data.dataset import TokenizedDataset
from megatron_psft.errors import UserError
from tests.data import toys
from tests.data.cached import TOKENIZER, build, write_data
from tests.data.toys import byte_tokenizer
from tests.support.pool import WorkerError


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "a.jsonl", 20)


def folders(data: Path) -> set[Path]:
    """What lies in the cache, but for locks."""
    return {path for path in (data.parent / "cache").iterdir() if path.suffix != ".lock"}


def everything(dataset: TokenizedDataset) -> list[tuple[list[int], list[bool], str]]:
    return [
        (dataset[i].tokens.tolist(), dataset[i].label_mask.tolist(), dataset.location(i)) for i in range(len(dataset))
    ]


@pytest.fixture
def forbid_tokenizing(monkeypatch):
    def forbid() -> None:
        monkeypatch.setattr(cache_module, "tokenize_chunks", lambda *_: pytest.fail("tokenized again"))

    return forbid


def test_a_second_start_reads_the_cache_and_says_the_same(data, forbid_tokenizing, caplog):
    write_data(data, 30, bad_every=3)
    first = build(data, skip_bad_records=True)
    report = caplog.text
    caplog.clear()
    forbid_tokenizing()
    second = build(data, skip_bad_records=True)
    assert everything(second) == everything(first)
    assert second.statistics() == first.statistics()
    assert second.fingerprint() == first.fingerprint()
    assert caplog.text == report
    assert "10 of 30 records are bad" in report
    with pytest.raises(UserError, match="10 of 30 records are bad"):
        build(data)


def test_limits_on_length_are_no_part_of_the_cache(data, forbid_tokenizing):
    whole = build(data)
    forbid_tokenizing()
    limit = int(np.median(whole.lengths))
    assert build(data, seq_length=limit, overlong="drop").lengths.max() == limit
    cut = build(data, seq_length=limit, overlong="truncate")
    assert [len(example.tokens) for example in cut] == np.minimum(whole.lengths, limit).tolist()
    assert cut.statistics().label_tokens == sum(int(example.label_mask.sum()) for example in cut)
    with pytest.raises(UserError, match=rf"a\.jsonl:\d+ \({limit + 1} tokens\)"):
        build(data, seq_length=limit)


@pytest.mark.parametrize(
    ("changes", "tokenizer"),
    [
        ({"loss_on": "all"}, TOKENIZER),
        ({"prompt_key": "completion", "completion_key": "prompt"}, TOKENIZER),
        ({"system_prompt": "Be brief."}, TOKENIZER),
        ({}, byte_tokenizer(toys.LLAMA3)),
        ({"chat_template_kwargs": '{"greeting": "Hello"}'}, byte_tokenizer("{{ greeting }}" + toys.CHATML)),
        ({}, byte_tokenizer(toys.CHATML, merges=[("x", "x")])),
    ],
)
def test_what_changes_tokens_changes_the_place(data, changes, tokenizer):
    first = build(data)
    other = build(data, tokenizer, **changes)
    assert len(folders(data)) == 2
    assert other.fingerprint() != first.fingerprint()
    assert everything(build(data)) == everything(first)


@pytest.mark.parametrize(
    "changes",
    [
        {"keep_reasoning": True},
        {"loss_on_empty_think": False},
        {"split_special_tokens": True},
        {"chat_template_kwargs": '{"enable_thinking": false}'},
    ],
)
def test_what_may_change_tokens_has_a_place_of_its_own(data, changes):
    build(data)
    build(data, **changes)
    assert len(folders(data)) == 2


def test_a_templates_text_and_not_its_file_names_the_place(data, tmp_path):
    first, second = tmp_path / "a.jinja", tmp_path / "b.jinja"
    for path in (first, second):
        path.write_text(toys.CHATML)
        build(data, chat_template=str(path))
    assert len(folders(data)) == 1
    second.write_text(toys.LLAMA3)
    build(data, chat_template=str(second))
    assert len(folders(data)) == 2


def test_changed_data_is_tokenized_again(data):
    assert len(build(data)) == 20
    write_data(data, 21)
    assert len(build(data)) == 21
    stat = data.stat()
    data.write_text(data.read_text().replace("x", "y"))
    os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert "y" in TOKENIZER.decode(build(data)[0].tokens.tolist())


def test_data_that_changes_while_it_is_read_is_refused(data, monkeypatch):
    tokenize = cache_module.tokenize_chunks

    def grow(*args):
        yield from tokenize(*args)
        write_data(data, 22)

    monkeypatch.setattr(cache_module, "tokenize_chunks", grow)
    with pytest.raises(UserError, match="changed while it was read"):
        build(data)
    assert not folders(data)


@pytest.mark.parametrize("name", ["manifest.json", "index.bin", "bad.jsonl", "tokens.bin", "label_mask.bin"])
@pytest.mark.parametrize("damage", ["gone", "short", "changed"])
def test_a_damaged_cache_is_made_again_or_refused_by_name(data, name, damage, caplog):
    write_data(data, 20, bad_every=9)
    before = everything(build(data, skip_bad_records=True))
    (folder,) = folders(data)
    content = (folder / name).read_bytes()
    if damage == "gone":
        (folder / name).unlink()
    else:
        middle = len(content) // 2
        changed = content[:middle] if damage == "short" else content[:middle] + b"\xff\xfe" + content[middle + 2 :]
        (folder / name).write_bytes(changed)
    is_found_late = damage == "changed" and name in ("tokens.bin", "label_mask.bin")
    if is_found_late:
        # Not looked at before a record is read: that would cost reading everything at every start.
        with pytest.raises(DamagedCacheError, match=rf"{folder} is damaged at .*a\.jsonl:\d+; delete it"):
            everything(build(data, skip_bad_records=True))
        shutil.rmtree(folder)
    assert everything(build(data, skip_bad_records=True)) == before
    assert ("is damaged and made again" in caplog.text) == (not is_found_late)
    assert folders(data) == {folder}


def _build_and_die(data: Path) -> None:
    def die(*_):
        yield from ()
        os._exit(9)

    cache_module.tokenize_chunks = die
    build(data)


def _build(data: Path) -> list[tuple[list[int], list[bool], str]]:
    return everything(build(data))


@pytest.mark.slow
def test_a_killed_writer_leaves_nothing_that_counts(pool, data):
    with pytest.raises(WorkerError, match="9"):
        pool.run(_build_and_die, 1, data)
    (leaving,) = folders(data)
    assert leaving.name.startswith(".")
    assert len(build(data)) == 20
    assert leaving not in folders(data)


@pytest.mark.slow
def test_runs_at_once_tokenize_once_and_agree(pool, tmp_path):
    data = write_data(tmp_path / "a.jsonl", 600)
    found = pool.run(_build, 3, data)
    assert found[0] == found[1] == found[2]
    assert len(folders(data)) == 1
    assert len(found[0]) == 600


def _build_with_workers(data: Path) -> None:
    tokenizing._CHUNKS_BEFORE_PROCESSES = 1
    build(data, data_workers=2)


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    data = write_data(tmp_path / "a.jsonl", 200_000)
    parent = multiprocessing.get_context("spawn").Process(target=_build_with_workers, args=(data,))
    parent.start()
    assert parent.pid is not None
    family = psutil.Process(parent.pid)
    while not any(path.stat().st_size for path in (tmp_path / "cache").glob(".*/tokens.bin")):
        assert parent.is_alive()
        time.sleep(0.1)
    workers = family.children(recursive=True)
    assert len(workers) >= 2
    parent.kill()
    parent.join()
    _, alive = psutil.wait_procs(workers, timeout=300)
    assert not alive
    assert len(build(write_data(tmp_path / "a.jsonl", 20))) == 20


def test_without_locks_the_first_to_finish_wins(data, monkeypatch):
    def no_locks(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(cache_module.fcntl, "flock", no_locks)
    tokenize = cache_module.tokenize_chunks
    inner = []

    def overtaken(*args):
        yield from tokenize(*args)
        if not inner:
            inner.append(None)
            inner.append(everything(build(data)))  # another run, which finishes first

    monkeypatch.setattr(cache_module, "tokenize_chunks", overtaken)
    assert everything(build(data)) == inner[1]
    assert len(folders(data)) == 1


def test_a_cache_that_cannot_be_written_names_its_flag(data):
    (data.parent / "file").write_text("")
    with pytest.raises(UserError, match=r"data_cache_dir .*file/cache.*--data-cache-dir"):
        build(data, data_cache_dir=str(data.parent / "file" / "cache"))


def test_several_processes_give_what_one_gives_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "_CHUNKS_BEFORE_PROCESSES", 1)
    data = write_data(tmp_path / "a.jsonl", 1500, bad_every=100)
    one = build(data, data_workers=1, data_cache_dir=str(tmp_path / "one"), skip_bad_records=True)
    two = build(data, data_workers=2, data_cache_dir=str(tmp_path / "two"), skip_bad_records=True)
    assert everything(two) == everything(one)
    assert two.fingerprint() == one.fingerprint()
    assert two.statistics() == one.statistics()


def _die(_: object) -> None:
    os._exit(9)


@pytest.mark.slow
def test_a_killed_process_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "_CHUNKS_BEFORE_PROCESSES", 1)
    monkeypatch.setattr(tokenizing, "_tokenize_in_worker", _die)
    data = write_data(tmp_path / "a.jsonl", 600)
    with pytest.raises(UserError, match=r"data_workers \(2\): a process that tokenizes was killed"):
        build(data, data_workers=2)
    assert not folders(data)


def hash_of_code(folder: Path, **texts: str) -> str:
    """Of a cache.py that imports reading.py; other.py is imported by neither."""
    files = {
        "cache": "from megatron_psft.data.reading import read\n",
        "reading": 'def read():\n    """Reads."""\n    return 1\n',
        "other": "x = 1\n",
    }
    for name, text in (files | texts).items():
        (folder / f"{name}.py").write_text(text)
    return cache_module._hash_of_code.__wrapped__(folder / "cache.py")


def test_code_that_makes_tokens_is_part_of_the_key_and_its_comments_are_not(tmp_path):
    before = hash_of_code(tmp_path)
    assert hash_of_code(tmp_path, reading='# Why.\ndef read():\n    """Reads 1."""\n\n    return 1  # one\n') == before
    assert hash_of_code(tmp_path, reading='"""The room."""\ndef read():\n    return 1\n') == before
    assert hash_of_code(tmp_path, other="x = 2\n") == before
    assert hash_of_code(tmp_path, reading="def read():\n    return 2\n") != before
    assert hash_of_code(tmp_path, reading='def read():\n    return "Reads."\n') != before


def test_code_that_makes_tokens_is_found_by_its_imports(monkeypatch):
    read = []
    monkeypatch.setattr(
        cache_module.ast, "parse", lambda text, parse=cache_module.ast.parse: read.append(text) or parse(text)
    )
    cache_module._hash_of_code.__wrapped__()
    texts = {path.name: path.read_text() for path in Path(cache_module.__file__).parent.glob("*.py")}
    found = {name for name, text in texts.items() if text in read}
    assert {"cache.py", "tokenizing.py", "chat.py", "files.py", "formats.py", "messages.py", "pairs.py"} <= found
    assert not found & {"loader.py", "packing.py", "dataset.py", "cache_folders.py"}
