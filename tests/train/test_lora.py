"""Training of adapters against `peft` in the oracle's loop: one process, fp32."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_psft.checkpoint.folders import step_folders
from tests.support import oracle, tiny
from tests.support.cli import run_cli
from tests.support.converting import assert_refused, assert_same_tensors, convert, converted
from tests.support.layouts import LAYOUTS
from tests.support.marks import slow
from tests.support.parity import COMPARED, assert_same_logits, assert_same_run
from tests.support.runs import forget_steps_from, metrics_of

__all__ = ["convert", "converted"]  # the fixtures

STEPS, GLOBAL_BATCH_SIZE, RANK, ALPHA = 6, 8, 6, 12
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LORA = ("--lora-rank", str(RANK), "--lora-alpha", str(ALPHA))


def targets_of(family: str) -> tuple[str, ...]:
    """Experts have no adapters."""
    return OF_ATTENTION if family == "qwen3_moe" else TARGETS


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """One folder with a model per family, a tokenizer, records, and adapters whose B is not zero."""
    folder = tmp_path_factory.mktemp("lora")
    for family in (*tiny.FAMILIES, "qwen3_moe"):
        tiny.build_model(folder / family, family, tied=family == "qwen3")
        # With which no token lies on the clip bound, or between two experts, up to rounding.
        torch.manual_seed(7 if family == "qwen3_moe" else 5)
        model = AutoModelForCausalLM.from_pretrained(folder / family, dtype=torch.float32)
        config = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=list(targets_of(family)),
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        )
        get_peft_model(model, config).save_pretrained(folder / f"{family}-adapter")
    tiny.build_tokenizer(folder / "tokenizer")
    tiny.write_records(folder / "records.jsonl", 40)
    return folder


@functools.cache
def expected(inputs: Path, family: str, **objective):
    """The oracle's metrics and trained model."""
    tokenizer = AutoTokenizer.from_pretrained(inputs / "tokenizer")
    batches = oracle.chatml_batches(inputs / "records.jsonl", tokenizer, GLOBAL_BATCH_SIZE, STEPS)
    adapter = inputs / f"{family}-adapter"
    return oracle.train(inputs / family, batches, lr=oracle.PARITY_LR, adapter=adapter, **objective)


def train(pool, inputs: Path, family: str, save: Path, *flags: object, layout: str = "one", code: int = 0):
    """Runs the command line and returns the lines of metrics.jsonl, or of a run that fails its message."""
    parallel = LAYOUTS[layout]
    argv = ["--load-hf", inputs / family, "--tokenizer", inputs / "tokenizer", "--data", inputs / "records.jsonl"]
    argv += ["--save", save, "--train-iters", STEPS, "--global-batch-size", GLOBAL_BATCH_SIZE]
    argv += ["--micro-batch-size", "2", "--lr", oracle.PARITY_LR, "--lr-decay-style", "constant"]
    argv += ["--no-shuffle", "--no-packing", *parallel.flags, *flags]
    exits = pool.run(run_cli, parallel.world_size, [str(value) for value in argv])
    assert [exit.code for exit in exits] == [code] * parallel.world_size, exits[0].err
    if code:
        return exits[0].err
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3", "TP2-SP"),
        slow("qwen2", "TP2"),
        slow("llama", "PP2-VPP1"),
        slow("qwen2", "CP2"),
        slow("llama", "DP2-distopt"),
        slow("qwen3", "TP2-PP2"),
        slow("qwen3_moe", "DP2-EP2"),
    ],
)
def test_psft_of_adapters_follows_peft(pool, inputs, tmp_path, family, layout):
    wanted, model = expected(inputs, family, old_policy_interval=4)
    flags = [*LORA, "--load-lora", inputs / f"{family}-adapter", "--old-policy-interval", 4]
    flags += ["--lora-targets", *targets_of(family)]
    found = train(pool, inputs, family, tmp_path, *flags, "--export-hf", tmp_path / "hf", layout=layout)
    assert sum(line["clip_fraction"] > 0.1 for line in wanted) >= 2, "the clip must matter in this comparison"
    assert_same_run(found, wanted)
    base = AutoModelForCausalLM.from_pretrained(inputs / family, dtype=torch.float32)
    exported = PeftModel.from_pretrained(base, tmp_path / "hf").merge_and_unload()
    exported.save_pretrained(tmp_path / "merged")
    assert_same_logits(tmp_path / "merged", model)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


RUN = (*LORA, "--lora-targets", "q_proj,gate_proj,down_proj", "--old-policy-interval", 2, "--train-iters", 4)


