"""Nothing in a file is code: a reducer planted in any file of a cache or a model folder is never run."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_psft.data.tokenizing import INDEX
from megatron_psft.errors import ExplainedError
from tests.data.cached import build, write_data
from tests.support import tiny
from tests.support.cli import Exit, run_cli
from tests.support.reducers import Reducer, torch_saved

CACHED = ("tokens.bin", "label_mask.bin", "index.bin", "bad.jsonl", "manifest.json")


def cached(root: Path) -> tuple[Path, Path]:
    """A file of records, and the folder of its tokens; one of its rows is bad."""
    data = write_data(root / "data.jsonl", 20, bad_every=7)
    build(data, skip_bad_records=True)
    (folder,) = [path for path in (root / "cache").iterdir() if path.is_dir()]
    return data, folder


def replace_and_seal(folder: Path, name: str, data: bytes) -> None:
    """Replaces a file of a cache with one that its manifest vouches for."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sizes"][name] = len(data)
    if name in manifest["hashes"]:
        manifest["hashes"][name] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % INDEX.itemsize)


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("kind", ["pickle", "saved", "npy", "sealed"])
def test_no_file_of_a_cache_is_run(tmp_path, name, kind):
    marker = tmp_path / "marker"
    data, folder = cached(tmp_path)
    planted = {"saved": torch_saved, "npy": npy}.get(kind, pickle.dumps)(Reducer(marker))
    if kind == "sealed" and name != "manifest.json":
        replace_and_seal(folder, name, padded(planted))
    else:
        (folder / name).write_bytes(planted)
    said = reading(data)
    assert not marker.exists()
    assert kind == "sealed" or not said  # it is made again
    assert not said or str(folder) in said or "seq_length" in said, said


def reading(data: Path) -> str:
    """The error that all that is read of a cache ends with, if any."""
    try:
        dataset = build(data, skip_bad_records=True)
        dataset.statistics()
        for record in range(len(dataset)):
            dataset[record]
    except ExplainedError as error:
        return str(error)
    return ""


def npy(value: object) -> bytes:
    """An array of objects, which numpy pickles."""
    array = np.empty(1, dtype=object)
    array[0] = value
    path = Path(os.environ["HOME"]) / "planted.npy"
    np.save(path, array, allow_pickle=True)
    return path.read_bytes()


def _each(argv: list[str], folders: list[Path]) -> list[Exit]:
    """What a run says of each model folder up to the moment when it would train; the last `argv` follows."""
    from megatron_psft.train import run

    def stop(*args: object, **kwargs: object) -> None:
        raise SystemExit(0)

    original, run.train = run.train, stop
    try:
        return [
            run_cli([*argv, "--load-hf", str(folder), "--tokenizer", str(folder), "--save", str(folder) + "-run"])
            for folder in folders
        ]
    finally:
        run.train = original


READ = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
IGNORED = ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "extra.npy")


@pytest.mark.slow
def test_no_file_of_a_model_folder_is_run(pool, tmp_path):
    marker = tmp_path / "marker"
    source = tiny.build_model(tmp_path / "source", "qwen3")
    tiny.build_tokenizer(source)
    data = tiny.write_records(tmp_path / "records.jsonl", 8)
    present = [path.name for path in sorted(source.iterdir())]
    assert set(READ) <= set(present)
    folders = {}
    for name in (*present, *IGNORED):
        folders[name] = shutil.copytree(source, tmp_path / f"with-{name}")
        (folders[name] / name).write_bytes(pickle.dumps(Reducer(marker)))
    folders["bin alone"] = shutil.copytree(source, tmp_path / "bin-alone")
    (folders["bin alone"] / "model.safetensors").unlink()
    (folders["bin alone"] / "pytorch_model.bin").write_bytes(torch_saved({"w": Reducer(marker)}))
    folders["own code"] = with_own_code(shutil.copytree(source, tmp_path / "own-code"), marker)
    folders["template"] = shutil.copytree(source, tmp_path / "template")
    template = "{{ cycler.__init__.__globals__.os.mkdir('%s') }}" % marker  # noqa: UP031 (braces)
    (folders["template"] / "chat_template.jinja").write_text(template)
    argv = ["--data", str(data), "--data-cache-dir", str(tmp_path / "cache"), "--train-iters", "2"]
    (exits,) = pool.run(_each, 1, [*argv, "--global-batch-size", "4", "--seq-length", "256"], list(folders.values()))
    assert not marker.exists()
    said = dict(zip(folders, exits, strict=True))
    for name in (*READ, "bin alone", "template"):
        lines = [line for line in said[name].err.splitlines() if line.startswith("error: ")]
        assert said[name].code == 2, (name, said[name].err)
        assert len(lines) == 1, name
        assert str(folders[name]) in lines[0] or name == "template", lines
    for name in (*IGNORED, "own code"):
        assert said[name].code == 0, (name, said[name].err)


def with_own_code(folder: Path, marker: Path) -> Path:
    """A folder that brings code for its tokenizer and its model, as `trust_remote_code` would run it."""
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Own: pass\n")
    for name, values in (
        ("config.json", {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}),
    ):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder
