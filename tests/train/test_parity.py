"""The trainer against an independent oracle: plain PyTorch and transformers, one process, fp32."""

import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from megatron_psft.data.packing import best_fit
from tests.support import oracle, tiny
from tests.support.cli import REPOSITORY, run_cli
from tests.support.converting import tensors_of
from tests.support.layouts import LAYOUTS
from tests.support.marks import slow
from tests.support.parity import assert_same_logits, assert_same_run

STEPS, GLOBAL_BATCH_SIZE = 12, 8
FEW_STEPS = 6
"""A window, and half of the next: enough where what is compared differs at once or never."""

PARITY_LAYOUTS = (
    "one",
    "TP2",
    "TP2-SP",
    "PP2",
    "PP2-VPP1",
    "CP2",
    "DP2-distopt",
    "DP2-reduce",
    "DP2-overlap",
    "PP2-DP2-VPP1-overlap",
    "TP2-PP2",
    "TP2-SP-PP2-DP2-distopt",
)
PACKED_LAYOUTS = (
    *("one", "TP2", "TP2-SP", "PP2", "DP2-distopt", "DP2-overlap", "CP2"),
    *("CP4", "TP2-SP-CP2", "PP2-CP2-DP2-distopt"),
)
QUICK_EXPERT_LAYOUT = "DP2-EP2"
SLOW_EXPERT_LAYOUTS = (
    "one",
    "TP2-SP-DP2-EP2",
    "DP2-EP2-overlap",
    "TP2-SP-EP2-ETP1",
    "PP2-DP2-EP2",
    "PP2-DP2-EP2-VPP1",
    "TP2-SP-PP2-DP2-EP2-overlap",
)
COUNTS = {8: "eight", 10: "ten", 12: "twelve"}
PACK_LENGTH = 256
PSFT = {"old_policy_interval": 4}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """One folder with a model per family, a tokenizer and records."""
    folder = tmp_path_factory.mktemp("parity")
    for family in (*tiny.FAMILIES, *tiny.MOE_FAMILIES, *tiny.VARIANTS, *tiny.VISION_FAMILIES):
        tiny.build_model(folder / family, family, tied=family in ("qwen3", "qwen3_vl"))
    tiny.build_tokenizer(folder / "tokenizer")
    tiny.write_records(folder / "records.jsonl", 40)
    return folder


@functools.cache
def expected(
    inputs: Path, family: str, steps: int = STEPS, **objective
) -> tuple[list[dict[str, float]], torch.nn.Module]:
    """The oracle's metrics and trained model."""
    tokenizer = AutoTokenizer.from_pretrained(inputs / "tokenizer")
    batches = oracle.chatml_batches(inputs / "records.jsonl", tokenizer, GLOBAL_BATCH_SIZE, steps)
    return oracle.train(inputs / family, batches, lr=oracle.PARITY_LR, **objective)


@functools.cache
def expected_of_packs(inputs: Path, family: str) -> tuple[list[dict[str, float]], torch.nn.Module]:
    """The same for batches of two packs each; which records share a pack is all that the package is asked for."""
    tokenizer = AutoTokenizer.from_pretrained(inputs / "tokenizer")
    (records,) = oracle.chatml_batches(inputs / "records.jsonl", tokenizer, 40, 1)
    packs = best_fit(np.array([len(ids) - 1 for ids, _ in records]), PACK_LENGTH).file_order()
    batches = [
        [records[record] for pack in (2 * step, 2 * step + 1) for record in packs[pack % len(packs)]]
        for step in range(FEW_STEPS)
    ]
    assert len({len(batch) for batch in batches}) > 1, "batches differ in their number of records"
    return oracle.train(inputs / family, batches, lr=oracle.PARITY_LR, **PSFT)


