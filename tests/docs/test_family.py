"""How to add a model family by docs/extending.md, followed as it is written in a copy of the repository."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.docs.logits_of_family import TOKENS
from tests.support import tiny
from tests.support.extending import copy_repository, follow, run


def write_acme_model(folder: Path) -> Path:
    """A model of the page's family: Qwen3's with biases, but none behind attention, under other names."""
    tiny.build_model(folder, "qwen3", attention_bias=True)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("o_proj.bias")]:
        tensors[name].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def as_published(name: str) -> str:
    for theirs, ours in {"mlp.gate_proj": "w1", "mlp.up_proj": "w3", "mlp.down_proj": "w2"}.items():
        name = name.replace(theirs, f"feed_forward.{ours}")
    return name


@pytest.mark.slow
def test_a_model_family_is_added_in_one_place(tmp_path):
    checkout = copy_repository(tmp_path)
    follow(checkout, "A model family")
    twin, model = write_acme_model(tmp_path / "twin"), tiny.build_tokenizer(tmp_path / "acme")
    expected = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)(TOKENS).logits
    tensors = load_file(twin / "model.safetensors")
    tensors = {as_published(name): tensor for name, tensor in tensors.items() if not name.endswith("o_proj.bias")}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    config = json.loads((twin / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "model_type": "acme"}), encoding="utf-8")

    run([sys.executable, "-m", "tests.docs.logits_of_family", str(model), str(tmp_path)], checkout)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
