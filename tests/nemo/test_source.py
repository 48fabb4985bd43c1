"""`psft train` on models from Megatron-Bridge: the oracle's trajectory, and where a family is ours too, our own."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.nemo import bridge_models
from tests.nemo.bridge import needs_bridge
from tests.support import oracle, tiny
from tests.support.cli import run_cli
from tests.support.layouts import LAYOUTS, Layout
from tests.support.marks import slow
from tests.support.parity import assert_same_logits, assert_same_run

pytestmark = needs_bridge

STEPS, GLOBAL_BATCH_SIZE, INTERVAL = 4, 4, 2
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192
OF_BOTH = {"qwen2": {}, "qwen3": {"tied": True}, "llama": {"rope_parameters": LLAMA3}}
OF_BOTH |= {"qwen3_moe": {"mlp_only_layers": []}, "mistral": {}}
QUICK = ("qwen3", "gemma3_text")
ONE = Layout()


CASES = [
    ("qwen3", ONE),
    ("gemma3_text", ONE),
    *(slow("qwen3", LAYOUTS[layout], both=True) for layout in ("TP2-SP", "PP2", "DP2-overlap")),
    *(slow(it, LAYOUTS[layout], both=True) for it in ("qwen2", "llama", "mistral") for layout in ("TP2-SP", "PP2")),
    *(slow("gemma3_text", LAYOUTS[layout], both=True) for layout in ("TP2-SP", "PP2")),
    slow("gemma3_text-scaled", ONE, both=True),
    *(slow(it, LAYOUTS[layout], both=True) for it in ("qwen3_moe", "olmoe") for layout in ("DP2-EP2", "PP2")),
    *(slow("glm4_moe", LAYOUTS[layout], both=True) for layout in ("DP2-EP2", "PP2")),
    slow("glm4_moe-air", ONE, both=True),
    *(slow("deepseek_v3", LAYOUTS[layout], both=True) for layout in ("DP2-EP2", "PP2")),
    slow("deepseek_v3-yarn", ONE, both=True),
    *(slow("gpt_oss", LAYOUTS[layout], both=True) for layout in ("DP2-EP2", "PP2")),
    *(slow("qwen3_next", LAYOUTS[layout], both=True) for layout in ("TP2-SP-EP2-ETP1", "PP2")),
    *(slow("qwen3_5_text", LAYOUTS[layout], both=True) for layout in ("TP2-SP", "PP2")),
    *(slow("nemotron_h", LAYOUTS[layout], both=True) for layout in ("TP2-SP", "PP2")),
    slow("nemotron_h-experts", ONE, both=True),
]
"""By family: what a worker has built of one serves its next case."""


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny.build_tokenizer(folder / "tokenizer")
    tiny.write_records(folder / "records.jsonl", STEPS * GLOBAL_BATCH_SIZE)
    return folder


@pytest.fixture(scope="session")
def model(inputs):
    """The folder of a family's model."""

    @functools.cache
    def build(family: str) -> Path:
        if family in OF_BOTH:
            return tiny.build_model(inputs / family, family, vocab_size=bridge_models.VOCAB_SIZE, **OF_BOTH[family])
        return bridge_models.build_model(inputs / family, family)

    return build


@pytest.fixture(scope="session")
def wanted(inputs, model):
    """What the oracle says of each step of a family, and its model."""

    @functools.cache
    def train(family: str):
        tokenizer = AutoTokenizer.from_pretrained(inputs / "tokenizer")
        batches = oracle.chatml_batches(inputs / "records.jsonl", tokenizer, GLOBAL_BATCH_SIZE, STEPS)
        return oracle.train(model(family), batches, lr=oracle.PARITY_LR, old_policy_interval=INTERVAL)

    return train


