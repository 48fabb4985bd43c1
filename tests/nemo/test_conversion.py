"""`psft convert --via-bridge`: nothing is lost either way, from checkpoints of ours and of Bridge's loop."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_psft.sources.bridge_conversion import BridgeConversion
from tests.nemo import bridge_models
from tests.nemo.bridge import needs_bridge
from tests.support import tiny
from tests.support.cli import Exit, run_cli
from tests.support.converting import assert_refused, assert_same_tensors, convert_with_small_files, run_convert

pytestmark = [needs_bridge, pytest.mark.slow, pytest.mark.both]


@pytest.fixture
def convert(source_pool):
    def on_one_rank(*flags: object) -> Exit:
        return source_pool.run(run_convert, 1, ["--via-bridge", *map(str, flags)])[0]

    return on_one_rank


@pytest.fixture
def converted(convert):
    """Returns the folder written, which the fourth flag names."""

    def succeed(*flags: object) -> Path:
        done = convert(*flags)
        assert done.code == 0, done.err
        assert done.out.endswith(f"{flags[3]} by Megatron-Bridge\n")
        return Path(str(flags[3]))

    return succeed


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3"])
def test_there_by_a_run_and_back_nothing_changes(source_pool, converted, tmp_path, family):
    """A run starts from the checkpoint beside another model, and takes a step too small to count."""
    build = tiny.build_model if family in tiny.FAMILIES else bridge_models.build_model
    source, other = build(tmp_path / "source", family), build(tmp_path / "other", family)
    tensors = {name: it + 1 for name, it in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    tokenizer = tiny.build_tokenizer(tmp_path / "tokenizer")
    checkpoint = converted("--from-hf", source, "--to-megatron", tmp_path / "ckpt", "--tokenizer", tokenizer)
    assert (checkpoint / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    back = converted("--from-megatron", checkpoint, "--to-hf", tmp_path / "back", "--load-hf", other)
    assert_same_tensors(back, source)
    argv = ["--load-hf", other, "--tokenizer", tokenizer, "--model-source", "bridge", "--init-from", checkpoint]
    argv += ["--data", tiny.write_records(tmp_path / "r.jsonl", 2), "--save", tmp_path / "run", "--seq-length", 256]
    argv += ["--train-iters", 1, "--global-batch-size", 1, "--lr", "1e-30"]
    (done,) = source_pool.run(run_cli, 1, [str(value) for value in argv])
    assert done.code == 0, done.err
    assert_same_tensors(converted("--from-megatron", tmp_path / "run", "--to-hf", tmp_path / "of-run"), source)


def save_by_bridge(model: Path, target: Path) -> None:
    """As Bridge's loop does."""
    conversion = BridgeConversion(model, "load_hf")
    with conversion._model(bf16=True) as (chunk, parallel):
        conversion._source.fill([chunk], parallel)
        conversion._source._bridge.save_megatron_model([chunk], str(target))


@pytest.mark.parametrize("family", ["glm4_moe", "qwen2_5_vl", "qwen3_vl"])
def test_a_checkpoint_of_bridges_own_is_exported(source_pool, converted, tmp_path, family):
    """With biases of routers in fp32, and with a vision tower."""
    if family == "glm4_moe":
        model = bridge_models.build_in_bf16(tmp_path / "model", family)
    else:
        model = tiny.build_model(tmp_path / "model", family, dtype=torch.bfloat16)
    source_pool.run(save_by_bridge, 1, model, tmp_path / "run")
    flags = ("--from-megatron", tmp_path / "run", "--to-hf", tmp_path / "hf", "--load-hf", model)
    assert_same_tensors(converted(*flags), model)


def test_mistakes_are_one_line(convert, converted, tmp_path):
    """Of the checkpoint, of the model, and of what Bridge would leave out."""
    build = bridge_models.build_model
    source, other = build(tmp_path / "source", "olmoe"), build(tmp_path / "other", "olmoe", num_hidden_layers=3)
    checkpoint = converted("--from-hf", source, "--to-megatron", tmp_path / "ckpt")
    bare = shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("complete.json"))
    (bare / "run_config.yaml").touch()  # as in one of Bridge's
    odd = shutil.copytree(source, tmp_path / "odd")
    tensors, router = load_file(source / "model.safetensors"), "model.layers.0.mlp.gate.weight"
    save_file({name: it for name, it in tensors.items() if name != router}, odd / "model.safetensors")
    gpt2 = shutil.copytree(source, tmp_path / "gpt2")
    (gpt2 / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    back = ("--to-hf", tmp_path / "new", "--from-megatron")
    for flags, message in (
        ([*back, checkpoint], f"load_hf must be given: {checkpoint} does not say of which model it is"),
        ([*back, checkpoint, "--load-hf", other], "but has model num_hidden_layers (4) instead of (3)"),
        ([*back, bare, "--load-hf", other], "must be of the model that load_hf is, and differs in "),
        ([*back, source, "--load-hf", source], f"from_megatron ({source}) must be a complete step folder"),
        (["--to-megatron", tmp_path / "new", "--from-hf", odd], f"from_hf ({odd}): Megatron-Bridge leaves parameters"),
        (["--to-megatron", tmp_path / "new", "--from-hf", gpt2], "model_type (gpt2) was not compared through"),
    ):
        assert_refused(convert(*flags), message)
    damaged = next(checkpoint.glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert_refused(convert(*back, checkpoint, "--load-hf", source), "must be an intact checkpoint", damaged.name)
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fails_is_one_line_and_leaves_nothing(source_pool, converted, tmp_path):
    source = tiny.build_model(tmp_path / "source", "qwen3", num_hidden_layers=2)
    checkpoint = converted("--from-hf", source, "--to-megatron", tmp_path / "ckpt")
    there = ["--from-hf", source, "--to-megatron", tmp_path / "new"]
    back = ["--from-megatron", checkpoint, "--load-hf", source, "--to-hf", tmp_path / "new"]
    for argv in (there, back):
        (result,) = source_pool.run(convert_with_small_files, 1, ["--via-bridge", *map(str, argv)])
        assert_refused(result, f"{argv[-2][2:].replace('-', '_')} ({tmp_path / 'new'}) could not be written: ", code=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "source"]
