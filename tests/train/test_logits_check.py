"""`--check-logits`: a run compares its own model with transformers before its first step, in whatever layout."""

from pathlib import Path

import pytest
import torch

from megatron_psft.model.parameters import named_parameters
from megatron_psft.sources.native import NativeSource
from tests.support import tiny
from tests.support.cli import Exit, run_cli
from tests.support.layouts import LAYOUTS
from tests.support.marks import slow
from tests.support.runs import metrics_of

OF_FP32 = "logits check: log-probabilities of 64 tokens differ from transformers' by at most "
OF_BF16 = "logits check: log-probabilities of 64 tokens differ from transformers' fp32 by a mean of "


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for family in ("qwen3", "qwen3_moe"):
        tiny.build_model(folder / family, family)
    tiny.build_tokenizer(folder / "tokenizer")
    tiny.write_records(folder / "records.jsonl", 12, max_exchanges=6, seed=3)
    return folder


def run_with_fault(argv: list[str]) -> Exit:
    """The command, where each rank fills a weight, or its part of it, with twice what is there."""
    fill = NativeSource.fill

    def fill_wrongly(source, chunks, parallel) -> None:
        fill(source, chunks, parallel)
        with torch.no_grad():
            for name, weight in named_parameters(chunks):
                if name == "decoder.layers.3.self_attention.linear_proj.weight":
                    weight.mul_(2)

    NativeSource.fill = fill_wrongly
    try:
        return run_cli(argv)
    finally:
        NativeSource.fill = fill


@pytest.fixture
def train(pool, inputs, tmp_path):
    def run(family: str, layout: str, *flags: str, code: int = 0, start=run_cli) -> str:
        """What rank 0 has printed."""
        argv = ["--load-hf", inputs / family, "--tokenizer", inputs / "tokenizer", "--data", inputs / "records.jsonl"]
        argv += ["--save", tmp_path / "save", "--train-iters", 1, "--global-batch-size", 4, "--micro-batch-size", 1]
        argv += ["--seq-length", 512, "--check-logits", "--no-shuffle", *LAYOUTS[layout].flags, *flags]
        exits = pool.run(start, LAYOUTS[layout].world_size, [str(value) for value in argv])
        assert [exit.code for exit in exits] == [code] * len(exits), exits[0].err
        return exits[0].err

    return run


@pytest.mark.parametrize(
    ("family", "layout", "flags"),
    [
        ("qwen3", "TP2-SP-PP2", ()),
        ("qwen3_moe", "DP2-EP2", ()),
        slow("qwen3", "one", ("--no-packing",)),
        slow("qwen3", "TP2-SP", ("--no-packing",)),
        slow("qwen3", "PP2-DP2-VPP1-overlap", ()),
        slow("qwen3", "PP2-CP2", ()),
        slow("qwen3", "DP2-distopt", ("--lora-rank", "2")),
        slow("qwen3_moe", "TP2-SP-PP2-DP2-EP2-overlap", ()),
    ],
    ids=str,
)
def test_the_model_is_the_one_of_transformers(train, tmp_path, family, layout, flags):
    output = train(family, layout, *flags)
    (line,) = (line for line in output.splitlines() if line.startswith(OF_FP32))
    found = float(line.removeprefix(OF_FP32).split()[0])
    assert 0 < found < 1e-5
    assert len(metrics_of(tmp_path / "save")) == 1


@pytest.mark.parametrize(
    ("family", "layout", "flags"),
    [("qwen3", "TP2-SP-PP2", ()), slow("qwen3_moe", "DP2-EP2", ()), slow("qwen3", "PP2-CP2", ("--bf16",))],
    ids=str,
)
def test_a_planted_fault_ends_the_run_before_its_first_step(train, tmp_path, family, layout, flags):
    """It is one on each stage: no rank goes on."""
    output = train(family, layout, *flags, start=run_with_fault, code=2)
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert line.startswith("error: check_logits (True): log-probabilities of 64 tokens differ from transformers'")
    assert not (tmp_path / "save" / "metrics.jsonl").exists()
    assert not (tmp_path / "save" / "config.yaml").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_bf16_is_as_far_from_fp32_as_transformers_own(train, family):
    output = train(family, "DP2-distopt", "--bf16")
    (line,) = (line for line in output.splitlines() if line.startswith(OF_BF16))
    found, bound = (float(part.strip(" ()")) for part in line.removeprefix(OF_BF16).split("(up to"))
    assert 0 < found < bound / 2


@pytest.mark.slow
def test_a_run_that_goes_on_is_not_compared(train):
    """Its weights are no longer those of the folder."""
    train("qwen3", "one")
    output = train("qwen3", "one", "--train-iters", "2")
    assert "logits check: none, as the run does not start from load_hf but from " in output


@pytest.mark.slow
def test_rows_that_transformers_has_not_are_refused(train, inputs, tmp_path):
    tiny.build_model(tmp_path / "small", "qwen3", vocab_size=190)
    output = train("qwen3", "one", "--load-hf", str(tmp_path / "small"), "--resize-vocab", code=2)
    assert (
        "error: check_logits (True): the model has 200 rows of its vocabulary with resize_vocab, and 190 in" in output
    )


@pytest.mark.slow
def test_too_little_memory_is_told(train):
    output = train("qwen3", "one", start=run_without_memory, code=2)
    assert (
        "error: check_logits (True) needs 1 GiB of rank 0's host memory for transformers' model, which has " in output
    )


def run_without_memory(argv: list[str]) -> Exit:
    from megatron_psft.train import logits_check

    available, logits_check.available_bytes = logits_check.available_bytes, lambda: 2**29
    try:
        return run_cli(argv)
    finally:
        logits_check.available_bytes = available