@pytest.fixture
def train(source_pool, inputs, tmp_path):
    def run(folder: Path, *flags: str, layout: Layout = ONE, code: int = 0, save: str = "save") -> list | str:
        argv = ["--load-hf", folder, "--tokenizer", inputs / "tokenizer", "--data", inputs / "records.jsonl"]
        argv += ["--save", tmp_path / save, "--export-hf", tmp_path / f"{save}_hf", "--model-source", "bridge"]
        argv += ["--train-iters", STEPS, "--global-batch-size", GLOBAL_BATCH_SIZE, "--no-shuffle", "--lr", "5e-4"]
        argv += ["--lr-decay-style", "constant", "--old-policy-interval", INTERVAL, "--seq-length", 256]
        argv += [] if "--packing" in flags else ["--no-packing", "--micro-batch-size", 2]
        exits = source_pool.run(run_cli, layout.world_size, [str(value) for value in [*argv, *layout.flags, *flags]])
        assert exits[0].code == code, exits[0].err
        if code:
            return exits[0].err
        return [json.loads(line) for line in (tmp_path / save / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.mark.parametrize(("family", "layout"), CASES, ids=str)
def test_a_model_from_bridge_follows_the_oracle(train, model, wanted, tmp_path, family, layout):
    """And where its tensors or experts are spread over ranks goes on in one process, in the middle of a window."""
    lines, oracle_model = wanted(family)
    assert all(line["clip_fraction"] > 0.02 for line in lines[1::2]), "the clip must matter in this comparison"
    resumes = layout.tensor > 1 or layout.expert > 1
    found = train(model(family), *(("--save-interval", "3") if resumes else ()), layout=layout)
    assert_same_run(found, lines)
    assert_same_logits(tmp_path / "save_hf", oracle_model)
    before, after = (load_file(it / "model.safetensors") for it in (model(family), tmp_path / "save_hf"))
    assert before.keys() == after.keys()
    if resumes:
        shutil.rmtree(tmp_path / "save" / "step_0000004")
        shutil.rmtree(tmp_path / "save_hf")
        assert_same_run(train(model(family)), lines)
        assert_same_logits(tmp_path / "save_hf", oracle_model)


@pytest.mark.parametrize("family", [family if family in QUICK else slow(family, both=True) for family in OF_BOTH])
def test_both_sources_go_the_same_way(train, model, tmp_path, family):
    found = train(model(family))
    ours = train(model(family), "--model-source", "native", save="native")
    for line, own in zip(found, ours, strict=True):
        for name in ("loss", "nll", "entropy", "grad_norm", "clip_fraction"):
            assert line[name] == pytest.approx(own[name], rel=1e-6), (line["step"], name)


@pytest.mark.slow
@pytest.mark.both
@pytest.mark.parametrize(
    "family", ["qwen3", "gemma3_text", "olmoe", "deepseek_v3", "gpt_oss", "qwen3_next", "nemotron_h"]
)
def test_packed_rows_follow_the_oracle_on_their_records(train, model, wanted, family):
    """And the old policy's pass says bit for bit what training does."""
    flags = ("--packing", "--global-batch-unit", "records", "--micro-batch-size", "1", "--check-scoring")
    found = train(model(family), *flags)
    assert_same_run(found, wanted(family)[0])
    assert [line["scoring_gap_max"] for line in found[::2]] == [0.0, 0.0]


@pytest.mark.slow
@pytest.mark.both
@pytest.mark.parametrize("family", ["gemma3_text", "glm4_moe", "gpt_oss"])
def test_bf16_follows_fp32_at_its_own_precision(train, model, wanted, tmp_path, family):
    """Experts may be others than in fp32; the old policy's pass chooses those that training does."""
    flags = ("--bf16", "--check-scoring", "--train-iters", "2")
    found = train(model(family), *flags, layout=LAYOUTS["DP2-distopt"])
    for line, oracle_line in zip(found, wanted(family)[0][:2], strict=True):
        assert line["nll"] == pytest.approx(oracle_line["nll"], rel=0.03)
    assert found[0]["scoring_gap_max"] == 0.0
    dtypes = {it.dtype for it in load_file(tmp_path / "save_hf" / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.both
@pytest.mark.parametrize("family", ["qwen3_next", "nemotron_h"])
def test_weights_that_did_not_move_come_back_bit_for_bit(train, model, tmp_path, family):
    train(model(family), "--lr", "1e-30", "--train-iters", "1")
    before, after = (load_file(it / "model.safetensors") for it in (model(family), tmp_path / "save_hf"))
    assert before.keys() == after.keys()
    assert [name for name, it in before.items() if not torch.equal(it, after[name])] == []


@pytest.mark.slow
@pytest.mark.both
def test_biases_of_routers_stay_fp32_in_bf16(train, tmp_path):
    """As published files have them, and transformers computes."""
    model = bridge_models.build_in_bf16(tmp_path / "model", "glm4_moe")
    train(model, "--bf16", "--lr", "1e-30", "--train-iters", "1")
    before, after = (load_file(it / "model.safetensors") for it in (model, tmp_path / "save_hf"))
    assert [name for name, it in before.items() if not torch.equal(it, after[name])] == []
    assert after["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.both
def test_checkpoints_of_the_other_source_are_refused(train, model):
    folder = model("qwen3")
    train(folder, "--model-source", "native")
    error = train(folder, code=2)
    assert "error: " in error
    assert "the run that wrote it had model source (None), this one has (bridge)" in error


@pytest.mark.slow
@pytest.mark.both
def test_what_bridge_would_leave_out_is_named(train, model, tmp_path):
    """A tensor that no parameter takes, and a parameter that no tensor fills."""
    source = model("gemma3_text")
    tensors = load_file(source / "model.safetensors")
    bias, query = "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_proj.weight"
    unfilled = "leaves parameters unfilled: decoder.layers.0.self_attention.linear_qkv.weight (1 in all)"
    for name, content, message in (
        ("more", tensors | {bias: torch.zeros(64)}, f"does not read tensors of the folder: {bias} (1 in all)"),
        ("less", {it: tensors[it] for it in tensors if it != query}, unfilled),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text((source / "config.json").read_text())
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
        assert message in train(folder, code=2)


@pytest.mark.slow
@pytest.mark.both
def test_a_config_that_transformers_cannot_read_is_refused(train, model, tmp_path):
    folder = Path(shutil.copytree(model("gemma3_text"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": "16"}))
    error = train(folder, code=2)
    assert f"error: load_hf ({folder}): transformers cannot read its config.json: " in error
    assert "head_dim" in error


@pytest.mark.slow
@pytest.mark.both
@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "qwen3_next"])
def test_layers_for_multi_token_prediction_come_to_the_export(train, model, tmp_path, family):
    source, folder = model(family), tmp_path / "mtp"
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    prefix = "mtp.layers.0" if family == "qwen3_next" else "model.layers.4"
    beside = {f"{prefix}.{name}.weight": torch.randn(64) for name in ("enorm", "hnorm", "shared_head.norm")}
    beside[f"{prefix}.eh_proj.weight"] = torch.randn(64, 128)
    save_file(tensors | beside, folder / "model.safetensors", metadata={"format": "pt"})
    train(folder)
    exported = load_file(tmp_path / "save_hf" / "model.safetensors")
    assert exported.keys() == (tensors | beside).keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in beside.items())


@pytest.mark.slow
@pytest.mark.both
def test_a_norm_of_all_ranks_heads_wants_sequence_parallelism(train, model):
    layout = Layout(tensor=2, sequence=False)
    assert "error: sequence_parallel (False) must be set" in train(model("qwen3_5_text"), layout=layout, code=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--random-init"], "random_init (True) is not supported for a gemma3_text model from Megatron-Bridge"),
        (["--lora-rank", "4", "--lora-merge"], "lora_merge (True) is not supported for a gemma3_text"),
    ],
)
@pytest.mark.slow
@pytest.mark.both
def test_what_was_not_tried_is_refused(train, model, flags, message):
    assert f"error: {message}" in train(model("gemma3_text"), *flags, code=2)
