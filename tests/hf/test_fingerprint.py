"""One model's weights and vocabulary are told from another's, and from their own copies they are not."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from megatron_psft.errors import UserError
from megatron_psft.hf.fingerprint import vocabulary_fingerprint, weights_fingerprint
from tests.support import tiny


def test_weights_are_told_by_their_values_and_not_by_their_files(tmp_path):
    tensors = load_file(tiny.build_model(tmp_path / "model", "qwen2", num_hidden_layers=1) / "model.safetensors")
    first = weights_fingerprint(tmp_path / "model", "load_hf")
    names = sorted(tensors)
    cut = tmp_path / "cut"
    cut.mkdir()
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, cut / f"{number}.safetensors", metadata={"format": "pt"})
    assert weights_fingerprint(cut, "load_hf") == first
    found = {first}
    for name in (names[0], names[-1]):
        changed = {**tensors, name: tensors[name] + 1e-3}
        save_file(changed, cut / "0.safetensors")
        (cut / "1.safetensors").unlink(missing_ok=True)
        found.add(weights_fingerprint(cut, "load_hf"))
    save_file({**tensors, names[0]: tensors[names[0]].to(torch.bfloat16)}, cut / "0.safetensors")
    found.add(weights_fingerprint(cut, "load_hf"))
    assert len(found) == 4


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x05\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(UserError, match=r"load_hf: .*model.safetensors must be a readable safetensors file"):
        weights_fingerprint(tmp_path, "load_hf")


def test_a_vocabulary_is_told_by_its_ids(tmp_path):
    tiny.build_tokenizer(tmp_path / "tokenizer")
    tokenizer, same = (AutoTokenizer.from_pretrained(tmp_path / "tokenizer") for _ in range(2))
    assert vocabulary_fingerprint(same) == vocabulary_fingerprint(tokenizer)
    same.add_tokens(["<new>"])
    assert vocabulary_fingerprint(same) != vocabulary_fingerprint(tokenizer)
