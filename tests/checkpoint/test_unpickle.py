"""Nothing in a file is code: a reducer planted in any file of a checkpoint is never run, and the error names the file.

Each planted checkpoint is sealed anew, so that no checksum gives it away before the file is read.
"""

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from megatron_psft import sealed
from megatron_psft.checkpoint import unpickle
from megatron_psft.checkpoint.folders import step_folder
from megatron_psft.errors import UserError
from tests.support.cli import run_cli
from tests.support.converting import convert
from tests.support.marks import slow
from tests.support.reducers import Reducer, torch_saved
from tests.support.runs import inputs, refuse, train

__all__ = ["convert", "inputs"]  # the fixtures

TENSORS = "__0_0.distcp"
WITHIN_WINDOW = ("--train-iters", "3")


@pytest.fixture(scope="module")
def run(pool, inputs, tmp_path_factory) -> Path:
    """A run that ended within a window of the old policy, so that its checkpoint has a file for everything."""
    save = tmp_path_factory.mktemp("run") / "run"
    train(pool, 1, inputs.argv(save, *WITHIN_WINDOW))
    return save


def plant(checkpoint: Path, target: Path, change: Callable[[Path], None]) -> Path:
    """A copy of a checkpoint that was changed and sealed again, as who wants to do harm would."""
    content = sealed.read_content(checkpoint)
    staging = shutil.copytree(checkpoint, sealed.partial_folder(target))
    (staging / sealed.MARKER).unlink()
    change(staging)
    sealed.seal(target, content)
    assert sealed.first_damage(target, part=0, parts=1) is None
    return target


def planted(run: Path, root: Path, marker: Path) -> dict[str, tuple[Path, str]]:
    """What was planted, to the checkpoint and the name of the file."""
    (checkpoint,) = run.glob("step_*")
    found = {}

    def add(name: str, file: str, change: Callable[[Path], None]) -> None:
        found[name] = plant(checkpoint, root / name, change), file

    files = [path.name for path in sorted(checkpoint.iterdir()) if path.name != sealed.MARKER]
    assert {".metadata", "metadata.json", TENSORS} <= set(files)
    for file in files:
        for kind, data in (("pickle", pickle.dumps(Reducer(marker))), ("saved", torch_saved(Reducer(marker)))):
            add(f"{file}-{kind}", file, partial(_replace, file=file, data=data))
    for part in ("planner_data", "storage_meta"):
        add(f"in-{part}", ".metadata", partial(_set_in_metadata, part=part, value=Reducer(marker)))
    for kind in (BytesStorageMetadata, TensorStorageMetadata):
        change = partial(_append, kind=kind, value=Reducer(marker))
        add(f"in-{kind.__name__}", TENSORS, lambda folder, change=change: change(folder / TENSORS))
    if (checkpoint / "common.pt").exists():
        add("in-common", "common.pt", lambda folder: _set_in_common(folder / "common.pt", Reducer(marker)))
    return found


def _replace(folder: Path, file: str, data: bytes) -> None:
    (folder / file).write_bytes(data)


def _set_in_metadata(folder: Path, part: str, value: object) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    setattr(metadata, part, value)
    path.write_bytes(pickle.dumps(metadata))


def _set_in_common(path: Path, value: object) -> None:
    common = torch.load(path, weights_only=True)
    torch.save({**common, "scheduler": {**common["scheduler"], "more": value}}, path)


def _append(path: Path, kind: type, value: object) -> None:
    """Puts a value behind those of a file, and has the table of contents name it for all of one kind."""
    data, start = torch_saved([value]), path.stat().st_size
    with path.open("ab") as file:
        file.write(data)
    table = path.with_name(".metadata")
    metadata = pickle.loads(table.read_bytes())
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata[index.fqn], kind):
            metadata.storage_data[index] = replace(place, relative_path=path.name, offset=start, length=len(data))
    table.write_bytes(pickle.dumps(metadata))


def _load_each(argv: list[str], checkpoints: list[Path]) -> list[str]:
    """What loading each says, in the state of one run; the last must load."""
    from megatron_psft.checkpoint.state import load_checkpoint
    from megatron_psft.config.schema import parse_config
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import process_group
    from megatron_psft.train.assemble import build_run
    from megatron_psft.train.inputs import read_in_turn

    config, platform, said = parse_config(argv), detect(0), []
    with process_group(platform, 1):
        run = build_run(config, read_in_turn(config, 0, 0), platform)
        for checkpoint in checkpoints:
            try:
                load_checkpoint(checkpoint, run.state, run.loader, run.parallel)
                said.append("")
            except UserError as error:
                said.append(str(error))
    return said


