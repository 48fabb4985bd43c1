"""Preference pairs: the loss by hand, the trainer against an independent loop and against TRL."""

import functools
import json
import random
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer

from megatron_psft.cli.rollout import main as rollout
from megatron_psft.config.lora import LoraConfig
from megatron_psft.config.schema import ObjectiveConfig
from megatron_psft.hf.adapter import AdapterBase, RandomAdapters, write_adapter
from megatron_psft.hf.mapping import Piece, adapter_tensors
from megatron_psft.metrics.drift import START_FILE
from megatron_psft.model.shape import read_shape
from megatron_psft.objectives.builtin.dpo import dpo_loss, pair_metrics
from megatron_psft.objectives.labels import LabelInputs, LabelStats, Records
from tests.support import oracle, tiny
from tests.support.cli import run_cli
from tests.support.layouts import LAYOUTS
from tests.support.parity import assert_same_logits
from tests.support.runs import forget_steps_from, metrics_of

STEPS, PAIRS, BETA = 4, 8, 0.3
COMPARED = ("loss", "margin", "accuracy", "chosen_log_probs", "rejected_log_probs", "grad_norm")


def context_of(ids: list[int], ref_log_probs: Tensor, num_records: int) -> LabelInputs:
    counts = torch.bincount(torch.tensor(ids), minlength=num_records)
    records = Records(ids=torch.tensor(ids), label_counts=counts, add_up=lambda values: values)
    return LabelInputs(ref_log_probs=ref_log_probs, records=records)


@given(
    counts=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
    beta=st.floats(0.01, 2),
    seed=st.integers(0, 2**16),
)
def test_the_losses_of_tokens_are_the_loss_of_their_pair(counts, beta, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = [record for pair, sides in enumerate(counts) for side in (0, 1) for record in [2 * pair + side] * sides[side]]
    random.Random(seed).shuffle(ids)
    log_probs = -torch.rand(len(ids), generator=generator, dtype=torch.float64).requires_grad_()
    ref_log_probs = -torch.rand(len(ids), generator=generator, dtype=torch.float64)
    stats, given = LabelStats(log_probs, torch.zeros(len(ids))), context_of(ids, ref_log_probs, 2 * len(counts))
    config = ObjectiveConfig(objective="dpo", dpo_beta=beta)
    (found,) = torch.autograd.grad(dpo_loss(stats, given, config).sum(), log_probs)

    ratios = [
        (log_probs - ref_log_probs)[[i for i, of in enumerate(ids) if of == record]].sum()
        for record in range(2 * len(counts))
    ]
    margins = [beta * (chosen - rejected) for chosen, rejected in zip(ratios[::2], ratios[1::2], strict=True)]
    expected = sum(torch.log1p(torch.exp(-margin)) for margin in margins)
    (wanted,) = torch.autograd.grad(expected, log_probs)
    torch.testing.assert_close(dpo_loss(stats, given, config).sum(), expected)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(pair_metrics(stats, given, config).margin, torch.stack(margins).detach())


def test_a_pair_by_hand():
    """Two labels against one: the margin is 2 * ((-1 - 2 + 3.5) - (-0.5 + 0.25)) = 1.5."""
    log_probs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    given = context_of([0, 0, 1], torch.tensor([-1.5, -2.0, -0.25]), 2)
    stats, config = LabelStats(log_probs, torch.zeros(3)), ObjectiveConfig(objective="dpo", dpo_beta=2.0)
    metrics = pair_metrics(stats, given, config)
    assert [column.item() for column in metrics] == [1.5, 1.0, -3.0, -0.5]
    loss = dpo_loss(stats, given, config).sum()
    assert loss.item() == pytest.approx(0.2014133)
    loss.backward()
    slope = 2 * 0.1824255  # sigmoid(-1.5)
    assert log_probs.grad.tolist() == pytest.approx([-slope, -slope, slope], rel=1e-6)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("preference")
    tiny.build_model(folder / "model", "qwen2", tied=False)
    tiny.build_tokenizer(folder / "tokenizer")
    tiny.write_records(folder / "records.jsonl", 3 * PAIRS, max_exchanges=1)
    contents = [[m["content"] for m in json.loads(line)["messages"][-2:]] for line in (folder / "records.jsonl").open()]
    with (folder / "pairs.jsonl").open("w") as file:
        for index in range(PAIRS):
            (prompt, chosen), (_, rejected) = contents[3 * index : 3 * index + 2]
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    return folder


def pairs_of(folder: Path) -> list[tuple[oracle.Example, oracle.Example]]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").open()]
    return [
        tuple(
            oracle.chatml_example(
                [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}], tokenizer
            )
            for side in ("chosen", "rejected")
        )
        for row in rows
    ]


