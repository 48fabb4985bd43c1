"""The model that a run leaves is the one it trained: its tokens, and where it stops."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_psft.hf.export import write_folder
from megatron_psft.hf.hub import load_tokenizer
from megatron_psft.hf.mapping import Piece, hf_tensors
from megatron_psft.hf.side_files import SideFiles
from megatron_psft.hf.weights import SafetensorsFolder, WithMeanRows
from megatron_psft.model.shape import read_shape
from tests.support import tiny
from tests.support.cli import Exit, run_cli
from tests.support.converting import run_convert
from tests.support.layouts import LAYOUTS

TEXT = "24clips 48/2 #### 72"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Of a type beside which transformers takes no tokenizer but Qwen2's, and which stops at another token."""
    folder = tiny.build_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2", num_hidden_layers=1, vocab_size=200)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "eos_token_id": 0}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return tiny.build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def train(pool, folder: Path, model: Path, tokenizer: Path, *more: object, size: int = 1) -> Exit:
    data = tiny.write_records(folder / "data.jsonl", 8)
    flags = {
        "load-hf": model,
        "tokenizer": tokenizer,
        "data": data,
        "save": folder / "save",
        "export-hf": folder / "hf",
    }
    flags |= {"data-cache-dir": folder / "cache", "train-iters": 2, "global-batch-size": 2, "seq-length": 256}
    argv = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    return pool.run(run_cli, size, [*argv, *map(str, more)])[0]


def ids(tokenizer, text: str = TEXT) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_export_makes_the_tokens_of_training_and_stops_where_it_was_taught_to(pool, tmp_path, model, tokenizer):
    done = train(pool, tmp_path, model, tokenizer)
    assert done.code == 0, done.err
    found, trained = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "hf", tokenizer))
    assert ids(found) == ids(trained)
    assert found.get_vocab() == trained.get_vocab()
    stop = trained.convert_tokens_to_ids(tiny.IM_END)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config.eos_token_id == [0, stop]
    assert done.err.count(f"generation_config.json stops at {tiny.IM_END} ({stop}), which ends a turn, besides 0") == 1
    # And the trainer goes on from its own export.
    (tmp_path / "next").mkdir()
    again = train(pool, tmp_path / "next", tmp_path / "hf", tmp_path / "hf")
    assert again.code == 0, again.err