@pytest.mark.parametrize("environment", [slow("plain"), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_no_file_of_a_checkpoint_is_run(pool, tmp_path, inputs, run, environment, monkeypatch):
    marker = tmp_path / "marker"
    found = planted(run, tmp_path / "planted", marker)
    folders = [folder for folder, _ in found.values()]
    argv = inputs.argv(tmp_path / "new", *WITHIN_WINDOW)
    ((*said, last),) = pool.run(_load_each_with, 1, environment, argv, [*folders, step_folder(run, 3)])
    assert not marker.exists()
    assert last == ""
    for (name, (folder, file)), text in zip(found.items(), said, strict=True):
        assert str(folder / file) in text, (name, text)
        assert "\n" not in text
        if name.startswith("in-"):  # where all but the reducer is as it should be
            assert f"names {os.mkdir.__module__}.mkdir, which could run code; nothing of it was run" in text, text


def _load_each_with(environment: str, argv: list[str], checkpoints: list[Path]) -> list[str]:
    if environment != "plain":
        os.environ[environment] = "1"
    return _load_each(argv, checkpoints)


def test_a_planted_file_would_be_run_by_those_that_read_pickles(tmp_path):
    """So that the tests here can fail."""
    for name, data in (
        ("pickle", pickle.dumps(Reducer(tmp_path / "1"))),
        ("saved", torch_saved(Reducer(tmp_path / "2"))),
    ):
        if name == "pickle":
            pickle.loads(data)
        else:
            torch.load(BytesIO(data), weights_only=False)
    assert (tmp_path / "1").is_dir()
    assert (tmp_path / "2").is_dir()


@pytest.mark.parametrize("how", ["resume", "load"])
def test_the_command_refuses_a_planted_checkpoint(pool, tmp_path, inputs, run, how):
    marker, save = tmp_path / "marker", tmp_path / "save"
    change = partial(_set_in_metadata, part="planner_data", value=Reducer(marker))
    target = plant(step_folder(run, 3), step_folder(save, 3), change)
    flags = () if how == "resume" else ("--load", str(target))
    line = refuse(pool, inputs.argv(save if how == "resume" else tmp_path / "new", *flags))
    assert line.startswith(f"error: {target / '.metadata'} must hold nothing but data, and names ")
    assert not marker.exists()


@pytest.mark.slow
def test_all_ranks_refuse_what_one_of_them_reads(pool, tmp_path, inputs, run):
    """The states of random generators are each rank's own."""
    marker = tmp_path / "marker"
    train(pool, 2, inputs.argv(tmp_path / "run", *WITHIN_WINDOW))
    checkpoint = step_folder(tmp_path / "run", 3)

    def change(folder: Path) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        (index,) = [index for index in metadata.storage_data if index.fqn.startswith("rng/shard_1")]
        kept = {other: place for other, place in metadata.storage_data.items() if other != index}
        _append(folder / TENSORS, BytesStorageMetadata, Reducer(marker))
        changed = pickle.loads((folder / ".metadata").read_bytes())
        metadata.storage_data = {**kept, index: changed.storage_data[index]}
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    target = plant(checkpoint, step_folder(tmp_path / "planted", 3), change)
    exits = pool.run(run_cli, 2, inputs.argv(tmp_path / "new", *WITHIN_WINDOW, "--load", str(target)))
    assert [exit.code for exit in exits] == [2, 2]
    assert f"error: {target / TENSORS} must hold nothing but data" in exits[0].err
    assert not marker.exists()


@pytest.mark.parametrize("files", ["of each kind", slow("all")])
def test_no_file_of_converted_weights_is_run(convert, pool, tmp_path, inputs, files):
    marker, checkpoint = tmp_path / "marker", tmp_path / "checkpoint"
    done = convert("--from-hf", inputs.model, "--to-megatron", checkpoint, "--tokenizer", inputs.tokenizer)
    assert done.code == 0, done.err
    shown = {}
    paths = [path for path in sorted(checkpoint.iterdir()) if path.name != sealed.MARKER]
    if files != "all":
        paths = list({path.suffix: path for path in paths}.values())
    for path in paths:
        change = partial(_replace, file=path.name, data=pickle.dumps(Reducer(marker)))
        target = plant(checkpoint, tmp_path / path.name, change)
        shown[path.name] = convert("--from-megatron", target, "--to-hf", tmp_path / f"hf-{path.name}")
        assert not marker.exists(), path.name
    read = [file for file in shown if file in (".metadata", "config.json") or file.endswith(".distcp")]
    assert len(read) > (20 if files == "all" else 1)
    for file in read:
        (line,) = [line for line in shown[file].err.splitlines() if line.startswith("error: ")]
        assert file in line
        assert shown[file].code == 2


def test_extra_state_of_a_module_in_fp8_is_data(tmp_path):
    """Transformer Engine pickles a dictionary of tensors into a tensor of bytes, and unpickles it."""

    def state_of(value: object) -> dict[str, dict[str, object]]:
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        return {"model": {"decoder.layers.0.mlp._extra_state": data, "weight": torch.ones(1)}}

    unpickle._check_extra_states(tmp_path, state_of({"scale_fwd": torch.ones(3), "extra_fp8_variables": {"n": 1}}))
    unpickle._check_extra_states(tmp_path, {"model": {"x._extra_state": torch.empty(0, dtype=torch.uint8)}})
    marker = tmp_path / "marker"
    hidden = BytesIO()
    torch.save(Reducer(marker), hidden)
    for value in (Reducer(marker), {"scale_fwd": Reducer(marker)}, _LoadedFromBytes(hidden.getvalue())):
        with pytest.raises(UserError, match=r"layers\.0\.mlp\._extra_state must hold nothing but data"):
            unpickle._check_extra_states(tmp_path, state_of(value))
    assert not marker.exists()


class _LoadedFromBytes:
    """A pickle within a pickle, as tensors have it."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> tuple[object, ...]:
        return torch.storage._load_from_bytes, (self.data,)
