"""Real tokenizers, published model shapes and GSM8K. Needs the shared data folder, see `data_folder`."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_psft.checkpoint.folders import step_folders
from megatron_psft.data.chat import render_record
from megatron_psft.data.example import Example
from megatron_psft.data.micro_batch import collate
from megatron_psft.data.records import Record
from tests.support import oracle
from tests.support.cli import REPOSITORY, run_cli
from tests.support.layouts import Layout, rank_of

pytestmark = pytest.mark.slow

TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]


@pytest.fixture(scope="module")
def data_folder() -> Path:
    folder = Path(os.environ.get("MEGATRON_PSFT_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist; set MEGATRON_PSFT_DATA")
    return folder


def shrink(config: Path, target: Path, **changes: int) -> Path:
    """A published `config.json` with some sizes replaced."""
    target.mkdir()
    (target / "config.json").write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    return target


def train_on_gsm8k(pool, data: Path, model: Path, tokenizer: str, save: Path, *flags: str) -> list[dict[str, float]]:
    argv = ["--load-hf", model, "--random-init", "--tokenizer", data / "tokenizers" / tokenizer]
    argv += ["--data", data / "gsm8k" / "train.jsonl", "--prompt-key", "question", "--completion-key", "answer"]
    argv += ["--save", save, "--export-hf", save / "hf", "--seq-length", "1024", "--global-batch-size", "4"]
    argv += ["--no-packing", *flags]
    exits = pool.run(run_cli, 2, [str(value) for value in argv], timeout=1800)
    assert [exit.code for exit in exits] == [0, 0], exits[0].err
    for checkpoint in step_folders(save):  # gigabytes, in memory
        shutil.rmtree(checkpoint)
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def test_small_model_learns_gsm8k(pool, data_folder, tmp_path):
    config = data_folder / "hf_configs" / "Qwen2.5-0.5B" / "config.json"
    small = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = shrink(config, tmp_path / "model", **small)
    flags = ["--train-iters", "40", "--micro-batch-size", "2", "--lr", "1e-3", "--lr-warmup-iters", "10", *TP2]
    lines = train_on_gsm8k(pool, data_folder, model, "qwen2.5", tmp_path / "run", *flags)
    assert len(lines) == 40
    first, last = (sum(line["nll"] for line in part) / 10 for part in (lines[:10], lines[-10:]))
    assert last < 0.8 * first
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")
    assert exported.get_output_embeddings().weight is exported.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")
    question = [{"role": "user", "content": "What is 1+1?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert exported.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.alone
def test_a_real_vocabulary_and_width_take_the_same_steps_in_two_layouts(pool, data_folder, tmp_path):
    """With 4 of the 24 layers of half a billion parameters, as all of them take minutes."""
    model = shrink(data_folder / "hf_configs" / "Qwen2.5-0.5B" / "config.json", tmp_path / "model", num_hidden_layers=4)
    flags = ["--train-iters", "3", "--lr", "1e-5", "--old-policy-interval", "2"]
    runs = [
        train_on_gsm8k(pool, data_folder, model, "qwen2.5", tmp_path / str(index), *flags, *layout)
        for index, layout in enumerate((TP2, PP2))
    ]
    for tensor, pipeline in zip(*runs, strict=True):
        for name, tolerance in (("loss", 1e-5), ("nll", 1e-5), ("entropy", 1e-5), ("grad_norm", 1e-4)):
            assert tensor[name] == pytest.approx(pipeline[name], rel=tolerance), (tensor["step"], name)


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [("Llama-3.1-8B-Instruct", "llama3"), ("Qwen3-4B", "qwen3"), ("Qwen2.5-7B-Instruct", "qwen2.5")],
)
def test_published_shapes_train_when_made_thin(pool, data_folder, tmp_path, name, tokenizer):
    thin = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = shrink(data_folder / "hf_configs" / name / "config.json", tmp_path / "model", **thin, **heads)
    lines = train_on_gsm8k(pool, data_folder, model, tokenizer, tmp_path / "run", "--train-iters", "2", *PP2)
    assert [line["ratio_max"] == 1 for line in lines] == [True, False]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")) > 100_000


def _score(folder: Path, layout: Layout, example: Example) -> torch.Tensor:
    """Log-probabilities of a record's label tokens, by the weights of a Hugging Face folder in fp32."""
    from megatron_psft.train.pipeline import Pipeline

    with rank_of(layout) as rank:
        chunks, _ = rank.build(folder)
        pipeline = Pipeline(chunks=chunks, parallel=rank.parallel)
        batch = collate([example], batch_size=1, seq_length=-(-len(example.tokens) // 2) * 2, pad_token_id=0)
        return pipeline.score_labels([batch])[0].log_probs


@pytest.mark.alone
@pytest.mark.parametrize(
    ("name", "tokenizer", "layers"), [("Llama-3.1-8B-Instruct", "llama3", 1), ("Qwen3-4B", "qwen3", 2)]
)
def test_published_shapes_at_full_width_score_as_transformers_does(
    pool, data_folder, tmp_path, name, tokenizer, layers
):
    """A layer or two of them; the widths, the vocabulary and the tokenizer are the published ones."""
    config = shrink(data_folder / "hf_configs" / name / "config.json", tmp_path / "config", num_hidden_layers=layers)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    with (data_folder / "gsm8k" / "test.jsonl").open() as file:
        row = json.loads(file.readline())
    messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    real = AutoTokenizer.from_pretrained(data_folder / "tokenizers" / tokenizer)
    example = render_record(Record(messages=tuple(messages), source="gsm8k:1"), real, "assistant")
    with torch.no_grad():
        wanted, _ = oracle.label_statistics(model.float(), example.tokens.tolist(), example.label_mask.tolist())
    del model
    for found in pool.run(_score, 2, tmp_path / "hf", Layout(tensor=2), example, timeout=600):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