def train(
    pool, inputs: Path, family: str, save: Path, *flags: str, layout: str = "one", steps: int = FEW_STEPS
) -> list[dict[str, float]]:
    """Runs the command line and returns the lines of metrics.jsonl."""
    parallel = LAYOUTS[layout]
    argv = ["--load-hf", inputs / family, "--tokenizer", inputs / "tokenizer", "--data", inputs / "records.jsonl"]
    argv += ["--save", save, "--export-hf", save / "hf"]
    argv += ["--train-iters", steps, "--global-batch-size", GLOBAL_BATCH_SIZE]
    argv += ["--micro-batch-size", "2", "--lr", oracle.PARITY_LR, "--lr-decay-style", "constant"]
    argv += ["--no-shuffle", "--no-packing", *parallel.flags, *flags]
    exits = pool.run(run_cli, parallel.world_size, [str(value) for value in argv])
    assert [exit.code for exit in exits] == [0] * parallel.world_size, exits[0].err
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


OF_ALL_FAMILIES = ("TP2-SP", "PP2-VPP1")
"""Where what a family has of its own (biases, stretched frequencies, an untied head) is cut or moved; data and context
parallel ranks hold it whole. Below are TP2-PP2 with Qwen2's fixed old policy and with relatives of Llama's."""
CASES = [
    (family, layout)
    for family, layout in itertools.product(tiny.FAMILIES, PARITY_LAYOUTS)
    if family == "qwen3" or layout in OF_ALL_FAMILIES
]
QUICK = {("qwen3", "TP2-SP"), ("qwen3", "PP2-VPP1")}
ON_BOTH_LINES = {("qwen3", layout) for layout in ("one", "DP2-distopt", "DP2-overlap")}
QUICK_PACKED_LAYOUTS = ("CP2",)


DENSE_CASES = [case if case in QUICK else slow(*case, both=case in ON_BOTH_LINES) for case in CASES]
EXPERT_CASES = [
    ("qwen3_moe", QUICK_EXPERT_LAYOUT),
    *(slow("qwen3_moe", layout) for layout in SLOW_EXPERT_LAYOUTS),
    slow("mixtral", "TP2-SP-DP2-EP2"),
]
VARIANT_CASES = [slow("mistral", "TP2-SP", both=True), slow("qwen3-yarn", "PP2"), slow("qwen3_vl", "PP2", both=True)]
VISION_CASES = [slow("qwen2_5_vl", "TP2-SP", both=True)]


