"""An export's folder: earlier exports are replaced, whatever interrupts it, and nothing that is not theirs."""

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from megatron_psft import atomic
from megatron_psft.errors import UserError
from megatron_psft.hf.folder import MANIFEST, check_apart, check_target, check_unchanged, replacing

FIRST = {
    "config.json": "first",
    "model-00001-of-00002.safetensors": "one",
    "model-00002-of-00002.safetensors": "two",
    "model.safetensors.index.json": "index",
    "additional_chat_templates/rag.jinja": "first rag",
}
SECOND = {
    "config.json": "second",
    "model.safetensors": "whole",
    "chat_template.jinja": "second",
}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def export(target: Path, files: dict[str, str]) -> None:
    with replacing(target, "export_hf") as folder:
        write(folder, files)


def content(folder: Path) -> dict[str, str]:
    """All files, but the manifest."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths if path.name != MANIFEST}


def assert_refused(target: Path, *words: str, **needed: Path) -> None:
    def check() -> None:
        check_apart("export_hf", target, needed.items())
        check_target("export_hf", target)
        check_unchanged("export_hf", target)

    with pytest.raises(UserError) as caught:
        check()
    assert str(caught.value).startswith(f"export_hf ({target})")
    for word in words:
        assert word in str(caught.value)


def test_the_manifest_lists_every_file_with_its_checksum(tmp_path):
    export(tmp_path / "out", FIRST)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    sums = {name: [len(text), hashlib.sha256(text.encode()).hexdigest()] for name, text in FIRST.items()}
    assert manifest == {"complete": True, "files": sums}


@pytest.mark.parametrize("strangers", [{}, {"README.md": "mine", ".git/HEAD": "mine", "notes/a/b.txt": "mine"}])
def test_an_earlier_export_is_replaced_and_strangers_stay_in_place(tmp_path, strangers):
    target = tmp_path / "out"
    export(target, FIRST)
    write(target, strangers)
    places = {name: (target / name).stat().st_ino for name in strangers}
    for files in (SECOND, FIRST, SECOND):
        export(target, files)
        assert content(target) == files | strangers
    assert {name: (target / name).stat().st_ino for name in strangers} == places
    assert os.listdir(tmp_path) == ["out"]
    assert not (target / "additional_chat_templates").exists()


@pytest.mark.parametrize("suffix", [".old", ".partial", ".new", ".replaced", "-replaced"])
def test_folders_beside_it_stay_whatever_their_names(tmp_path, suffix):
    write(tmp_path / f"out{suffix}", {"thesis.tex": "mine"})
    for files in (FIRST, SECOND):
        export(tmp_path / "out", files)
    assert content(tmp_path / f"out{suffix}") == {"thesis.tex": "mine"}


@pytest.mark.parametrize(
    "strangers",
    [
        {"config.json": '{"lr": 1e-6}'},  # of anything
        {"thesis.tex": ""},
        {".git/HEAD": ""},
        {"model.safetensors": "", "config.json": "{}"},  # of the model that is trained, or of an older export
    ],
)
def test_a_folder_without_an_earlier_export_must_be_empty(tmp_path, strangers):
    target = tmp_path / "out"
    write(target, strangers)
    assert_refused(target, min(strangers).split("/")[0], "name an empty or new folder")
    with pytest.raises(UserError, match="name an empty or new folder"):
        export(target, FIRST)
    assert content(tmp_path) == {f"out/{name}": text for name, text in strangers.items()}


@pytest.mark.parametrize("name", sorted(FIRST))
def test_a_file_that_was_changed_by_hand_is_refused_by_name(tmp_path, name):
    target = tmp_path / "out"
    export(target, FIRST)
    (target / name).write_text(FIRST[name].swapcase())
    assert_refused(target, name, "has changed since an export wrote it")
    with pytest.raises(UserError, match="has changed since"):
        export(target, SECOND)
    assert content(target) == FIRST | {name: FIRST[name].swapcase()}
    (target / name).unlink()
    export(target, SECOND)
    assert content(target) == SECOND


@pytest.mark.parametrize(
    "name",
    [
        "model-00003-of-00003.safetensors",
        "added_tokens.json",
        "chat_template.json",
        "additional_chat_templates/x.jinja",
    ],
)
def test_a_strangers_file_that_loaders_read_is_refused_by_name(tmp_path, name):
    target = tmp_path / "out"
    export(target, FIRST)
    write(target, {name: "mine"})
    assert_refused(target, name, "which no export wrote")
    with pytest.raises(UserError, match="which no export wrote"):
        export(target, SECOND)
    assert content(target) == FIRST | {name: "mine"}


def test_a_strangers_file_that_comes_while_an_export_is_written_stays(tmp_path):
    target = tmp_path / "out"
    export(target, FIRST)

    def export_meanwhile() -> None:
        with replacing(target, "export_hf") as folder:
            write(folder, SECOND)
            write(target, {"chat_template.jinja": "mine"})

    with pytest.raises(UserError, match=r"chat_template\.jinja, which no export wrote"):
        export_meanwhile()
    assert content(target) == FIRST | {"chat_template.jinja": "mine"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("field", ["save", "data", "data_cache_dir", "load_hf"])
def test_what_a_run_reads_or_keeps_is_not_in_it(tmp_path, monkeypatch, field):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "project"
    export(target, FIRST)
    write(target, {"data/train.jsonl": "{}"})
    assert_refused(target, f"is or holds {field} ({target})", **{field: target})
    assert_refused(
        target, f"is or holds {field} (project/data/train.jsonl)", **{field: Path("project/data/train.jsonl")}
    )
    (tmp_path / "link").symlink_to(target)
    assert_refused(tmp_path / "link", f"is or holds {field} ({target})", **{field: target})
    check_apart("export_hf", target, [(field, tmp_path), (field, tmp_path / "project2")])


def test_the_working_directory_is_no_target_nor_in_one(tmp_path, monkeypatch):
    export(tmp_path / "out", FIRST)
    (tmp_path / "out" / "src").mkdir()
    for place, targets in (("out", [".", str(tmp_path / "out")]), ("out/src", ["..", "."])):
        monkeypatch.chdir(tmp_path / place)
        for target in targets:
            assert_refused(Path(target), "is or holds the working directory")


def test_a_checkpoint_or_a_file_is_no_target(tmp_path):
    write(tmp_path, {"step_0000012/complete.json": "{}", "file": ""})
    assert_refused(tmp_path / "step_0000012", "is a checkpoint")
    assert_refused(tmp_path / "file", "must be a folder")
    assert_refused(tmp_path / "file" / "below", "must be a folder that can be written: ")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"files": {"config.json": 3}}', '{"files": []}', "\udc80"])
def test_a_manifest_of_another_kind_is_refused(tmp_path, text):
    write(tmp_path / "out", {"config.json": "{}"})
    (tmp_path / "out" / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert_refused(tmp_path / "out", "is not as an export wrote it")


@pytest.mark.parametrize("name", ["../thesis.tex", "notes.txt", "model/../../x.safetensors", "/x/model.safetensors"])
def test_a_manifest_does_not_lead_elsewhere(tmp_path, name):
    write(tmp_path, {"thesis.tex": "mine", "out/notes.txt": "mine"})
    sums = [4, hashlib.sha256(b"mine").hexdigest()]
    (tmp_path / "out" / MANIFEST).write_text(json.dumps({"files": {name: sums}}))
    assert_refused(tmp_path / "out", f"names {name}, which no export writes")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_all_files_have_the_mode_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "out", "export_hf") as folder:
            write(folder, FIRST)
            (folder / "model-00001-of-00002.safetensors").chmod(0o600)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}
    folders = (tmp_path / "out", tmp_path / "out" / "additional_chat_templates")
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o777 & ~umask}


def export_and_die(target: Path, files: dict[str, str], at: int) -> bool:
    """In a process of its own, which is killed before its call number `at` that changes a name; False where there are
    not so many."""
    child = os.fork()
    if child == 0:
        calls = []

        def counted(change):
            def call(*args, **kwargs):
                calls.append(None)
                if len(calls) == at:
                    os._exit(9)
                return change(*args, **kwargs)

            return call

        for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
            setattr(Path, name, counted(getattr(Path, name)))
        from megatron_psft.hf import folder

        folder.exchange = counted(folder.exchange)
        export(target, files)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("is_there", [False, True])
def test_a_killed_export_leaves_the_earlier_one_or_the_new_one_whole(tmp_path, is_there):
    seen = set()
    for at in range(1, 100):
        target = tmp_path / str(at) / "out"
        target.parent.mkdir()
        if is_there:
            export(target, FIRST)
        if not export_and_die(target, SECOND, at):
            break
        found = content(target) if target.exists() else {}
        assert found in ([FIRST, SECOND] if is_there else [{}, SECOND])
        seen.add(found.get("config.json"))
        export(target, SECOND)
        assert content(target) == SECOND
        assert os.listdir(target.parent) == ["out"]
    assert at > 4
    assert seen == ({"first"} if is_there else {None})  # it is the last change of a name that brings the new one


def test_beside_strangers_a_killed_export_never_leaves_a_mixture_that_loads(tmp_path):
    strangers = {"README.md": "mine", "eval/results.json": "mine"}
    seen = set()
    for at in range(1, 100):
        target = tmp_path / str(at) / "out"
        export(target, FIRST)
        write(target, strangers)
        if not export_and_die(target, SECOND, at):
            break
        found = {name: text for name, text in content(target).items() if ".psft-" not in name}
        assert strangers.items() <= found.items()
        assert "config.json" not in found or found in (FIRST | strangers, SECOND | strangers)
        assert "config.json" in found or json.loads((target / MANIFEST).read_text())["complete"] is False
        seen.add(found.get("config.json"))
        export(target, SECOND)
        assert content(target) == SECOND | strangers
    assert at > 8
    assert seen == {"first", None, "second"}


def test_what_a_living_process_writes_is_not_removed(tmp_path):
    with atomic.aside(tmp_path, "out") as first:
        write(first, {"config.json": "first"})
        with atomic.aside(tmp_path, "out"):
            assert content(first) == {"config.json": "first"}
        export(tmp_path / "out", SECOND)
        assert content(first) == {"config.json": "first"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("number", ["EINVAL", "ENOSYS"])
def test_folders_are_exchanged_where_the_system_has_no_call_for_it(tmp_path, monkeypatch, number):
    import ctypes
    import errno

    class Libc:
        def renameat2(self, *_):
            ctypes.set_errno(getattr(errno, number))
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Libc())
    for files in (FIRST, SECOND):
        export(tmp_path / "out", files)
        assert content(tmp_path / "out") == files
    assert os.listdir(tmp_path) == ["out"]
