"""Counts of clipped tokens: over all ranks, over a whole run, and over a resume."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.support import oracle, tiny
from tests.support.cli import run_cli


def _count(folder: Path) -> dict:
    """Four ranks, two of which compute the same: adds before and after a call of `gather`."""
    from megatron_psft.config.schema import ParallelConfig
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import initialize_parallel, process_group
    from megatron_psft.metrics.clipped_tokens import ClippedTokens

    here, config = detect(0), ParallelConfig(tensor_model_parallel_size=2)
    with process_group(here, 4):
        place = initialize_parallel(config, virtual_size=None, seed=1, device=here.device)
        counts = ClippedTokens(vocab_size=9, first_step=3, parallel=place)
        counts.add(torch.tensor([5, 5, 7, 2]), torch.tensor([True, True, False, True]))
        counts.gather()
        counts.add(torch.tensor([7]), torch.tensor([place.data_rank == 1]))
        counts.gather()
        resumed = ClippedTokens(vocab_size=9, first_step=8, parallel=place)
        resumed.load_state(json.loads(json.dumps(counts.state())))
        resumed.add(torch.tensor([8, 8]), torch.tensor([True, True]))
        resumed.gather()
        if place.is_main:
            resumed.write(folder, last_step=9, num_tokens=3, decode=lambda token_id: f"<{token_id}>")
        return counts.state()


def test_every_token_of_the_batch_counts_once(pool, tmp_path):
    states = pool.run(_count, 4, tmp_path)
    assert states == [{"first_step": 3, "ids": [2, 5, 7], "counts": [2, 4, 1]}] * 4
    assert json.loads((tmp_path / "clipped_tokens.json").read_text()) == {
        "first_step": 3,
        "last_step": 9,
        "clipped": 11,
        "tokens": [
            {"id": 5, "text": "<5>", "count": 4, "share": 4 / 11},
            {"id": 8, "text": "<8>", "count": 4, "share": 4 / 11},
            {"id": 2, "text": "<2>", "count": 2, "share": 2 / 11},
        ],
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clipped")
    tiny.build_model(folder / "model", "qwen2", num_hidden_layers=2)
    tiny.build_tokenizer(folder / "tokenizer")
    tiny.write_records(folder / "records.jsonl", 40)
    return folder


def train(pool, inputs: Path, save: Path, world_size: int, *flags: str) -> dict:
    argv = ["--load-hf", inputs / "model", "--tokenizer", inputs / "tokenizer", "--data", inputs / "records.jsonl"]
    argv += ["--save", save, "--train-iters", 7, "--global-batch-size", 8, "--old-policy-interval", 4, "--no-packing"]
    argv += ["--lr", oracle.PARITY_LR, "--lr-decay-style", "constant", "--log-clipped-tokens", 5, *flags]
    exits = pool.run(run_cli, world_size, [str(value) for value in argv])
    assert [exit.code for exit in exits] == [0] * world_size, exits[0].err
    return json.loads((save / "clipped_tokens.json").read_text())


@pytest.mark.slow
def test_a_run_counts_what_its_metrics_call_clipped_and_a_resumed_one_too(pool, inputs, tmp_path):
    """The checkpoint that the second run starts from lies within a window of the old policy."""
    found = train(pool, inputs, tmp_path / "whole", 2, "--save-interval", "3")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    clipped = sum(line["clip_fraction"] * line["label_tokens"] for line in lines)
    assert clipped > 100
    assert found["clipped"] == pytest.approx(clipped, rel=1e-9)
    assert (found["first_step"], found["last_step"], len(found["tokens"])) == (1, 7, 5)
    counts = [row["count"] for row in found["tokens"]]
    assert counts == sorted(counts, reverse=True)
    tokenizer = AutoTokenizer.from_pretrained(inputs / "tokenizer")
    assert [row["text"] for row in found["tokens"]] == [tokenizer.decode([row["id"]]) for row in found["tokens"]]

    checkpoint = tmp_path / "whole" / "step_0000003"
    resumed = train(pool, inputs, tmp_path / "resumed", 2, "--load", str(checkpoint))
    assert resumed == found
