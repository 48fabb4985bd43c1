"""Training on a GPU: as on the CPU in fp32, near it in bf16 and fp8, with passes that agree after every sync.

`make test-gpu` runs this where there is a CUDA device. With Transformer Engine its layers are what is tested, else the
portable ones. `benchmarks/training.py` prints the numbers that tests record.
"""

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from megatron_psft.checkpoint.folders import step_folder, step_folders
from megatron_psft.scoring.agreement import BOUNDS
from tests.support import tiny
from tests.support.cli import REPOSITORY, run_torchrun

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

STEPS, INTERVAL = 12, 4
BF16, LORA = ("--bf16",), ("--lora-rank", "8", "--lr", "3e-3")
RECOMPUTED = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
OFFLOADED = ("--use-distributed-optimizer", "--optimizer-cpu-offload", "--optimizer-offload-fraction", "0.5")
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
    return train(inputs, "cpu", "--device", "cpu", gpu=False)


@pytest.fixture(scope="module")
def in_bf16(inputs):
    """The trajectory in bf16."""
    return train(inputs, "bf16", *BF16)


def argv_of(inputs, name: str, *flags: str) -> list[str]:
    return f"""
        pretrain_psft.py --load-hf {inputs}/model --tokenizer {inputs}/tokenizer --save {inputs / name}
        --data {inputs}/records.jsonl --train-iters {STEPS} --old-policy-interval {INTERVAL} --check-scoring
        --global-batch-size 2 --seq-length 256 --lr 3e-4 --lr-decay-style constant {" ".join(flags)}
    """.split()


def metrics_of(inputs, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (inputs / name / "metrics.jsonl").read_text().splitlines()]


def train(inputs, name: str, *flags: str, gpu: bool = True) -> list[dict[str, float]]:
    """Lines of metrics.jsonl of a run of the command line."""
    done = run_torchrun(argv_of(inputs, name, *flags), 1, gpu=gpu, timeout=600)
    assert done.returncode == 0, said(done.stderr)
    return metrics_of(inputs, name)


def said(errors: str) -> str:
    """What a process printed last, the error itself first: torchrun has much to say after it."""
    found = re.findall(r"^.*(?:[Ee]rror|Exception): .*$", errors, re.MULTILINE) or [""]
    return f"{found[-1]}\n{errors[-3000:]}"


def largest_difference(found, wanted) -> float:
    """Of NLL and entropy of any step, relative."""
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    assert wanted[-1]["nll"] < 0.9 * wanted[0]["nll"]  # else nothing was learned that could differ
    pairs = [(one[name], other[name]) for one, other in zip(found, wanted, strict=True) for name in ("nll", "entropy")]
    return max(abs(one - other) / abs(other) for one, other in pairs)


def assert_near(found, wanted, tolerance: float, record_property) -> None:
    difference = largest_difference(found, wanted)
    record_property("largest_difference", float(f"{difference:.3g}"))
    assert difference <= tolerance


def assert_passes_agree(lines, precision: str, record_property) -> None:
    after_syncs = lines[::INTERVAL]
    for name in ("scoring_gap_max", "scoring_gap_p99", "ratio_max"):
        record_property(f"{name}_after_syncs", max(line[name] for line in after_syncs))
    record_property("ratio_max", max(line["ratio_max"] for line in lines))
    for line in after_syncs:
        assert line["scoring_gap_max"] <= BOUNDS[precision].largest
        assert line["scoring_gap_p99"] <= BOUNDS[precision].p99
    assert any(line["clip_fraction"] > 0 for line in lines)


@pytest.mark.parametrize("head", ["--fused-head", "--no-fused-head"])
def test_fp32_follows_the_cpu(inputs, on_cpu, head, record_property):
    lines = train(inputs, f"fp32{head}", head, "--bf16", "false")
    assert_passes_agree(lines, "fp32", record_property)
    assert_near(lines, on_cpu, 1e-3, record_property)


def test_bf16_stays_near_fp32(inputs, on_cpu, record_property):
    lines = train(inputs, "bf16-by-default")
    assert_passes_agree(lines, "bf16", record_property)
    assert_near(lines, on_cpu, 0.03, record_property)
    for line in lines:
        assert line["max_memory_gib"] > 0
        assert line["tflops_per_gpu"] > 0


@pytest.mark.skipif(not HAS_FP8, reason="no Transformer Engine, or no GPU with fp8")
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_fp8_stays_near_fp32(inputs, on_cpu, recipe, record_property):
    lines = train(inputs, f"fp8-{recipe}", "--bf16", "--fp8-format", "hybrid", "--fp8-recipe", recipe)
    assert_passes_agree(lines, "fp8", record_property)
    assert_near(lines, on_cpu, 0.1, record_property)


def test_recomputed_activations_change_nothing(inputs, in_bf16, record_property):
    assert_near(train(inputs, "recomputed", *BF16, *RECOMPUTED), in_bf16, 1e-3, record_property)


def assert_resumes(inputs, name: str, flags, record_property) -> list[dict[str, float]]:
    """Trains, forgets what came after step 6, within a window, and goes on; returns the lines of the first time."""
    flags = (*flags, "--save-interval", str(STEPS // 2))
    whole = train(inputs, name, *flags)
    shutil.rmtree(step_folder(inputs / name, STEPS))
    assert_near(train(inputs, name, *flags), whole, 1e-3, record_property)
    return whole


@pytest.mark.parametrize("flags", [(), ("--async-save",)], ids=["waited", "async"])
def test_a_resumed_run_goes_on_as_an_uninterrupted_one(inputs, flags, record_property):
    assert_resumes(inputs, f"parts{''.join(flags)}", (*BF16, *flags), record_property)


def test_an_offloaded_optimizer_trains_and_resumes_as_one_on_the_device(inputs, in_bf16, record_property):
    whole = assert_resumes(inputs, "offloaded", (*BF16, *OFFLOADED), record_property)
    record_property("largest_difference_to_device", largest_difference(whole, in_bf16))
    assert largest_difference(whole, in_bf16) <= 0.03  # both in bf16, rounded elsewhere


def test_adapters_in_bf16_learn_and_resume(inputs, record_property):
    lines = assert_resumes(inputs, "lora", (*BF16, *LORA, "--async-save"), record_property)
    assert_passes_agree(lines, "bf16", record_property)


def number_of_lines(path) -> int:
    return path.read_text().count("\n") if path.is_file() else 0


def test_sigterm_ends_a_run_with_a_checkpoint_and_it_goes_on(inputs, record_property):
    save, flags = inputs / "stopped", (*BF16, "--async-save", "--save-interval", "5", "--keep-last", "2")
    command = [sys.executable, *argv_of(inputs, "stopped", *flags, "--train-iters", "100000")]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while number_of_lines(save / "metrics.jsonl") <= INTERVAL and time.monotonic() < deadline:
            assert process.poll() is None, said(process.stderr.read())
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        errors = process.communicate(timeout=120)[1]
    record_property("seconds_to_exit", round(time.monotonic() - asked, 2))
    assert process.returncode == 128 + signal.SIGTERM, said(errors)
    done = len(metrics_of(inputs, "stopped"))
    assert step_folders(save)[-1] == step_folder(save, done)
    lines = train(inputs, "stopped", *flags, "--train-iters", str(done + 2))
    assert [line["step"] for line in lines] == list(range(1, done + 3))