@pytest.mark.parametrize(("family", "layout"), DENSE_CASES)
def test_psft_follows_the_oracle(pool, inputs, tmp_path, family, layout):
    steps = STEPS if family == "qwen3" else FEW_STEPS
    wanted, model = expected(inputs, family, steps, **PSFT)
    assert sum(line["clip_fraction"] > 0.1 for line in wanted) >= steps / 2, "the clip must matter in this comparison"
    found = train(pool, inputs, family, tmp_path, "--old-policy-interval", "4", layout=layout, steps=steps)
    assert_same_run(found, wanted)
    assert_same_logits(tmp_path / "hf", model)
    for line in found[::4]:
        assert (line["ratio_mean"], line["ratio_max"], line["clip_fraction"], line["approx_kl"]) == (1.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize(("family", "layout"), EXPERT_CASES)
def test_a_mixture_of_experts_follows_the_oracle(pool, inputs, tmp_path, family, layout):
    wanted, model = expected(inputs, family, FEW_STEPS, **PSFT)
    assert sum(line["clip_fraction"] > 0.1 for line in wanted) >= 3, "the clip must matter in this comparison"
    found = train(pool, inputs, family, tmp_path, "--old-policy-interval", "4", layout=layout)
    assert_same_run(found, wanted)
    assert_same_logits(tmp_path / "hf", model)


@pytest.mark.parametrize(("family", "layout"), VARIANT_CASES)
def test_a_variant_follows_the_oracle(pool, inputs, tmp_path, family, layout):
    wanted, model = expected(inputs, family, FEW_STEPS, old_policy_interval=2)
    assert sum(line["clip_fraction"] > 0.02 for line in wanted) >= 2, "the clip must matter in this comparison"
    found = train(pool, inputs, family, tmp_path, "--old-policy-interval", "2", layout=layout)
    assert_same_run(found, wanted)
    assert_same_logits(tmp_path / "hf", model)


@pytest.mark.parametrize(("family", "layout"), VISION_CASES)
def test_the_language_model_of_one_that_sees_follows_the_oracle(pool, inputs, tmp_path, family, layout):
    """On text, where the positions of time, height and width are the same; what sees is as it was."""
    wanted, model = expected(inputs, family, **PSFT)
    assert sum(line["clip_fraction"] > 0.1 for line in wanted) >= 6, "the clip must matter in this comparison"
    found = train(pool, inputs, family, tmp_path, "--old-policy-interval", "4", layout=layout, steps=STEPS)
    assert_same_run(found, wanted)
    assert_same_logits(tmp_path / "hf", model)
    before, after = (tensors_of(folder) for folder in (inputs / family, tmp_path / "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], it) is name.startswith("visual.") for name, it in before.items())


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *(("qwen3", layout) if layout in QUICK_PACKED_LAYOUTS else slow("qwen3", layout) for layout in PACKED_LAYOUTS),
        slow("qwen3_moe", "DP2-EP2"),
        slow("qwen3_moe", "CP2-EP2"),
    ],
)
def test_packs_follow_the_oracle_on_their_records(pool, inputs, tmp_path, family, layout):
    wanted, model = expected_of_packs(inputs, family)
    assert sum(line["clip_fraction"] > 0.1 for line in wanted) >= 3, "the clip must matter in this comparison"
    flags = ["--old-policy-interval", "4", "--packing", "--seq-length", str(PACK_LENGTH)]
    flags += ["--global-batch-size", "2", "--micro-batch-size", "1"]
    found = train(pool, inputs, family, tmp_path, *flags, layout=layout)
    assert_same_run(found, wanted, rel=1e-5)
    assert_same_logits(tmp_path / "hf", model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout", "steps"),
    [
        ("qwen3", "DP2-overlap", STEPS),
        slow("qwen3", "TP2-SP", FEW_STEPS),
        slow("qwen3", "PP2-DP2-VPP1-overlap", FEW_STEPS),
        slow("qwen3", "CP2", FEW_STEPS),
        slow("qwen3", "PP2-CP2-DP2-distopt", FEW_STEPS),
        slow("qwen3_moe", "DP2-EP2-overlap", FEW_STEPS),
    ],
)
def test_steps_of_records_follow_the_oracle(pool, inputs, tmp_path, family, layout, steps):
    """The very loop that those without packing follow."""
    wanted, model = expected(inputs, family, steps, **PSFT)
    flags = ["--old-policy-interval", "4", "--packing", "--seq-length", str(PACK_LENGTH), "--micro-batch-size", "1"]
    flags += ["--global-batch-unit", "records", "--old-policy-micro-batch-size", "2"]
    found = train(pool, inputs, family, tmp_path, *flags, layout=layout, steps=steps)
    assert_same_run(found, wanted)
    assert_same_logits(tmp_path / "hf", model)


@pytest.mark.slow
def test_evaluation_of_packs_is_that_of_their_records(pool, inputs, tmp_path):
    """Each counts once, with empty packs at the end of the last batch, and a step that changes nothing before it."""
    flags = [
        "--valid-data",
        str(inputs / "records.jsonl"),
        "--eval-interval",
        "1",
        "--train-iters",
        "1",
        "--lr",
        "1e-12",
    ]
    pack = ["--packing", "--seq-length", str(PACK_LENGTH), "--micro-batch-size", "4"]
    records = train(pool, inputs, "qwen2", tmp_path / "records", *flags)
    packs = train(pool, inputs, "qwen2", tmp_path / "packs", *flags, *pack, layout="CP2")
    for name in ("valid_nll", "valid_entropy"):
        value = records[0][name]
        assert [line[name] for line in (*records, *packs)] == pytest.approx([value] * 4, rel=1e-6)


@pytest.mark.parametrize("layout", [slow("one"), slow("TP2-PP2")])
def test_fixed_old_policy_follows_the_oracle(pool, inputs, tmp_path, layout):
    wanted, model = expected(inputs, "qwen2", FEW_STEPS, old_policy_interval="fixed")
    found = train(pool, inputs, "qwen2", tmp_path, "--old-policy-interval", "fixed", layout=layout)
    assert_same_run(found, wanted)
    assert_same_logits(tmp_path / "hf", model)


@pytest.mark.parametrize("layout", ["one", slow("DP2-overlap")])
@pytest.mark.slow
def test_warm_up_comes_before_the_first_window(pool, inputs, tmp_path, layout):
    wanted, model = expected(inputs, "llama", 8, old_policy_interval=3, sft_warmup_iters=3)
    flags = ["--old-policy-interval", "3", "--sft-warmup-iters", "3"]
    found = train(pool, inputs, "llama", tmp_path, *flags, layout=layout, steps=8)
    assert_same_run(found, wanted)
    assert_same_logits(tmp_path / "hf", model)
    assert [line["clip_fraction"] > 0 for line in found] == [False, False, False, False, True, True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "TP2-SP"])
