"""Training on a GPU: as on the CPU in fp32, near it in bf16 and fp8, with passes that agree after every sync.

`make test-gpu` runs this where there is a CUDA device. With Transformer Engine its layers are what is tested, else the
portable ones.
"""

import importlib.util
import json

import pytest
import torch

from megatron_psft.scoring.agreement import BOUNDS
from tests.support import tiny
from tests.support.cli import run_torchrun

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

STEPS, INTERVAL = 12, 4
HAS_ENGINE = importlib.util.find_spec("transformer_engine") is not None
# fp8 has units from Ada and Hopper on.
HAS_FP8 = HAS_ENGINE and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model whose sizes fp8 and Transformer Engine can take, and its records."""
    folder = tmp_path_factory.mktemp("inputs")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny.build_model(folder / "model", "qwen2", vocab_size=512, **sizes)
    tiny.build_tokenizer(folder / "tokenizer")
    tiny.write_records(folder / "records.jsonl", 64)
    return folder


@pytest.fixture(scope="module")
def on_cpu(inputs):
    """The trajectory in fp32 on the CPU."""
    return train(inputs, "cpu", gpu=False)


def train(inputs, name: str, *flags: str, gpu: bool = True) -> list[dict[str, float]]:
    """Lines of metrics.jsonl of a run of the command line."""
    save = inputs / name
    argv = ["pretrain_psft.py", "--load-hf", inputs / "model", "--tokenizer", inputs / "tokenizer", "--save", save]
    argv += ["--data", inputs / "records.jsonl", "--train-iters", str(STEPS), "--old-policy-interval", str(INTERVAL)]
    argv += ["--check-scoring"]
    argv += ["--global-batch-size", "2", "--seq-length", "256", "--lr", "1e-3", *flags]
    done = run_torchrun(argv, 1, gpu=gpu, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def assert_near(found, wanted, tolerance: float) -> None:
    for name in ("nll", "entropy"):
        one, other = ([line[name] for line in lines] for lines in (found, wanted))
        assert one == pytest.approx(other, rel=tolerance), name
    assert wanted[-1]["nll"] < 0.9 * wanted[0]["nll"]  # else nothing was learned that could differ


def assert_passes_agree(lines, precision: str) -> None:
    bounds = BOUNDS[precision]
    for line in lines[::INTERVAL]:
        assert line["scoring_gap_max"] <= bounds.largest
        assert line["scoring_gap_p99"] <= bounds.p99
    assert any(line["clip_fraction"] > 0 for line in lines)


@pytest.mark.parametrize("head", ["--fused-head", "--no-fused-head"])
def test_fp32_follows_the_cpu(inputs, on_cpu, head):
    lines = train(inputs, f"fp32{head}", head, "--bf16", "false")
    assert_near(lines, on_cpu, 1e-3)
    assert_passes_agree(lines, "fp32")


def test_bf16_stays_near_fp32(inputs, on_cpu):
    lines = train(inputs, "bf16")  # the default
    assert_near(lines, on_cpu, 0.03)
    assert_passes_agree(lines, "bf16")
    for line in lines:
        assert line["max_memory_gib"] > 0
        assert line["tflops_per_gpu"] > 0


@pytest.mark.skipif(not HAS_FP8, reason="no Transformer Engine, or no GPU with fp8")
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_fp8_stays_near_fp32(inputs, on_cpu, recipe):
    lines = train(inputs, f"fp8-{recipe}", "--bf16", "--fp8-format", "hybrid", "--fp8-recipe", recipe)
    assert_near(lines, on_cpu, 0.1)
    assert_passes_agree(lines, "fp8")


def test_recomputed_activations_change_nothing(inputs):
    plain = train(inputs, "plain", "--bf16")
    flags = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    assert_near(train(inputs, "recomputed", "--bf16", *flags), plain, 1e-3)


def test_a_resumed_run_goes_on_as_an_uninterrupted_one(inputs):
    whole = train(inputs, "whole", "--bf16", "--lr-decay-style", "constant")
    flags = ["--bf16", "--lr-decay-style", "constant", "--save-interval", "6"]
    train(inputs, "parts", *flags, "--train-iters", "6")
    assert_near(train(inputs, "parts", *flags), whole, 1e-3)


def test_an_offloaded_optimizer_trains_and_resumes_as_one_on_the_device(inputs):
    flags = ["--bf16", "--use-distributed-optimizer", "--lr-decay-style", "constant"]
    whole = train(inputs, "on-device", *flags)
    flags += ["--optimizer-cpu-offload", "--optimizer-offload-fraction", "0.5", "--save-interval", "6"]
    train(inputs, "offloaded", *flags, "--train-iters", "6")
    assert_near(train(inputs, "offloaded", *flags), whole, 1e-3)