def test_a_special_token_that_has_no_row_is_refused(pool, tmp_path, model):
    """transformers adds those that only tokenizer_config.json names."""
    folder = tiny.build_tokenizer(tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|other|>"}))
    done = train(pool, tmp_path, model, folder)
    assert done.code == 2
    assert "has ids up to 200 (<|other|>), but the model's embedding has 200 rows" in done.err


@pytest.mark.parametrize("number", [200, 210, 10_000])
def test_ids_beyond_the_rows_of_the_embedding_are_refused(pool, tmp_path, model, number):
    """Though there are no more tokens than rows."""
    folder = tiny.build_sparse_tokenizer(tmp_path / "tokenizer", number)
    assert len(load_tokenizer(folder)) == 200
    done = train(pool, tmp_path, model, folder)
    assert done.code == 2
    assert f"tokenizer ({folder}) has ids up to {number} (" in done.err
    assert "but the model's embedding has 200 rows (vocab_size)" in done.err
    assert "or add rows with --resize-vocab" in done.err


@pytest.mark.parametrize("tied", [False, True])
def test_added_rows_compute_what_transformers_computes_with_its_own(tmp_path, tied):
    source = tiny.build_model(tmp_path / "model", "llama", vocab_size=200, tied=tied, num_hidden_layers=2)
    own = read_shape(source)
    weights, shape = WithMeanRows(SafetensorsFolder(source, own), own), replace(own, vocab_size=230)
    tensors = ((name, weights.read(Piece(name, (0, dims[0])))) for name, dims in hf_tensors(shape).items())
    files = SideFiles(model_folder=source, tokenizer_folder=source, vocab_size=230)
    write_folder(tmp_path / "target", tensors, shape=shape, dtype=torch.float32, side_files=files)
    expected = AutoModelForCausalLM.from_pretrained(source)
    expected.resize_token_embeddings(230, mean_resizing=True)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert found.config.vocab_size == 230
    tokens = torch.tensor([[3, 229, 7, 200, 215, 199]])
    logits = found(tokens).logits
    assert torch.allclose(logits, expected(tokens).logits, atol=2e-3, rtol=0)  # which adds a little noise
    for table in {expected.get_input_embeddings(), expected.get_output_embeddings()}:
        table.weight.data[200:] = table.weight.data[:200].mean(0)
    assert torch.allclose(logits, expected(tokens).logits, atol=1e-5, rtol=0)
    assert logits[..., 200:].abs().max() > 1e-2
    embedding = load_file(tmp_path / "target" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding[:200], load_file(source / "model.safetensors")["model.embed_tokens.weight"])


@pytest.mark.slow
def test_added_rows_are_trained_resumed_and_exported_in_tensor_parallel_ranks(pool, tmp_path):
    """Some on either rank: Megatron-Core pads to 1024 rows, of which each has 512."""
    source = tiny.build_model(tmp_path / "model", "qwen3", vocab_size=500, num_hidden_layers=1)
    words = tiny.build_sparse_tokenizer(tmp_path / "tokenizer", 530)
    flags = ("--resize-vocab", "--objective", "sft", "--lr-decay-style", "constant", *LAYOUTS["TP2-SP"].flags)
    (tmp_path / "own.jinja").write_text(f"{tiny.CHATML}{{# of this run #}}")
    flags = ("--chat-template", str(tmp_path / "own.jinja"), *flags)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    runs = [("whole", ()), ("parts", ("--train-iters", "1")), ("parts", ())]
    for name, more in runs:
        done = train(pool, tmp_path / name, source, words, "--lr", "1e-3", *flags, *more, size=2)
        assert done.code == 0, done.err
    whole, parts = (load_file(tmp_path / name / "hf" / "model.safetensors") for name, _ in runs[:2])
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert json.loads((tmp_path / "whole" / "hf" / "config.json").read_text())["vocab_size"] == 531
    mean = load_file(source / "model.safetensors")["lm_head.weight"].mean(0)
    head = whole["lm_head.weight"]
    assert head.shape == (531, 64)
    assert 0 < (head[500:] - mean).abs().max() < 0.01  # two steps away
    argv = ["--from-megatron", str(tmp_path / "whole" / "save"), "--to-hf", str(tmp_path / "converted")]
    assert pool.run(run_convert, 1, argv)[0].code == 0
    converted = load_file(tmp_path / "converted" / "model.safetensors")
    assert all(torch.equal(tensor, converted[name]) for name, tensor in whole.items())
    assert (tmp_path / "converted" / "chat_template.jinja").read_text().endswith("{# of this run #}")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "converted" / name).read_text() == (tmp_path / "whole" / "hf" / name).read_text()


@pytest.mark.slow
def test_every_nth_checkpoint_is_exported_beside_it(pool, tmp_path, model, tokenizer):
    """With the weights of that step, in a pipeline, while checkpoints are written in the background and removed."""
    layout = ("--pipeline-model-parallel-size", "2", "--save-interval", "1", "--lr-decay-style", "constant")
    two_layers = tiny.build_model(tmp_path / "model", "qwen2", num_hidden_layers=2, vocab_size=200)
    for name in ("long", "short"):
        (tmp_path / name).mkdir()
    every_other = ("--export-interval", "2", "--keep-last", "1", "--async-save", "--train-iters", "5")
    long = train(pool, tmp_path / "long", two_layers, tokenizer, *layout, *every_other, size=2)
    assert long.code == 0, long.err
    save = tmp_path / "long" / "save"
    assert sorted(path.name for path in save.glob("step_*")) == ["step_0000002_hf", "step_0000004_hf", "step_0000005"]
    short = train(pool, tmp_path / "short", two_layers, tokenizer, *layout, "--train-iters", "4", size=2)
    assert short.code == 0, short.err
    weights = [
        load_file(folder / "model.safetensors") for folder in (save / "step_0000004_hf", tmp_path / "short" / "hf")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    before = load_file(save / "step_0000002_hf" / "model.safetensors")
    assert not torch.equal(before["model.norm.weight"], weights[0]["model.norm.weight"])