def test_sft_follows_the_oracle(pool, inputs, tmp_path, layout):
    wanted, model = expected(inputs, "qwen3", FEW_STEPS, objective="sft")
    found = train(pool, inputs, "qwen3", tmp_path, "--objective", "sft", layout=layout)
    assert_same_run(found, wanted, has_old_policy=False)
    assert_same_logits(tmp_path / "hf", model)


@pytest.mark.parametrize(
    ("objective", "layout"),
    [slow("cadft", "DP2-overlap"), slow("dft", "TP2-PP2"), slow("sft-kl", "one"), slow("sft-kl", "TP2-PP2")],
)
def test_a_relative_follows_the_oracle(pool, inputs, tmp_path, objective, layout):
    wanted, model = expected(inputs, "llama", FEW_STEPS, objective=objective)
    found = train(pool, inputs, "llama", tmp_path, "--objective", objective, layout=layout)
    assert_same_run(found, wanted, has_old_policy=False)
    assert_same_logits(tmp_path / "hf", model)


@pytest.mark.parametrize(("family", "layout"), [("qwen2", "one"), slow("qwen3", "TP2-SP")])
@pytest.mark.slow
def test_without_the_fused_head_all_is_the_same(pool, inputs, tmp_path, family, layout):
    wanted, model = expected(inputs, family, FEW_STEPS, **PSFT)
    flags = ["--old-policy-interval", "4", "--no-fused-head"]
    found = train(pool, inputs, family, tmp_path, *flags, layout=layout)
    assert_same_run(found, wanted)
    assert_same_logits(tmp_path / "hf", model)


@pytest.mark.parametrize("layout", [slow("one"), slow("DP2-overlap")])
def test_the_old_policy_may_score_in_other_micro_batches(pool, inputs, tmp_path, layout):
    wanted, _ = expected(inputs, "qwen2", FEW_STEPS, **PSFT)
    flags = ["--old-policy-interval", "4", "--old-policy-micro-batch-size", "4"]
    found = train(pool, inputs, "qwen2", tmp_path, *flags, layout=layout)
    assert_same_run(found, wanted)
    assert [line["ratio_max"] for line in found[::4]] == [1.0, 1.0]


@pytest.mark.slow
def test_window_of_one_step_has_the_trajectory_of_sft(pool, inputs, tmp_path):
    sft = train(pool, inputs, "qwen2", tmp_path / "sft", "--objective", "sft")
    psft = train(pool, inputs, "qwen2", tmp_path / "psft", "--old-policy-interval", "1")
    for name in ("nll", "entropy", "grad_norm"):
        assert [line[name] for line in psft] == [line[name] for line in sft]
    assert {line["loss"] for line in psft} == {-1.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout", "flags"),
    [
        ("qwen3", "TP2-SP", "--recompute-granularity selective"),
        ("qwen3", "TP2-SP", "--recompute-granularity full --recompute-method block --recompute-num-layers 2"),
        (
            "qwen3_moe",
            "DP2-EP2-overlap",
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        ),
    ],
    ids=["selective", "block", "uniform"],
)
def test_recomputation_changes_nothing(pool, inputs, tmp_path, family, layout, flags):
    wanted, _ = expected(inputs, family, FEW_STEPS, **PSFT)
    found = train(pool, inputs, family, tmp_path, "--old-policy-interval", "4", *flags.split(), layout=layout)
    assert_same_run(found, wanted)


