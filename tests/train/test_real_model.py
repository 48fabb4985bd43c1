"""The trainer on a real pretrained model, SmolLM2-135M-Instruct, against plain PyTorch and transformers in fp32."""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_psft.cli import rollout
from megatron_psft.hf.export import export
from megatron_psft.hf.side_files import SideFiles
from megatron_psft.hf.weights import SafetensorsFolder
from megatron_psft.model.shape import read_shape
from tests.support import oracle
from tests.support.cli import run_cli
from tests.support.layouts import Layout, rank_of
from tests.support.real_model import smollm2

pytestmark = [pytest.mark.slow, pytest.mark.alone]

STEPS, GLOBAL_BATCH_SIZE, LR = 4, 2, 1e-4
SYSTEM = {"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
"""What the template puts before a conversation without a system prompt."""
CHATS = (
    ("What is the capital of Italy?", "Rome, on the Tiber.", "And of Norway?", "That one is Oslo."),
    ("Name 2 primes.", "2 and 3."),
    ("Translate 'good evening' into German.", "Guten Abend!", "Into Dutch?", "Goedenavond!", "Thanks", "Any time :-)"),
    ("Why is the sky blue?", "Air scatters short waves\nmore than long ones.\n\nAt dusk little blue is left."),
)


@pytest.fixture(scope="module")
def model() -> Path:
    return smollm2()


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("records") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages(chat)}) + "\n" for chat in CHATS))
    return path


def messages(chat: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(chat)]


