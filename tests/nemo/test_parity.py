"""Megatron-Bridge's loop with PSFT against pretrain_psft.py: the same records, the same trajectory."""

import functools
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from megatron_psft.scoring.agreement import BOUNDS
from tests.nemo.bridge import SEQ_LENGTH, assert_same_run, needs_bridge, overrides_of, run_bridge
from tests.support import oracle, tiny
from tests.support.cli import run_cli
from tests.support.layouts import LAYOUTS
from tests.support.pool import WorkerError

pytestmark = [needs_bridge, pytest.mark.slow, pytest.mark.both]

STEPS, GLOBAL_BATCH_SIZE = 12, 8
VOCAB_SIZE = 212  # Bridge pads no vocabulary that a model brings along: two ranks must divide it
BRIDGE_LAYOUTS = ("one", "TP2-SP", "PP2", "DP2-overlap")


def write_tokenizer(folder: Path) -> None:
    """With a template that says where labels are: without, Bridge's labels go on to the line's end after a turn's."""
    path = tiny.build_tokenizer(folder) / "chat_template.jinja"
    turn = "{{ message['content'] }}<|im_end|>"
    labelled = f"{{% if message['role'] == 'assistant' %}}{{% generation %}}{turn}{{% endgeneration %}}"
    template = tiny.CHATML.replace(turn, f"{labelled}{{% else %}}{turn}{{% endif %}}")
    assert path.read_text() == tiny.CHATML
    path.write_text(template)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A model per family, a tokenizer, and the records of all steps, where Bridge looks for them."""
    folder = tmp_path_factory.mktemp("nemo")
    for family in ("qwen2", "qwen3"):
        tiny.build_model(folder / family, family, tied=family == "qwen3", vocab_size=VOCAB_SIZE)
    # Bridge does not read which layers have no experts.
    tiny.build_model(folder / "qwen3_moe", "qwen3_moe", mlp_only_layers=[], vocab_size=VOCAB_SIZE)
    write_tokenizer(folder / "tokenizer")
    (folder / "data").mkdir()
    tiny.write_records(folder / "data" / "training.jsonl", STEPS * GLOBAL_BATCH_SIZE)
    return folder


@pytest.fixture(scope="session")
def expected(pool, inputs, tmp_path_factory):
    """What pretrain_psft.py says of each step, for a family of models."""

    @functools.cache
    def train(family: str, *flags: str) -> list[dict[str, float]]:
        save = tmp_path_factory.mktemp(family)
        argv = ["--load-hf", inputs / family, "--tokenizer", inputs / "tokenizer", "--save", save]
        argv += [] if "--data" in flags else ["--data", inputs / "data" / "training.jsonl"]
        argv += ["--train-iters", STEPS, "--no-shuffle", "--no-packing"]
        argv += ["--global-batch-size", GLOBAL_BATCH_SIZE, "--micro-batch-size", 2]
        argv += ["--lr", oracle.PARITY_LR, "--lr-decay-style", "constant", "--seq-length", SEQ_LENGTH]
        argv += [] if "--objective" in flags else ["--old-policy-interval", 4]  # no use otherwise
        argv += flags
        (exit,) = pool.run(run_cli, 1, [str(value) for value in argv])
        assert exit.code == 0, exit.err
        return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]

    return train


@pytest.fixture
def bridge_run(bridge_pool, inputs, tmp_path):
    """What Bridge says of each step, of a run that saves below `tmp_path`."""

    def train(family: str, *overrides: str, layout: str = "one", **planted: float | str) -> list[dict[str, float]]:
        own = [f"train.train_iters={STEPS}", f"train.global_batch_size={GLOBAL_BATCH_SIZE}", "train.micro_batch_size=2"]
        own += ["psft.old_policy_interval=4", f"optimizer.lr={oracle.PARITY_LR}", "checkpoint.save=null"]
        paths = {"model": inputs / family, "tokenizer": inputs / "tokenizer", "data": inputs / "data"}
        nproc, overridden = LAYOUTS[layout].world_size, [*own, *overrides_of(layout), *overrides]
        return run_bridge(bridge_pool, tmp_path, **paths, overrides=overridden, nproc=nproc, **planted)

    return train


CASES = [
    ("qwen2", "one"),
    *(("qwen3", layout) for layout in BRIDGE_LAYOUTS),
    ("qwen3_moe", "DP2-EP2"),
]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_bridge_follows_the_trainer(bridge_run, expected, family, layout):
    wanted = expected(family)
    assert sum(line["clip_fraction"] > 0.1 for line in wanted) >= 6, "the clip must matter in this comparison"
    assert_same_run(bridge_run(family, layout=layout), wanted)


def test_bridge_trains_adapters_of_its_own_as_the_trainer_does(bridge_run, expected, inputs):
    """LoRA, from the same A and B."""
    torch.manual_seed(5)
    targets = ["o_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(inputs / "qwen2", dtype=torch.float32)
    adapter = str(inputs / "adapter")
    get_peft_model(model, config).save_pretrained(adapter)
    flags = ("--lora-rank", "4", "--lora-alpha", "8", "--lora-targets", *targets, "--load-lora", adapter)
    wanted = expected("qwen2", *flags)
    assert sum(line["clip_fraction"] > 0.1 for line in wanted) >= 4, "the clip must matter in this comparison"
    assert_same_run(bridge_run("qwen2", adapter=adapter), wanted)
    with pytest.raises(WorkerError, match=r"peft.dropout \(0.1\) must be 0.0: the two passes of one policy must agree"):
        bridge_run("qwen2", adapter=adapter, dropout=0.1)


OTHERS = {
    "warm-up": ("--sft-warmup-iters 3", "psft.sft_warmup_iters=3"),
    "fixed": ("--old-policy-interval fixed", "psft.old_policy_interval=fixed"),
    "plain head": ("--no-fused-head", "psft.fused_head=false"),
    "dft": ("--objective dft", "psft.objective=dft"),
    "eaft": ("--objective eaft", "psft.objective=eaft"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_settings_mean_what_they_mean_to_the_trainer(bridge_run, expected, name):
    flags, override = OTHERS[name]
    wanted = expected("qwen2", *flags.split())
    default = expected("qwen2")
    if name != "plain head":
        assert any(
            line["loss"] != pytest.approx(other["loss"], rel=1e-3) for line, other in zip(wanted, default, strict=True)
        )
    assert_same_run(bridge_run("qwen2", override), wanted)


def test_shuffled_epochs_are_read_ahead_in_their_order(bridge_run, inputs, expected, tmp_path):
    """Bridge's loader for fine-tuning, over two epochs, against the records in its order."""
    records = (inputs / "data" / "training.jsonl").read_text().splitlines(keepends=True)
    half = records[: len(records) // 2]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "training.jsonl").write_text("".join(half))
    seed = 1234  # of GPTSFTDatasetConfig
    orders = [torch.randperm(len(half), generator=torch.Generator().manual_seed(seed + epoch)) for epoch in (0, 1)]
    (tmp_path / "in_order.jsonl").write_text("".join(half[index] for index in torch.cat(orders).tolist()))
    wanted = expected("qwen2", "--data", str(tmp_path / "in_order.jsonl"))
    overrides = ["dataset.dataloader_type=batch", f"dataset.dataset_root={tmp_path / 'data'}"]
    assert_same_run(bridge_run("qwen2", *overrides), wanted)


def test_run_resumes_within_a_window(bridge_run, expected, tmp_path):
    """Two steps into a window of four; the weights of the window's begin are gone."""
    overrides = [f"checkpoint.save={tmp_path}", f"checkpoint.load={tmp_path}"]
    first = bridge_run("qwen2", *overrides, "train.exit_interval=6", layout="DP2")
    assert len(first) == 6
    assert_same_run(bridge_run("qwen2", *overrides, layout="DP2"), expected("qwen2"))


@pytest.mark.parametrize("layout", ["one", "PP2"])
def test_the_scoring_check_is_made_once_and_its_metrics_are_logged(bridge_run, tmp_path, layout):
    folder = tmp_path / "events"
    bridge_run("qwen2", f"logger.tensorboard_dir={folder}", "train.train_iters=6", layout=layout)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    (largest,), (p99,) = events.Scalars("scoring_gap_max"), events.Scalars("scoring_gap_p99")
    assert (largest.step, p99.step) == (1, 1)
    assert 0 <= p99.value <= largest.value <= BOUNDS["fp32"].largest
    assert [(scalar.step, scalar.value) for scalar in events.Scalars("window_step")] == [
        (step + 1, step % 4) for step in range(6)
    ]


def test_a_planted_disagreement_ends_the_run(bridge_run, tmp_path):
    """Attention of the pass has another scale than that of training."""
    with pytest.raises(WorkerError, match="step 1: the old policy's pass and training disagree about the same weights"):
        bridge_run("qwen2", f"checkpoint.save={tmp_path}", "checkpoint.save_interval=1", attention=0.0)
    assert not list(tmp_path.glob("iter_*"))


def test_evaluation_is_of_cross_entropy(bridge_run, inputs, expected, tmp_path):
    """And training is none the wiser."""
    records = (inputs / "data" / "training.jsonl").read_text().splitlines(keepends=True)[:GLOBAL_BATCH_SIZE]
    data = tmp_path / "data"
    data.mkdir()
    (data / "training.jsonl").symlink_to(inputs / "data" / "training.jsonl")
    (data / "validation.jsonl").write_text("".join(records * 4))
    flags = ["--valid-data", str(inputs / "valid.jsonl"), "--eval-interval", "6"]
    (inputs / "valid.jsonl").write_text("".join(records))
    overrides = [f"dataset.dataset_root={data}", "dataset.do_validation=true", "validation.eval_interval=6"]
    found = bridge_run("qwen2", *overrides, "validation.eval_iters=1")
    wanted = expected("qwen2", *flags)[1:]  # Bridge's loop evaluates nothing before the first step
    evaluations = [line for line in found if "valid" in line]
    assert_same_run([line for line in found if "valid" not in line], wanted)
    for line, wanted_line in zip(evaluations[:2], (wanted[5], wanted[11]), strict=True):
        assert line["valid"] == pytest.approx(wanted_line["valid_nll"], rel=1e-5)
        assert line["entropy"] == pytest.approx(wanted_line["valid_entropy"], rel=1e-5)