@functools.cache
def expected(
    folder: Path, steps: int = STEPS, adapter: Path | None = None
) -> tuple[list[dict[str, float]], torch.nn.Module]:
    """DPO from its formula, all pairs in each step; of an `adapter` that `peft` trains, without which is the
    reference."""
    pairs = pairs_of(folder)
    model = oracle.load_model(folder / "model")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    optimizer = torch.optim.AdamW(oracle._parameter_groups(model, 0.1), betas=(0.9, 0.999), eps=1e-8)

    def sequence_log_probs(of: torch.nn.Module) -> Tensor:
        return torch.stack([torch.stack([oracle.label_statistics(of, *side)[0].sum() for side in p]) for p in pairs])

    with torch.no_grad(), nullcontext() if adapter is None else model.disable_adapter():
        anchor = sequence_log_probs(model)
    history = []
    for _ in range(steps):
        log_probs = sequence_log_probs(model)
        ratio = log_probs - anchor
        margin = BETA * (ratio[:, 0] - ratio[:, 1])
        loss = torch.log1p(torch.exp(-margin)).mean()
        loss.backward()
        grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        for group in optimizer.param_groups:
            group["lr"] = oracle.PARITY_LR
        optimizer.step()
        optimizer.zero_grad()
        accuracy = (margin > 0).float().mean()
        means = (loss, margin.mean(), accuracy, *log_probs.mean(dim=0))
        history.append({**dict(zip(COMPARED, (mean.item() for mean in means), strict=False)), "grad_norm": grad_norm})
    return history, model


def train(pool, folder: Path, save: Path, layout: str, *flags: str) -> list[dict[str, float]]:
    parallel = LAYOUTS[layout]
    argv = ["--load-hf", folder / "model", "--tokenizer", folder / "tokenizer", "--data", folder / "pairs.jsonl"]
    argv += ["--objective", "dpo", "--dpo-beta", BETA, "--save", save, "--export-hf", save / "hf", "--no-shuffle"]
    argv += ["--lr", oracle.PARITY_LR, "--lr-decay-style", "constant", "--seq-length", "256", *parallel.flags, *flags]
    exits = pool.run(run_cli, parallel.world_size, [str(value) for value in argv])
    assert [exit.code for exit in exits] == [0] * parallel.world_size, exits[0].err
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


UNPACKED = ("--no-packing", "--global-batch-size", str(PAIRS), "--micro-batch-size", "2")
ONE_PACK = ("--global-batch-size", "1", "--seq-length", "1024")
RECORDS = ("--global-batch-size", str(PAIRS), "--global-batch-unit", "records")


