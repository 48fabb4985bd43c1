"""Adapters beside models from Megatron-Bridge, against `peft`."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.nemo import bridge_models
from tests.nemo.bridge import needs_bridge
from tests.support import oracle, tiny
from tests.support.cli import run_cli
from tests.support.layouts import LAYOUTS
from tests.support.parity import assert_same_logits, assert_same_run

pytestmark = [needs_bridge, pytest.mark.slow, pytest.mark.both]

STEPS, GLOBAL_BATCH_SIZE, INTERVAL, RANK, ALPHA = 4, 4, 4, 6, 12
OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = dict.fromkeys(("olmoe", "glm4_moe", "gpt_oss"), OF_ATTENTION)
TARGETS |= {"gemma3_text": (*OF_ATTENTION, "gate_proj", "up_proj", "down_proj")}


@pytest.fixture
def train(source_pool, tmp_path):
    def run(family, layout):
        argv = ["--load-hf", tmp_path / "model", "--tokenizer", tmp_path / "tokenizer", "--save", tmp_path / "save"]
        argv += ["--data", tmp_path / "records.jsonl", "--export-hf", tmp_path / "hf", "--save-interval", 3]
        argv += ["--train-iters", STEPS, "--global-batch-size", GLOBAL_BATCH_SIZE, "--micro-batch-size", 2]
        argv += ["--lr", oracle.PARITY_LR, "--lr-decay-style", "constant", "--old-policy-interval", INTERVAL]
        argv += ["--no-shuffle", "--no-packing", "--lora-rank", RANK, "--lora-alpha", ALPHA]
        argv += ["--load-lora", tmp_path / "adapter", "--lora-targets", *TARGETS[family], *LAYOUTS[layout].flags]
        exits = source_pool.run(run_cli, LAYOUTS[layout].world_size, [str(value) for value in argv])
        assert exits[0].code == 0, exits[0].err
        return [json.loads(line) for line in (tmp_path / "save" / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.mark.parametrize(
    ("family", "layout"),
    [("gemma3_text", "TP2-SP"), ("olmoe", "DP2-EP2"), ("glm4_moe", "PP2"), ("gpt_oss", "DP2-EP2")],
)
def test_psft_of_adapters_follows_peft(train, tmp_path, family, layout):
    """And goes on in one process, in the middle of a window."""
    model = bridge_models.build_model(tmp_path / "model", family)
    tokenizer = tiny.build_tokenizer(tmp_path / "tokenizer")
    records = tiny.write_records(tmp_path / "records.jsonl", STEPS * GLOBAL_BATCH_SIZE)
    torch.manual_seed(5)
    targets = list(TARGETS[family])
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False
    )
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    adapter.save_pretrained(tmp_path / "adapter")
    batches = oracle.chatml_batches(records, AutoTokenizer.from_pretrained(tokenizer), GLOBAL_BATCH_SIZE, STEPS)
    options = {"lr": oracle.PARITY_LR, "old_policy_interval": INTERVAL, "adapter": tmp_path / "adapter"}
    wanted, trained = oracle.train(model, batches, **options)
    assert all(line["clip_fraction"] > 0.02 for line in wanted[1:]), "the clip must matter in this comparison"
    for number, each in enumerate((layout, "one")):
        assert_same_run(train(family, each), wanted)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        PeftModel.from_pretrained(base, tmp_path / "hf").merge_and_unload().save_pretrained(
            tmp_path / f"merged{number}"
        )
        assert_same_logits(tmp_path / f"merged{number}", trained)
        shutil.rmtree(tmp_path / "hf")
        shutil.rmtree(tmp_path / "save" / "step_0000004")