def examples(model: Path) -> list[oracle.Example]:
    """The records' tokens and labels, rendered by hand."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [oracle.chatml_example([SYSTEM, *messages(chat)], tokenizer) for chat in CHATS]


@functools.cache
def expected(model: Path, objective: str) -> list[dict[str, float]]:
    rows = examples(model)
    batches = [rows[:GLOBAL_BATCH_SIZE] if step % 2 == 0 else rows[GLOBAL_BATCH_SIZE:] for step in range(STEPS)]
    history, _ = oracle.train(model, batches, lr=LR, objective=objective, old_policy_interval=STEPS)
    return history


def train(pool, model: Path, records: Path, save: Path, objective: str, layout: Layout) -> list[dict[str, float]]:
    argv = f"""
        --load-hf {model} --data {records} --save {save} --export-hf {save}/hf --train-iters {STEPS}
        --global-batch-size {GLOBAL_BATCH_SIZE} --lr {LR} --lr-decay-style constant
        --no-shuffle --no-packing --objective {objective}
    """
    flags = ("--old-policy-interval", str(STEPS)) if objective == "psft" else ()
    exits = pool.run(run_cli, layout.world_size, [*argv.split(), *layout.flags, *flags])
    assert [exit.code for exit in exits] == [0] * layout.world_size, exits[0].err
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("objective", "layout"),
    [
        ("sft", Layout()),
        ("psft", Layout(tensor=3)),  # nine heads in three groups
        ("psft", Layout(pipeline=2)),
        ("psft", Layout(context=2)),
        ("psft", Layout(data=2, optimizer="distopt")),
    ],
    ids=str,
)
def test_four_steps_follow_the_oracle(pool, model, records, tmp_path, objective, layout):
    found = train(pool, model, records, tmp_path / "run", objective, layout)
    wanted = expected(model, objective)
    for line, oracle_line in zip(found, wanted, strict=True):
        for name in ("tokens", "label_tokens"):
            assert line[name] == oracle_line[name]
        for name in ("loss", "nll", "entropy", "grad_norm"):
            assert line[name] == pytest.approx(oracle_line[name], rel=1e-4), (line["step"], name)
    if objective == "psft":
        assert [line["clip_fraction"] for line in found] == pytest.approx([line["clip_fraction"] for line in wanted])
        assert max(line["clip_fraction"] for line in found) > 0.1
    assert "Paris" in answer(tmp_path / "run" / "hf", "What is the capital of France?")


def answer(folder: Path, question: str) -> str:
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        messages((question,)), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = network.generate(**prompt, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def read_and_write(layout: Layout, source: Path, target: Path) -> None:
    with rank_of(layout) as rank:
        shape = read_shape(source)
        chunks, _ = rank.build(source, weights=SafetensorsFolder(source, shape))
        files = SideFiles(model_folder=source, tokenizer_folder=source)
        export(chunks, target, shape=shape, dtype=torch.float32, side_files=files, parallel=rank.parallel)


@pytest.mark.parametrize("layout", [Layout(tensor=3), Layout(pipeline=2)], ids=str)
def test_what_is_read_is_written_to_the_bit(pool, model, tmp_path, layout):
    pool.run(read_and_write, layout.world_size, layout, model, tmp_path / "hf")
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", model))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_heads_that_cannot_be_shared_out_are_named(pool, model, records, tmp_path):
    flags = [*Layout(tensor=2).flags, "--load-hf", str(model), "--data", str(records), "--save", str(tmp_path / "run")]
    exits = pool.run(run_cli, 2, [*flags, "--train-iters", "1"])
    assert [exit.code for exit in exits] == [2, 2]
    (line,) = [line for line in exits[0].err.splitlines() if line.startswith("error: ")]
    assert "9" in line
    assert "tensor_model_parallel_size (2)" in line


@pytest.fixture(scope="module")
def three_steps(pool, model, records, tmp_path_factory) -> tuple[list[dict[str, float]], Path]:
    """One step of SFT, then two of PSFT, all of one batch, with exports and the drift meter: metrics, and the run."""
    folder = tmp_path_factory.mktemp("three_steps")
    (folder / "prompts.jsonl").write_text('{"prompt": "What is ice?"}\n{"prompt": "Name a colour."}\n')
    own_answers = folder / "own_answers.jsonl"
    argv = f"--model {model} --prompts {folder}/prompts.jsonl --drift-set --num-samples 1 --max-new-tokens 8"
    assert rollout.main([*argv.split(), "--out", str(own_answers)]) == 0
    argv = f"""
        --load-hf {model} --data {records} --save {folder}/run --train-iters 3 --global-batch-size {len(CHATS)}
        --lr {LR} --lr-decay-style constant --no-shuffle --no-packing --sft-warmup-iters 1
        --save-interval 1 --export-interval 1 --keep-last 1 --drift-data {own_answers} --eval-interval 1
    """
    (exit,) = pool.run(run_cli, 1, argv.split())
    assert exit.code == 0, exit.err
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()], folder / "run"


def test_the_loss_of_sft_is_the_one_that_trl_trains_on(three_steps, model, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    (_, first, *_), _ = three_steps
    rows = [{"input_ids": ids, "completion_mask": list(map(int, mask))} for ids, mask in examples(model)]
    config = SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=len(rows), completion_only_loss=True, max_length=None,
        use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
    )  # fmt: skip
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    trainer = SFTTrainer(model=network, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    (batch,) = trainer.get_train_dataloader()
    assert int((batch["labels"][:, 1:] != -100).sum()) == first["label_tokens"]
    with torch.no_grad():
        assert first["loss"] == pytest.approx(float(trainer.compute_loss(trainer.model, batch)), rel=1e-5)


def test_the_loss_of_psft_is_its_formula_on_the_logits_of_transformers(three_steps, model):
    (*_, third), run = three_steps
    old, current = (log_probs(run / f"step_{step:07}_hf", model) for step in (1, 2))
    ratio = torch.exp(current - old)
    assert third["clip_fraction"] == pytest.approx(float((ratio > 1.28).double().mean()))
    assert 0.02 < third["clip_fraction"] < 0.98
    assert third["loss"] == pytest.approx(-float(ratio.clamp(max=1.28).mean()), rel=1e-5)


def log_probs(folder: Path, model: Path) -> torch.Tensor:
    """Of all label tokens of the batch."""
    network = oracle.load_model(folder)
    with torch.no_grad():
        return torch.cat([oracle.label_statistics(network, *example)[0] for example in examples(model)])


def test_the_untouched_model_has_not_drifted(three_steps):
    (start, *_, last), _ = three_steps
    assert (start["step"], start["drift"]) == (0, 0)
    assert last["drift"] > 0.01