@pytest.fixture(scope="module")
def finished(pool, inputs, tmp_path_factory) -> Path:
    """A folder with a run, and its export."""
    folder = tmp_path_factory.mktemp("finished")
    export = ["--export-hf", folder / "adapter", "--save-interval", 2]
    train(pool, inputs, "qwen2", folder / "run", *RUN, *export)
    assert any(tensor.any() for name, tensor in adapter_of(folder / "adapter").items() if "lora_B" in name)
    return folder


def test_a_resumed_run_is_that_run_bit_for_bit_and_another_base_is_refused(pool, inputs, finished, tmp_path):
    """In another layout up to rounding; a checkpoint has the adapters alone."""
    run, resumed = RUN, tmp_path / "resumed"
    shutil.copytree(finished / "run", resumed)
    forget_steps_from(resumed, 4)
    train(pool, inputs, "qwen2", resumed, *run, "--export-hf", tmp_path / "again")
    assert_same_tensors(tmp_path / "again", finished / "adapter")
    assert metrics_of(resumed) == metrics_of(finished / "run")
    stored = sum(path.stat().st_size for path in (resumed / "step_0000004").iterdir())
    weights = (inputs / "qwen2" / "model.safetensors").stat().st_size
    assert stored < weights, "three numbers for each of an adapter, which is thin, beside none of the model"
    forget_steps_from(resumed, 4)
    tiny.build_model(tmp_path / "other", "qwen2", seed=9)
    message = train(pool, inputs, "qwen2", resumed, *run, "--load-hf", tmp_path / "other", code=2)
    assert re.search(r"error: .* had the weights that adapters stand beside \(\w+\), this one has \(\w+\); ", message)
    assert "; name its model by load_hf or init_from" in message
    message = train(pool, inputs, "qwen2", resumed, *run, "--lora-rank", 5, code=2)
    assert "had lora_rank 6, this one has lora_rank 5; use its settings, or another save folder" in message
    assert "start from an export of its adapters: --load-lora" in message
    message = train(pool, inputs, "qwen2", tmp_path / "new", *run, "--init-from", resumed, code=2)
    assert "holds adapters and not a model" in message


def test_a_checkpoint_is_converted_later_to_what_its_run_exports(converted, convert, inputs, finished, tmp_path):
    """As an adapter, and merged, which a run can start from."""
    source = ["--from-megatron", finished / "run", "--to-hf"]
    adapter = tmp_path / "adapter"
    result = convert(*source, adapter)
    assert (result.code, result.out) == (0, f"adapters of rank {RANK} as float32 in {adapter}\n"), result.err
    assert_same_tensors(adapter, finished / "adapter")
    ours, theirs = ((folder / "adapter_config.json").read_text() for folder in (adapter, finished / "adapter"))
    assert ours == theirs
    merged = converted(*source, tmp_path / "merged", "--lora-merge")
    base = AutoModelForCausalLM.from_pretrained(inputs / "qwen2", dtype=torch.float32)
    assert_same_logits(merged, PeftModel.from_pretrained(base, adapter).merge_and_unload(), atol=1e-6)
    assert convert(*source, merged, "--lora-merge", "--check").code == 0
    checkpoint = converted(*source[:2], "--to-megatron", tmp_path / "checkpoint", "--lora-merge")
    assert_same_tensors(converted("--from-megatron", checkpoint, "--to-hf", tmp_path / "back"), merged)
    again = tmp_path / "again"
    assert convert(*source, again, "--load-hf", shutil.copytree(inputs / "qwen2", tmp_path / "copy")).code == 0
    assert_same_tensors(again, adapter)
    tiny.build_model(tmp_path / "other", "qwen2", seed=9)
    for argv, message in (
        (
            [*source, tmp_path / "a", "--lora-merge", "--load-hf", tmp_path / "other"],
            "name the model that they were trained on",
        ),
        ([*source, tmp_path / "a", "--load-hf", tmp_path / "other"], "trained on, or leave load_hf out"),
        ([*source[:2], "--to-megatron", tmp_path / "a"], "holds adapters; add --lora-merge"),
        ([*source, adapter, "--check"], "holds adapters; add --lora-merge"),
        ([*source, tmp_path / "a", "--max-shard-gb", "1"], "max_shard_gb (1.0) has no effect on an adapter"),
        (
            ["--from-megatron", checkpoint, "--to-hf", tmp_path / "a", "--lora-merge"],
            "lora_merge (True) needs adapters",
        ),
    ):
        assert_refused(convert(*argv), message)
        assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout(pool, inputs, tmp_path):
    run = [*LORA, "--load-lora", inputs / "qwen3-adapter", "--old-policy-interval", 4, "--save-interval", 3]
    whole = train(pool, inputs, "qwen3", tmp_path / "whole", *run, layout="DP2-distopt")
    forget_steps_from(tmp_path / "whole", 4)
    flags = ["--use-distributed-optimizer"]
    again = train(pool, inputs, "qwen3", tmp_path / "whole", *run, *flags, layout="TP2-SP")
    assert [line["step"] for line in again] == [line["step"] for line in whole]
    for name in COMPARED:
        assert [line[name] for line in again] == pytest.approx([line[name] for line in whole], rel=1e-4)


