"""Adapters come from `peft` and go there bit for bit, and are refused where they do not belong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_psft.config.lora import LoraConfig
from megatron_psft.errors import UserError
from megatron_psft.hf.adapter import AdapterBase, AdapterFolder
from megatron_psft.hf.export import export, export_adapter
from megatron_psft.hf.fingerprint import weights_fingerprint
from megatron_psft.hf.side_files import SideFiles
from megatron_psft.hf.weights import fill_parameters
from megatron_psft.model.shape import read_shape
from tests.support import tiny
from tests.support.layouts import LAYOUTS, rank_of
from tests.support.marks import slow

TARGETS = ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")
LORA = LoraConfig(lora_rank=5, lora_alpha=15.0, lora_targets=TARGETS)
BASE = AdapterBase(name="the/model", weights="its hash")


def tiny_model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model and an adapter of it that `peft` has written."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny.build_model(folder / "model", "qwen2", tied=True)
    torch.manual_seed(4)
    config = PeftConfig(
        r=5, lora_alpha=15, target_modules=list(TARGETS), init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(tiny_model(folder / "model"), config).save_pretrained(folder / "peft")
    return folder


def round_trip(layout: str, folder: Path, bf16: bool) -> None:
    with rank_of(LAYOUTS[layout]) as rank:
        chunks, shape = rank.build(folder / "model", bf16=bf16, lora=LORA)
        source = AdapterFolder(folder / "peft", shape, LORA)
        fill_parameters(chunks, source, shape, rank.parallel, adapters=True)
        options = {"shape": shape, "dtype": chunks[0].module.parameters().__next__().dtype, "parallel": rank.parallel}
        export_adapter(chunks, folder / f"{layout}-{bf16}", lora=LORA, base=BASE, **options)
        side_files = SideFiles(model_folder=folder / "model", tokenizer_folder=folder / "model")
        export(chunks, folder / f"{layout}-{bf16}-merged", lora=LORA, side_files=side_files, **options)


@pytest.mark.parametrize("layout", ["TP2-SP", slow("PP2-VPP1"), slow("TP2-SP-PP2-DP2-distopt")])
def test_an_adapter_leaves_as_it_came_and_merged_is_what_peft_merges(pool, folder, layout):
    pool.run(round_trip, LAYOUTS[layout].world_size, layout, folder, False)
    ours, theirs = (load_file(folder / name / "adapter_model.safetensors") for name in (f"{layout}-False", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    loaded = PeftModel.from_pretrained(tiny_model(folder / "model"), folder / f"{layout}-False")
    merged, whole = loaded.merge_and_unload().state_dict(), tiny_model(folder / f"{layout}-False-merged").state_dict()
    base = tiny_model(folder / "model").state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-6, atol=1e-7)
        is_target = any(target in name for target in TARGETS) and name.endswith("weight")
        assert torch.equal(tensor, base[name]) != is_target, name
    config = json.loads((folder / f"{layout}-False" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "the/model"


def test_a_merged_model_is_rounded_once(pool, folder):
    pool.run(round_trip, 1, "one", folder, True)
    found = load_file(folder / "one-True-merged" / "model.safetensors")
    adapter = load_file(folder / "one-True" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{matrix}.weight"] for matrix in "AB")
    assert a.dtype == found[f"{name}.weight"].dtype == torch.bfloat16
    weight = tiny_model(folder / "model").state_dict()[f"{name}.weight"].bfloat16()
    exact = weight.double() + 3 * b.double() @ a.double()
    assert torch.equal(found[f"{name}.weight"], exact.bfloat16())


def other(folder: Path, target: Path, tensors=None, metadata=None, **config) -> Path:
    """A copy of the adapter with changes."""
    shutil.copytree(folder / "peft", target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors is not None or metadata is not None:
        found = load_file(target / "adapter_model.safetensors")
        save_file(found | (tensors or {}), target / "adapter_model.safetensors", metadata=metadata)
    return target


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 6}, r"r \(6\) must be lora_rank \(5\); change the latter"),
        ({"lora_alpha": 5}, r"lora_alpha \(5\) must be lora_alpha \(15.0\)"),
        ({"use_rslora": True}, r"use_rslora \(True\) must be lora_rank_stabilized \(False\)"),
        ({"use_dora": True}, r"use_dora \(True\) is not supported; only False is"),
        ({"peft_type": "LOHA"}, r"peft_type \(LOHA\) is not supported"),
        ({"rank_pattern": {"q_proj": 3}}, r"rank_pattern .* is not supported"),
        ({"tensors": {FIRST: torch.zeros(5, 32)}}, r"lora_A.weight is \(5, 32\), but this model makes it \(5, 64\)"),
        ({"tensors": {f"{FIRST}s": torch.zeros(1)}}, r"holds .*lora_A.weights"),
        ({"metadata": {"base_model_weights": "another"}}, r"is an adapter of other weights \(another\)"),
    ],
)
def test_an_adapter_of_another_kind_shape_or_base_is_refused(folder, tmp_path, changes, message):
    adapter = other(folder, tmp_path / "other", **changes)
    with pytest.raises(UserError, match=message):
        AdapterFolder(adapter, read_shape(folder / "model"), LORA, BASE)


def test_an_adapter_of_fewer_targets_is_refused(folder):
    lora = LoraConfig(lora_rank=5, lora_alpha=15.0, lora_targets=(*TARGETS, "v_proj"))
    with pytest.raises(UserError, match=r"of lora_targets, but lacks .*layers.0.self_attn.v_proj.lora_A"):
        AdapterFolder(folder / "peft", read_shape(folder / "model"), lora, BASE)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("adapter_config.json", None, "must hold an adapter_config.json"),
        ("adapter_config.json", "{", "must be JSON"),
        ("adapter_model.safetensors", None, "must be a readable safetensors file"),
        ("adapter_model.safetensors", "no tensors", "must be a readable safetensors file"),
    ],
)
def test_a_damaged_folder_is_refused(folder, tmp_path, name, text, message):
    path = other(folder, tmp_path / "other") / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=message):
        AdapterFolder(path.parent, read_shape(folder / "model"), LORA, BASE)


def test_a_file_of_ours_names_its_base(pool, folder):
    pool.run(round_trip, 1, "one", folder, False)
    with safe_open(folder / "one-False" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["base_model_weights"] == BASE.weights
    shape = read_shape(folder / "model")
    AdapterFolder(folder / "one-False", shape, LORA, BASE)
    with pytest.raises(UserError, match="other weights"):
        AdapterFolder(folder / "one-False", shape, LORA, AdapterBase(name=None, weights="another"))


def test_a_file_of_peft_is_told_by_the_folder_that_it_names(folder, tmp_path, caplog):
    """Where that is no folder, nobody can tell, and a line says so."""
    shape = read_shape(folder / "model")
    own = AdapterBase(name=str(folder / "model"), weights=weights_fingerprint(folder / "model", "load_hf"))
    AdapterFolder(folder / "peft", shape, LORA, own)
    AdapterFolder(folder / "peft", shape, LORA, AdapterBase(name=None, weights="a checkpoint that was converted"))
    with pytest.raises(UserError, match=rf"other weights \({own.weights}\) than .* \(another\); name the model"):
        AdapterFolder(folder / "peft", shape, LORA, AdapterBase(name="copy", weights="another"))
    assert "org/model" not in caplog.text
    AdapterFolder(other(folder, tmp_path / "hub", base_model_name_or_path="org/model"), shape, LORA, own)
    assert "is an adapter of org/model, as its adapter_config.json says" in caplog.text