@pytest.mark.parametrize(
    ("family", "modules"), [slow("qwen3_moe", ["core_attn", "mlp", "moe"]), slow("qwen3", ["mlp"])]
)
def test_recomputation_of_parts_of_a_layer_changes_nothing(pool, inputs, tmp_path, family, modules):
    wanted, _ = expected(inputs, family, FEW_STEPS, **PSFT)
    flags = ["--old-policy-interval", "4", "--recompute-granularity", "selective", "--recompute-modules", *modules]
    found = train(pool, inputs, family, tmp_path, *flags, layout="PP2-DP2-EP2" if family == "qwen3_moe" else "PP2")
    assert_same_run(found, wanted)


@pytest.mark.slow
@pytest.mark.both
def test_bf16_follows_fp32_at_its_own_precision(pool, inputs, tmp_path):
    wanted, _ = expected(inputs, "llama", FEW_STEPS, **PSFT)
    found = train(pool, inputs, "llama", tmp_path, "--old-policy-interval", "4", "--bf16", layout="DP2-distopt")
    for line, oracle_line in zip(found, wanted, strict=True):
        assert line["nll"] == pytest.approx(oracle_line["nll"], rel=0.02)
        assert line["entropy"] == pytest.approx(oracle_line["entropy"], rel=0.02)
    assert [line["ratio_max"] for line in found[::4]] == [1.0, 1.0]
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as exported:
        assert exported.get_tensor("model.norm.weight").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        slow("qwen2", "one"),
        slow("qwen2", "TP2-SP"),
        ("qwen2", "PP2-VPP1"),
        slow("qwen2", "DP2-overlap"),
        slow("qwen3_moe", "DP2-EP2-overlap"),
    ],
)
def test_the_old_policy_scores_bit_for_bit_what_training_does(pool, inputs, tmp_path, family, layout):
    """So that the shortcut r = 1 in a window's first step hides no difference. The pass chooses the same experts."""
    flags = ["--old-policy-interval", "4", "--check-scoring", "--packing", "--seq-length", str(PACK_LENGTH)]
    found = train(pool, inputs, family, tmp_path, *flags, layout=layout)
    gaps = [line.get("scoring_gap_max") for line in found]
    assert gaps == [0.0, None, None, None, 0.0, None]


@pytest.mark.slow
def test_passes_in_other_micro_batches_agree_up_to_rounding(pool, inputs, tmp_path):
    flags = ["--old-policy-interval", "4", "--check-scoring", "--old-policy-micro-batch-size", "4"]
    found = train(pool, inputs, "qwen2", tmp_path, *flags)
    assert max(line["scoring_gap_max"] for line in found[::4]) < 1e-5


@pytest.mark.parametrize("page", ["docs/index.md", "docs/limits.md", "docs/parallelism.md"])
def test_a_page_counts_these_layouts(page):
    groups = {"dense": PARITY_LAYOUTS, "packed": PACKED_LAYOUTS, "expert": (QUICK_EXPERT_LAYOUT, *SLOW_EXPERT_LAYOUTS)}
    dense, packed, expert = (f"{COUNTS[len(layouts)]} {name}" for name, layouts in groups.items())
    text = " ".join((REPOSITORY / page).read_text(encoding="utf-8").split())
    assert f"{dense}, {packed} and {expert} layouts" in text


def test_the_readme_says_what_is_compared():
    text = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    assert f"clip fraction of {STEPS} steps agree within 1e-4 relative" in text
    assert f"in {COUNTS[len(PARITY_LAYOUTS)]} layouts up to TP2 x PP2 x DP2" in text