def test_settings_that_contradict_each_other(pool, inputs, tmp_path):
    for flags, message in (
        (["--lora-merge"], "lora_merge (True) has no effect without lora_rank; change one of them"),
        ([*LORA, "--lora-merge"], "lora_merge (True) has no effect without export_hf or export_interval"),
        (["--load-lora", tmp_path], "needs lora_rank, lora_alpha and lora_targets as its adapter_config.json has them"),
        ([*LORA, "--lora-dropout", "0.1"], "adapters have no dropout, as two passes of one policy would disagree"),
        ([*LORA, "--resize-vocab"], "resize_vocab (True) adds rows that are not trained with lora_rank"),
    ):
        said = train(pool, inputs, "qwen2", tmp_path / "run", *flags, code=2)
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert message in line


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "sft-kl"])
def test_other_objectives_of_adapters_follow_peft(pool, inputs, tmp_path, objective):
    """The reference is the model at the start, with the adapter that the run starts from; with another one, another."""
    wanted, _ = expected(inputs, "qwen2", objective=objective)
    flags = [*LORA, "--objective", objective, "--save-interval", 1, "--load-lora"]
    found = train(pool, inputs, "qwen2", tmp_path, *flags, inputs / "qwen2-adapter")
    assert_same_run(found, wanted, has_old_policy=False)
    for folder in step_folders(tmp_path):
        shutil.rmtree(folder)
    other = shutil.copytree(inputs / "qwen2-adapter", tmp_path / "adapter")
    tensors = {name: 2 * tensor for name, tensor in adapter_of(other).items()}
    save_file(tensors, other / "adapter_model.safetensors")
    first, *_ = train(pool, inputs, "qwen2", tmp_path, *flags, other, "--train-iters", 1)
    assert first["loss"] == pytest.approx(first["nll"], rel=1e-6), "no distance from the reference yet"


@pytest.mark.slow
def test_adapters_in_bf16_add_up_steps_that_bf16_would_lose(pool, inputs, tmp_path):
    """By their fp32 copies: from here on bf16 tells apart what differs by 2^-11, and a step is less than half of it."""
    start, lr = adapter_of(inputs / "qwen2-adapter"), 1e-4
    flags = [*LORA, "--load-lora", inputs / "qwen2-adapter", "--bf16", "--lr", lr, "--objective", "sft"]
    flags += ["--train-iters", 12, "--export-hf", tmp_path / "hf"]
    train(pool, inputs, "qwen2", tmp_path / "run", *flags)
    changed = {"lora_A": [], "lora_B": []}
    for name, found in adapter_of(tmp_path / "hf").items():
        is_coarse = start[name].abs() >= 2**-4
        assert found.dtype == torch.bfloat16
        assert lr < 2**-12
        changed[name.split(".")[-2]].append((found != start[name].bfloat16())[is_coarse])
    shares = [torch.cat(of_matrix).float().mean().item() for of_matrix in changed.values()]
    assert min(shares) > 0.2, shares


@pytest.mark.slow
def test_adapters_beside_the_weights_of_a_checkpoint(pool, inputs, converted, tmp_path):
    """Which every start reads again, and a merged export has, as recomputed layers' adapters are trained too."""
    train(pool, inputs, "llama", tmp_path / "whole", "--train-iters", 2, "--export-hf", tmp_path / "hf")
    recompute = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1]
    run = [*LORA, "--train-iters", 4, "--save-interval", 2, "--lora-merge", *recompute]
    first = [*run, "--init-from", tmp_path / "whole", "--export-hf", tmp_path / "merged"]
    later = ["--from-megatron", tmp_path / "run", "--to-hf", tmp_path / "later", "--lora-merge"]
    lines = train(pool, inputs, "llama", tmp_path / "run", *first)
    forget_steps_from(tmp_path / "run", 4)
    again = train(pool, inputs, "llama", tmp_path / "run", *first)
    of_folder = train(pool, inputs, "llama", tmp_path / "of-folder", *run[:-7], "--load-hf", tmp_path / "hf")
    for name in COMPARED:
        assert [line[name] for line in again] == [line[name] for line in lines]
        assert [line[name] for line in of_folder] == pytest.approx([line[name] for line in lines], rel=1e-5)
    assert_same_tensors(converted(*later), tmp_path / "merged")
    merged, start = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "hf"))
    changed = {name for name, tensor in start.items() if not torch.equal(tensor, merged[name])}
    assert changed == {name for name in start if name.split(".")[-2] in TARGETS}
