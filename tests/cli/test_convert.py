"""Conversion through its command line: nothing is lost either way, and what it writes trains in any layout."""

import ctypes
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from megatron_psft import sealed
from megatron_psft.sealed import MARKER
from tests.support import tiny
from tests.support.cli import REPOSITORY, run_cli
from tests.support.converting import (
    assert_refused,
    assert_same_tensors,
    convert,
    convert_with_small_files,
    converted,
    dtypes_of,
    inputs,
    run_convert,
    tensors_of,
)
from tests.support.marks import slow

__all__ = ["convert", "converted", "inputs"]  # the fixtures

INDEX = "model.safetensors.index.json"
MODELS = [(family, tied) for family in tiny.FAMILIES for tied in (False, True)] + [
    (family, False) for family in tiny.MOE_FAMILIES
]
MODEL_IDS = [f"{family}-{'tied' if tied else 'untied'}" for family, tied in MODELS]


def change_tensors(folder: Path, **changes: torch.Tensor) -> None:
    """Rewrites the one file of `folder`."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), **changes}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.bfloat16, slow(torch.float16)], ids=str)
@pytest.mark.parametrize(("family", "tied"), MODELS, ids=MODEL_IDS)
def test_there_and_back_is_bit_exact(convert, converted, tmp_path, family, tied, dtype):
    """From several files, in which the tensors of a Megatron-Core parameter may be apart, with all that lies beside."""
    source = tiny.build_model(tmp_path / "source", family, tied=tied, dtype=dtype, shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    tokenizer = tiny.build_tokenizer(tmp_path / "tokenizer")
    checkpoint = converted("--from-hf", source, "--to-megatron", tmp_path / "new" / "ckpt", "--tokenizer", tokenizer)
    shutil.copytree(source, tmp_path / "expected")
    shutil.rmtree(source)
    shutil.copytree(tokenizer, tmp_path / "expected", dirs_exist_ok=True)
    tokenizer.rename(tmp_path / "moved")
    target = converted("--from-megatron", checkpoint, "--to-hf", tmp_path / "target")
    assert_same_tensors(target, tmp_path / "expected")
    assert ("lm_head.weight" in tensors_of(target)) is not tied
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((target / name).read_text()) == json.loads((tmp_path / "expected" / name).read_text()), name
    ids = [
        AutoTokenizer.from_pretrained(folder)("24clips 48/2")["input_ids"] for folder in (target, tmp_path / "moved")
    ]
    assert ids[0] == ids[1]
    for argv in (
        ["--from-hf", target, "--to-megatron", checkpoint],
        ["--from-megatron", checkpoint, "--to-hf", target],
    ):
        result = convert(*argv, "--check")
        assert (result.code, result.out) == (0, f"{len(tensors_of(target))} tensors, all equal\n"), result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "moved", "new", "target"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ckpt"]


def test_the_dtype_is_chosen(convert, converted, tmp_path):
    source = tiny.build_model(tmp_path / "source", "llama")
    expected = {name: tensor.bfloat16() for name, tensor in tensors_of(source).items()}
    checkpoint = converted("--from-hf", source, "--to-megatron", tmp_path / "ckpt", "--dtype", "bfloat16")
    for argv in (("--from-megatron", checkpoint), ("--from-hf", source, "--dtype", "bfloat16")):
        target = converted(*argv[:2], "--to-hf", tmp_path / argv[0].strip("-"), *argv[2:])
        found = tensors_of(target)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert dtypes_of(target) == {torch.bfloat16}
        assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert convert("--from-hf", source, "--to-megatron", checkpoint, "--check").code == 1
    assert convert("--from-hf", source, "--to-megatron", checkpoint, "--check", "--dtype", "bfloat16").code == 0


def test_several_dtypes_are_not_made_one_unasked(convert, converted, tmp_path):
    source = tiny.build_model(tmp_path / "source", "llama", dtype=torch.bfloat16)
    change_tensors(source, **{"model.norm.weight": torch.ones(64) + 2**-20})
    argv = ("--from-hf", source, "--to-megatron", tmp_path / "ckpt")
    assert_refused(convert(*argv), "model.norm.weight is F32 and model.embed_tokens.weight is BF16", "--dtype")
    back = converted("--from-megatron", converted(*argv, "--dtype", "float32"), "--to-hf", tmp_path / "back")
    assert torch.equal(tensors_of(back)["model.norm.weight"], torch.ones(64) + 2**-20)


def test_files_are_cut_at_the_limit(converted, tmp_path):
    source = tiny.build_model(tmp_path / "source", "qwen3")
    checkpoint = converted("--from-hf", source, "--to-megatron", tmp_path / "ckpt")
    target = converted("--from-megatron", checkpoint, "--to-hf", tmp_path / "target", "--max-shard-gb", "60e-6")
    files = [load_file(path) for path in sorted(target.glob("*.safetensors"))]
    assert len(files) > 5
    assert all(len(file) == 1 or sum(tensor.nbytes for tensor in file.values()) <= 60_000 for file in files)
    assert len(json.loads((target / INDEX).read_text())["weight_map"]) == sum(map(len, files))
    assert_same_tensors(target, source)


def test_the_check_names_just_what_differs(convert, converted, tmp_path):
    source = tiny.build_model(tmp_path / "source", "qwen2")
    checkpoint = converted("--from-hf", source, "--to-megatron", tmp_path / "ckpt")
    name = "model.layers.2.self_attn.k_proj.bias"
    bias = tensors_of(source)[name]
    bias[3] = torch.nextafter(bias[3], torch.tensor(9.0))
    change_tensors(source, **{name: bias})
    there, back = ("--from-hf", source, "--to-megatron", checkpoint), ("--from-megatron", checkpoint, "--to-hf", source)
    for argv in (there, back):
        result = convert(*argv, "--check")
        assert result.code == 1
        first, last = result.out.splitlines()
        assert first.startswith(f"differs: {name}: float32 ")
        assert last == f"1 of {len(tensors_of(source))} tensors differ"
    change_tensors(source, **{name: tensors_of(source)[name].double()})
    result = convert("--from-megatron", checkpoint, "--to-hf", source, "--check")
    assert f"in {source} float64 " in result.out


@dataclass(frozen=True)
class Places:
    """Sound folders that mistakes are made with."""

    model: Path
    other: Path
    checkpoint: Path
    empty: Path


@pytest.fixture
def places(converted, tmp_path) -> Places:
    model = tiny.build_model(tmp_path / "model", "qwen2", num_hidden_layers=2)
    other = tiny.build_model(tmp_path / "other", "qwen2", num_hidden_layers=3)
    (tmp_path / "empty").mkdir()
    checkpoint = converted("--from-hf", model, "--to-megatron", tmp_path / "ckpt")
    return Places(model=model, other=other, checkpoint=checkpoint, empty=tmp_path / "empty")


MISTAKES = {
    "": "neither given; give one of from_hf, from_megatron",
    "--from-hf a --from-megatron b --to-hf c": "from_hf and from_megatron given; give one of",
    "--from-hf {model}": "neither given; give one of to_hf, to_megatron",
    "--from-hf a --to-hf b --tensor-model-parallel-size 2": "unknown argument --tensor-model-parallel-size",
    "--from-hf ./none --to-hf {new}": "from_hf (./none) must be an existing folder or a hub ID",
    "--from-megatron none --to-hf {new}": "from_megatron (none) must be a complete step folder",
    "--from-hf {empty} --to-megatron {new}": "from_hf ({empty}) must hold a config.json",
    "--from-hf {model} --to-megatron {empty}": "to_megatron ({empty}) must not exist",
    "--from-megatron {checkpoint} --to-hf {model}": "to_hf ({model}) must not exist",
    "--from-hf {model} --to-megatron /dev/null/x": "to_megatron (/dev/null/x) must be a folder that can be written",
    "--from-hf {model} --load-hf {model} --to-hf {new}": "load_hf ({model}) goes with from_megatron",
    "--from-megatron {checkpoint} --load-hf {other} --to-hf {new}": (
        "from_megatron ({checkpoint}) must be of the same model, but has model num_layers (2) instead of (3)"
    ),
    "--from-megatron {checkpoint} --to-hf {other} --check": (
        "to_hf ({other}) must be of the same model, but has model num_layers (3) instead of (2)"
    ),
    "--from-hf {model} --to-hf {new} --check": "to_hf ({new}) must be an existing folder to be checked",
    "--from-hf {model} --to-hf {empty} --check": "to_hf ({empty}) must hold a config.json",
    "--from-hf {model} --to-megatron {model} --check": "to_megatron ({model}) must be an intact checkpoint",
    "--from-hf {model} --to-megatron {new} --max-shard-gb 1": "max_shard_gb (1.0) goes with writing to_hf",
    "--from-hf {model} --to-hf {new} --max-shard-gb 0": "max_shard_gb (0.0) must be greater than 0",
    "--via-bridge --from-hf {model} --to-hf {new}": "to_hf ({new}) must be the other format",
    "--via-bridge --from-megatron {checkpoint} --to-megatron {new}": "to_megatron ({new}) must be the other format",
    "--via-bridge --from-megatron {checkpoint} --to-hf {new}": "load_hf must be given: {checkpoint} does not say",
    "--via-bridge --from-hf {model} --to-megatron {new} --dtype float16": "dtype (float16) has no effect with",
    "--via-bridge --from-hf {model} --to-megatron {model} --check": "check (True) has no effect with via_bridge",
    "--from-hf {model} --to-hf {new} --dtype int8": "dtype ('int8') must be one of float32, bfloat16, float16",
}


def test_mistakes_are_one_line_and_code_2(convert, places, tmp_path):
    names = {name: str(path) for name, path in vars(places).items()} | {"new": str(tmp_path / "new")}
    for argv, message in MISTAKES.items():
        assert_refused(convert(*argv.format(**names).split()), message.format(**names))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "empty", "model", "other"]


@pytest.mark.parametrize("argv", ["--from-hf {model} --to-megatron", "--from-megatron {checkpoint} --to-hf"])
def test_a_tokenizer_with_ids_that_have_no_row_goes_with_no_weights(convert, places, tmp_path, argv):
    tokenizer = tiny.build_sparse_tokenizer(tmp_path / "sparse", 10_000)
    result = convert(*argv.format(**vars(places)).split(), tmp_path / "to" / "new", "--tokenizer", tokenizer)
    assert_refused(result, f"tokenizer ({tokenizer}) has ids up to 10000 (")
    assert result.err.endswith("rows (vocab_size); name the tokenizer that belongs to the model\n")
    assert not (tmp_path / "to").exists()


@pytest.mark.skipif(find_spec("megatron.bridge") is not None, reason="megatron-bridge is installed")
def test_without_megatron_bridge_it_is_asked_for(convert, places, tmp_path):
    result = convert("--via-bridge", "--from-hf", places.model, "--to-megatron", tmp_path / "new")
    assert_refused(result, "a model from Megatron-Bridge needs megatron-bridge 0.6: pip install")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def pickle_only(path: Path) -> None:
    path.with_name("pytorch_model.bin").write_bytes(pickle.dumps({}))
    path.unlink()


def change_type(path: Path) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_type": "gpt2"}))


def newest_version(path: Path) -> None:
    content = sealed.read_content(path.parent)
    path.unlink()
    path.parent.rename(sealed.partial_folder(path.parent))
    sealed.seal(path.parent, {**content, "version": 99})


HARM = {
    "truncated shard": ("model", "model.safetensors", truncate, "must be a readable safetensors file"),
    "pickle only": ("model", "model.safetensors", pickle_only, "only pickled weights (pytorch_model.bin)"),
    "no shard": ("model", "model.safetensors", Path.unlink, "holds no model.safetensors"),
    "wrong architecture": ("model", "config.json", change_type, "model_type (gpt2) is not supported"),
    "truncated part": ("checkpoint", "__3_0.distcp", truncate, "bytes"),
    "damaged part": ("checkpoint", "__3_0.distcp", flip, "is not as it was written"),
    "no part": ("checkpoint", "__3_0.distcp", Path.unlink, "is missing"),
    "no marker": ("checkpoint", MARKER, Path.unlink, "must be a complete step folder"),
    "damaged marker": ("checkpoint", MARKER, flip, "is not as it was written"),
    "another version": ("checkpoint", MARKER, newest_version, "version (99) must be 2"),
}


@pytest.mark.parametrize("kind", HARM)
def test_damage_is_one_line_and_code_2(convert, places, tmp_path, kind):
    place, name, harm, message = HARM[kind]
    folder: Path = getattr(places, place)
    harm(folder / name)
    argv = ("--from-hf", folder, "--to-megatron") if place == "model" else ("--from-megatron", folder, "--to-hf")
    assert_refused(convert(*argv, tmp_path / "new"), str(folder), message)
    assert not list(tmp_path.glob("new*"))


KILLED = """
import os, signal, sys
from {module} import {owner}
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores
original, calls = {owner}.{method}, []
def killed(*args, **kwargs):
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.{signal})
    return original(*args, **kwargs)
{owner}.{method} = killed
from megatron_psft.cli.convert import main
sys.exit(main(sys.argv[1:]))
"""
MEGATRON_WRITER = ("torch.distributed.checkpoint", "FileSystemWriter", "write_data")
HF_WRITER = ("megatron_psft.hf.export", "_ShardWriter", "add")


@pytest.mark.parametrize(("signum", "code"), [("SIGKILL", -9), slow("SIGINT", 130)])
@pytest.mark.parametrize(
    ("target", "writer"), [("--to-megatron", MEGATRON_WRITER), slow("--to-hf", HF_WRITER)], ids=["megatron", "hf"]
)
@pytest.mark.slow
def test_what_is_killed_has_no_name_and_is_not_taken_for_whole(
    pool, convert, converted, tmp_path, inputs, target, writer, signum, code
):
    source = tiny.build_model(tmp_path / "source", "qwen2", num_hidden_layers=2)
    argv = ["--from-hf", str(source), target, str(tmp_path / "new")]
    script = KILLED.format(module=writer[0], owner=writer[1], method=writer[2], signal=signum)
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, check=False)
    assert done.returncode == code, done.stderr.decode()
    assert not (tmp_path / "new").exists()
    left = list(tmp_path.glob(".new.psft-*"))
    assert len(left) == (signum == "SIGKILL")
    for folder in left:
        partial = sealed.partial_folder(folder / "new") if target == "--to-megatron" else folder
        as_source = "--from-megatron" if target == "--to-megatron" else "--from-hf"
        assert convert(as_source, partial, "--to-hf", tmp_path / "other").code == 2
        if target == "--to-megatron":
            assert len(list(partial.glob("*.distcp"))) > 3
            (result,) = pool.run(run_cli, 1, inputs.argv(source, tmp_path / "run", "--load", partial))
            assert_refused(result, f"load ({partial}) must be a complete step folder")
    for suffix in (".partial", ".old", ".replaced"):  # of somebody else
        (tmp_path / f"new{suffix}").mkdir()
        (tmp_path / f"new{suffix}" / "thesis.tex").touch()
    converted(*argv)
    assert len(list(tmp_path.glob("new.*/thesis.tex"))) == 3
    assert not list(tmp_path.glob(".new.*"))
    assert convert(*argv, "--check").code == 0


@pytest.mark.parametrize("target", ["--to-megatron", "--to-hf"])
def test_a_disk_that_fails_is_one_line_and_leaves_nothing(pool, tmp_path, target):
    source = tiny.build_model(tmp_path / "source", "qwen2", num_hidden_layers=2)
    argv = ["--from-hf", str(source), target, str(tmp_path / "new")]
    (result,) = pool.run(convert_with_small_files, 1, argv)
    assert_refused(result, f"({tmp_path / 'new'}) could not be written", "File too large", code=4)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


M_MMAP_THRESHOLD = -3  # of malloc.h


def convert_and_measure(warm_up: list[str], argv: list[str]) -> int:
    """How much memory the command takes at its highest, in bytes, mapped files included, beside what it takes for the
    smallest model."""

    def kilobytes(name: str) -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
        return int(line.split()[1])

    # Else the allocator keeps up to 64 MB of what is freed, which is much beside a model as small as the test's.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536) == 1
    assert run_convert(warm_up).code == 0
    Path("/proc/self/clear_refs").write_text("5")  # the highest is what it is now
    before = kilobytes("VmRSS")
    result = run_convert(argv)
    assert result.code == 0, result.err
    return 1024 * (kilobytes("VmHWM") - before)


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_file_and_a_tensor(pool, tmp_path):
    """And is not that of the model, either way and in a check."""
    shape = {"hidden_size": 512, "intermediate_size": 4096, "vocab_size": 8000, "num_hidden_layers": 8}
    small = tiny.build_model(tmp_path / "small", "qwen2")
    source = tiny.build_model(tmp_path / "source", "qwen2", dtype=torch.bfloat16, shard_size="20MB", **shape)
    sizes = [path.stat().st_size for path in source.glob("*.safetensors")]
    bound = 1.5 * max(sizes) + 8000 * 512 * 2
    assert sum(sizes) > 3 * bound
    checkpoint, target = tmp_path / "ckpt", tmp_path / "target"
    there = ["--from-hf", str(source), "--to-megatron", str(checkpoint)]
    back = ["--from-megatron", str(checkpoint), "--to-hf", str(target), "--max-shard-gb", "0.02"]
    for number, argv in enumerate((there, back, [*there, "--check"], [*back[:4], "--check"])):
        warm_up = ["--from-hf", str(small), "--to-megatron", str(tmp_path / f"small-{number}")]
        (taken,) = pool.run(convert_and_measure, 1, warm_up, argv)
        assert taken < bound, f"{argv}: {taken / 1e6:.1f} MB of {bound / 1e6:.1f}"
    assert_same_tensors(target, source)


def test_help_has_examples_names_no_layout_and_needs_no_torch():
    command = [sys.executable, "-X", "importtime", "-m", "megatron_psft", "convert", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "    psft convert --from-megatron runs/first --to-hf runs/first/hf\n" in done.stdout
    assert "loads with any tensor, pipeline, context and data-parallel size" in done.stdout
    assert " torch\n" not in done.stderr
