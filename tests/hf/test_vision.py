"""Models that see are trained on text: the vision tower comes to the export bit for bit, and the whole model loads."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from megatron_psft.config.lora import LoraConfig
from megatron_psft.errors import UserError
from megatron_psft.hf.adapter import AdapterBase
from megatron_psft.hf.export import export, export_adapter
from megatron_psft.hf.side_files import SideFiles
from megatron_psft.hf.vision import VISION_FILE, vision_of
from megatron_psft.hf.weights import SafetensorsFolder
from megatron_psft.model.shape import read_shape
from tests.support import tiny
from tests.support.cli import run_cli
from tests.support.converting import (
    Inputs,
    assert_refused,
    assert_same_tensors,
    convert,
    converted,
    inputs,
    tensors_of,
)
from tests.support.layouts import LAYOUTS, rank_of

__all__ = ["convert", "converted", "inputs"]  # the fixtures

TEXT = torch.arange(1, 60)[None]
CLASSES = {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "qwen3_vl": "Qwen3VLForConditionalGeneration"}
PIXELS = b'{"patch_size":4 }'
LORA = LoraConfig(lora_rank=3, lora_alpha=6.0, lora_targets=("q_proj", "up_proj"))


def spell_as_modules(folder: Path) -> Path:
    """The names that published files of Qwen3-VL have, and those of Qwen2.5-VL may have."""
    path = folder / "model.safetensors"
    spelled = {"visual.": "model.visual.", "model.": "model.language_model."}
    tensors = {}
    for name, tensor in load_file(path).items():
        ours = next((ours for ours in spelled if name.startswith(ours)), "")
        tensors[spelled.get(ours, "") + name.removeprefix(ours)] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("seeing")
    found = {family: tiny.build_model(root / family, family, tied=family == "qwen3_vl") for family in CLASSES}
    shutil.copytree(found["qwen2_5_vl"], root / "modules")
    for folder in found.values():
        (folder / "preprocessor_config.json").write_bytes(PIXELS)
    return found | {"modules": spell_as_modules(root / "modules")}


def is_of_vision(name: str) -> bool:
    return name.startswith(("visual.", "model.visual."))


def import_and_export(layout: str, folders: dict[Path, Path], bf16: bool, max_shard_bytes: int) -> None:
    with rank_of(LAYOUTS[layout]) as rank:
        for source, target in folders.items():
            chunks, shape = rank.build(source, bf16=bf16)
            export(
                chunks,
                target,
                shape=shape,
                dtype=torch.bfloat16 if bf16 else torch.float32,
                side_files=SideFiles(model_folder=source, tokenizer_folder=source),
                parallel=rank.parallel,
                max_shard_bytes=max_shard_bytes,
            )


def test_the_export_is_the_whole_model_under_the_names_of_its_source(pool, tmp_path, sources):
    """Gathered from ranks, and in several files; one of them has tensors of both parts."""
    folders = {source: tmp_path / name for name, source in sources.items()}
    pool.run(import_and_export, 2, "TP2-SP", folders, False, 100_000)
    for source, target in folders.items():
        assert_same_tensors(target, source)
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(tensors_of(source))
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(source).values())
        model, wanted = tiny.load_model(target), tiny.load_model(source)
        assert type(model).__name__ == CLASSES[read_shape(source).model_type]
        assert torch.equal(model(TEXT).logits, wanted(TEXT).logits)
    for family in CLASSES:
        assert (tmp_path / family / "preprocessor_config.json").read_bytes() == PIXELS


def test_the_vision_tower_keeps_its_dtype_where_the_rest_is_rounded(pool, tmp_path, sources):
    pool.run(import_and_export, 1, "one", {sources["qwen3_vl"]: tmp_path / "target"}, True, 10**9)
    before, after = tensors_of(sources["qwen3_vl"]), tensors_of(tmp_path / "target")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor if is_of_vision(name) else tensor.bfloat16())
        assert (after[name].dtype is torch.float32) is is_of_vision(name)
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert (config["torch_dtype"], config["text_config"].get("dtype")) == ("bfloat16", None)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("hub_config", [False, True])
def test_added_rows_and_stops_are_those_of_the_language_model(tmp_path, family, hub_config):
    source = tiny.build_model(tmp_path / "source", family, hub_config=hub_config, num_hidden_layers=1)
    (source / "generation_config.json").unlink()
    target = tmp_path / "target"
    target.mkdir()
    files = SideFiles(model_folder=source, tokenizer_folder=source, vocab_size=300, stop_id=7)
    files.write(target, torch.bfloat16)
    before, after = read_shape(source), read_shape(target)
    assert after == replace(before, vocab_size=300, dtype="bfloat16")
    assert AutoConfig.from_pretrained(target).text_config.vocab_size == 300
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == [2, 7]


@pytest.mark.parametrize("name", ["qwen3_vl", "modules"])
def test_a_checkpoint_of_weights_has_the_vision_tower(convert, converted, tmp_path, sources, name):
    source = tmp_path / "source"
    shutil.copytree(sources[name], source)
    checkpoint = converted("--from-hf", source, "--to-megatron", tmp_path / "checkpoint")
    source.rename(tmp_path / "moved")
    target = converted("--from-megatron", checkpoint, "--to-hf", tmp_path / "target")
    assert_same_tensors(target, tmp_path / "moved")
    assert convert("--from-megatron", checkpoint, "--to-hf", target, "--check").code == 0
    tensors = load_file(checkpoint / VISION_FILE)
    assert all(map(is_of_vision, tensors))
    assert len({(checkpoint / name).stat().st_mode for name in (VISION_FILE, "config.json")}) == 1
    changed = next(name for name in tensors if name.endswith("qkv.bias"))
    file = next(path for path in target.glob("*.safetensors") if changed in load_file(path))
    save_file({**load_file(file), changed: tensors[changed] + 1}, file, metadata={"format": "pt"})
    result = convert("--from-megatron", checkpoint, "--to-hf", target, "--check")
    assert result.code == 1
    assert "qkv.bias" in result.out


def test_a_folder_without_its_vision_tower_is_refused(tmp_path, sources):
    folder = tmp_path / "folder"
    shutil.copytree(sources["qwen2_5_vl"], folder)
    tensors = {name: tensor for name, tensor in tensors_of(folder).items() if not is_of_vision(name)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks model.visual.\*; a qwen2_5_vl checkpoint must have them"):
        SafetensorsFolder(folder, read_shape(folder))


def test_an_unknown_tensor_is_named_as_the_file_has_it(tmp_path, sources):
    folder = tmp_path / "folder"
    shutil.copytree(sources["qwen2_5_vl"], folder)
    path = folder / "model.safetensors"
    save_file({**load_file(path), "model.layers.0.other": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"holds model.layers.0.other, which a qwen2_5_vl model does not use"):
        SafetensorsFolder(folder, read_shape(folder))


def test_random_weights_have_no_vision_tower_to_export(pool, tmp_path, sources, inputs: Inputs):
    """Said before anything is trained."""
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(sources["qwen3_vl"] / "config.json", model)
    argv = inputs.argv(model, tmp_path / "run", "--random-init", "--export-hf", tmp_path / "hf")
    (result,) = pool.run(run_cli, 1, argv)
    assert_refused(result, "load_hf", "lacks the vision tower", "name a folder that has all of the model")


def write_adapters(layout: str, source: Path, target: Path) -> None:
    with rank_of(LAYOUTS[layout]) as rank:
        chunks, shape = rank.build(source, lora=LORA)
        base = AdapterBase(name=None, weights="")
        options = {"shape": shape, "dtype": torch.float32, "parallel": rank.parallel}
        export_adapter(chunks, target, lora=LORA, base=base, **options)


@pytest.mark.parametrize("family", CLASSES)
def test_adapters_go_to_the_language_model_alone(pool, tmp_path, sources, family):
    """Although the vision tower of Qwen2.5-VL has modules of the same names."""
    pool.run(write_adapters, 1, "one", sources[family], tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny.load_model(sources[family]), tmp_path / "adapter")
    found = {name: tensor for name, tensor in model.named_parameters() if "lora_" in name}
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert found.keys() == {name.replace(".weight", ".default.weight") for name in written}
    assert all(torch.equal(found[name.replace(".weight", ".default.weight")], it) for name, it in written.items())


@pytest.mark.parametrize("family", CLASSES)
def test_a_tower_that_config_json_does_not_describe_is_refused(sources, tmp_path, family):
    """transformers would draw what lacks at random, or not load the export."""
    folder = shutil.copytree(sources[family], tmp_path / "model")
    shape, tensors = read_shape(folder), load_file(folder / "model.safetensors")
    assert vision_of(folder, shape) is not None
    name = max(filter(is_of_vision, tensors))
    for damaged, message in (
        ({key: tensor for key, tensor in tensors.items() if key != name}, f"lacks {name_in_model(name)}"),
        (tensors | {name: torch.zeros(5, 5, 5)}, r"is \(5, 5, 5\), but config.json makes it"),
        (tensors | {f"{name}_more": torch.zeros(1)}, f"holds {name}_more, which a {family} model does not use"),
    ):
        save_file(damaged, folder / "model.safetensors")
        with pytest.raises(UserError, match=message):
            vision_of(folder, shape)


def name_in_model(name: str) -> str:
    return f"model.{name.removeprefix('model.')}"