def assert_same_preferences(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    for line, oracle_line in zip(found, wanted, strict=True):
        for name in COMPARED:
            # Before the first update the margin is the rounding between two ways to compute one number.
            if line["step"] > 1 or name not in ("margin", "accuracy"):
                assert line[name] == pytest.approx(oracle_line[name], rel=1e-4), (line["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "flags"),
    [
        ("one", UNPACKED),
        ("one", (*UNPACKED, "--no-fused-head")),
        ("one", ONE_PACK),
        ("DP2-overlap", UNPACKED),
        ("TP2-PP2", UNPACKED),
        pytest.param("TP2-SP-CP2", ONE_PACK, marks=pytest.mark.both),
        ("DP2-overlap", RECORDS),
    ],
    ids=["one", "plain-head", "packed", "dp2", "tp2-pp2", "packed-cp2-tp2", "records-dp2"],
)
def test_dpo_follows_the_oracle(pool, inputs, tmp_path, layout, flags):
    wanted, model = expected(inputs)
    found = train(pool, inputs, tmp_path, layout, "--train-iters", str(STEPS), *flags)
    assert_same_preferences(found, wanted)
    assert found[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert found[-1]["accuracy"] > 0.5
    assert_same_logits(tmp_path / "hf", model)


@pytest.fixture(scope="module")
def new_adapter(inputs) -> Path:
    """What a run of rank 6 starts from: A as it draws it, and no B."""
    shape, config = read_shape(inputs / "model"), LoraConfig(lora_rank=6, lora_alpha=12.0)
    source = RandomAdapters(shape, config, seed=1234)
    dims = adapter_tensors(shape, config)
    tensors = {name: source.read(Piece(name, (0, rows))) for name, (rows, _) in dims.items()}
    (inputs / "adapter").mkdir()
    write_adapter(inputs / "adapter", tensors, shape, config, AdapterBase(name=None, weights="the model"))
    return inputs / "adapter"


@pytest.fixture(scope="module")
def own_answers(inputs) -> Path:
    """Two answers of the model."""
    (inputs / "prompts.jsonl").write_text('{"prompt": "one two"}\n{"prompt": "three"}\n')
    given = {"model": inputs / "model", "tokenizer": inputs / "tokenizer", "prompts": inputs / "prompts.jsonl"}
    given |= {"out": inputs / "own.jsonl", "max-new-tokens": 8, "engine": "transformers"}
    assert rollout([*(str(part) for name, value in given.items() for part in (f"--{name}", value)), "--drift-set"]) == 0
    return inputs / "own.jsonl"


LORA = ("--lora-rank", "6", "--lora-alpha", "12")


def test_new_adapters_have_the_model_without_them_as_reference_at_any_time(
    pool, inputs, tmp_path, new_adapter, own_answers
):
    """DPO and drift; also in a run that goes on and has lost what the model at its start has said."""
    wanted, _ = expected(inputs, 12, new_adapter)
    flags = [*UNPACKED, *LORA, "--train-iters", "12", "--save-interval", "6", "--eval-interval", "6"]
    run, drift = tmp_path / "run", f"own={own_answers}"
    found = train(pool, inputs, run, "one", *flags, "--drift-data", drift)
    assert found[0]["drift/own"] == 0 < found[-1]["drift/own"]
    assert_same_preferences(found[1:], wanted)
    whole = metrics_of(run)
    forget_steps_from(run, 12)
    shutil.rmtree(run / "ref_log_probs")
    (run / START_FILE).unlink()
    train(pool, inputs, run, "one", *flags, "--drift-data", drift)
    assert metrics_of(run) == whole


@pytest.mark.slow
def test_the_loss_is_that_of_trl(pool, inputs, tmp_path):
    """TRL's own trainer, on the weights after two steps and the initial ones."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    train(pool, inputs, tmp_path / "two", "one", "--train-iters", "2", *UNPACKED)
    found = train(pool, inputs, tmp_path / "three", "one", "--train-iters", "3", *UNPACKED)[2]["loss"]
    examples = []
    for (ids, mask), (rejected_ids, _) in pairs_of(inputs):
        start = mask.index(True)
        # The newline behind the end of turn is no label here.
        sides = {"chosen_ids": ids[start:-1], "rejected_ids": rejected_ids[start:-1]}
        examples.append({"prompt_ids": ids[:start], **sides})
    tokenizer = AutoTokenizer.from_pretrained(inputs / "tokenizer")
    trainer = DPOTrainer(
        model=oracle.load_model(tmp_path / "two" / "hf"),
        ref_model=oracle.load_model(inputs / "model"),
        args=DPOConfig(output_dir=str(tmp_path / "trl"), beta=BETA, report_to=[], use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
    )
    batch = DataCollatorForPreference(pad_token_id=0)(examples)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    assert found == pytest.approx(loss.item(), rel=1e-5)
