"""Which source has a model, and what is said where none does."""

import json
from types import SimpleNamespace

import pytest

from megatron_psft.errors import UserError
from megatron_psft.sources import bridge_import, choice
from megatron_psft.sources.native import NativeSource
from tests.support import tiny

SIZES = {"num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 100}


@pytest.fixture
def folder(tmp_path):
    def write(model_type: str, **fields):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **SIZES, **fields}))
        return tmp_path

    return write


@pytest.mark.parametrize("wanted", ["auto", "native"])
def test_a_family_of_our_own_is_native(tmp_path, wanted):
    source = choice.choose_source(tiny.build_model(tmp_path, "qwen2", num_hidden_layers=1), wanted)
    assert isinstance(source, NativeSource)
    assert source.vocab_size == tiny.VOCAB_SIZE


def test_a_family_of_bridge_alone_wants_bridge(folder, monkeypatch):
    monkeypatch.setattr(choice, "has_bridge", lambda: False)
    message = r"model_type \(gemma3_text\) is built by Megatron-Bridge alone: pip install 'megatron_psft\[nemo\]'"
    with pytest.raises(UserError, match=message):
        choice.choose_source(folder("gemma3_text"), "auto")


def test_a_family_of_no_source_is_told_those_of_both(folder):
    with pytest.raises(
        UserError, match=r"\(phi3\) is not supported; supported are llama, .*; and by Megatron-Bridge gemma"
    ):
        choice.choose_source(folder("phi3"), "auto")


def test_native_is_asked_for_by_name(folder):
    with pytest.raises(UserError, match=r"model_source \(native\) has no model_type \(gemma3_text\), "):
        choice.choose_source(folder("gemma3_text"), "native")


def test_bridge_is_asked_for_by_name(folder, monkeypatch):
    monkeypatch.setattr(bridge_import, "has_bridge", lambda: False)
    with pytest.raises(UserError, match=r"a model from Megatron-Bridge needs megatron-bridge 0\.6: pip install"):
        choice.choose_source(folder("qwen2"), "bridge")


def test_another_line_of_bridge_is_refused(folder, monkeypatch):
    monkeypatch.setattr(bridge_import, "has_bridge", lambda: True)
    monkeypatch.setattr(bridge_import.importlib, "metadata", SimpleNamespace(version=lambda name: "0.7.1"))
    with pytest.raises(UserError, match=r"needs megatron-bridge 0.6, and 0.7.1 is installed"):
        choice.choose_source(folder("qwen2"), "bridge")


def test_the_doctor_says_who_builds_a_model(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "has_bridge", lambda: True)
    assert choice.describe_model(folder("gemma3_text")).endswith("is a gemma3_text model, which Megatron-Bridge builds")
    with pytest.raises(UserError, match=r"final_logit_softcapping \(30.0\) is not supported"):
        choice.describe_model(folder("gemma3_text", final_logit_softcapping=30.0))
    tiny.build_model(tmp_path, "qwen2", num_hidden_layers=1)
    assert choice.describe_model(tmp_path).endswith("is a qwen2 model of 1 layer")


def test_the_plan_knows_no_sizes_of_a_model_of_bridge(folder):
    message = r"load_hf \(.*\): model_type \(gpt_oss\) is built by Megatron-Bridge, which tells no sizes .*; run it$"
    with pytest.raises(UserError, match=message):
        choice.shape_of(folder("gpt_oss"), "load_hf", "run it")
