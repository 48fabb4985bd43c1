"""Whole runs of one small model that tests stop, damage and resume, and what they leave."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_psft.checkpoint.folders import step_folders
from megatron_psft.sealed import MARKER
from tests.support import tiny
from tests.support.cli import run_cli
from tests.support.layouts import LAYOUTS

TIMINGS = {"step_seconds", "old_policy_seconds", "tokens_per_second"}
OF_EACH_START = {"scoring_gap_max", "scoring_gap_p99"}
"""What each start measures once."""
ONE: tuple[str, ...] = ()
TP2_SP, PP2, CP2 = (LAYOUTS[name].flags for name in ("TP2-SP", "PP2", "CP2"))
DIST_OPT, OVERLAP = (LAYOUTS[name].flags for name in ("DP2-distopt", "DP2-overlap"))


@dataclass(frozen=True)
class Inputs:
    """What all runs of this module share."""

    model: Path
    tokenizer: Path
    data: Path

    def argv(self, save: Path, *flags: str) -> list[str]:
        """Eight steps: one of warm-up, a window of four, and three steps of the next one. Ten records, in an order of
        each epoch's own, are less than three batches."""
        shared = f"""
            --load-hf {self.model} --tokenizer {self.tokenizer} --data {self.data} --save {save} --seq-length 256
            --train-iters 8 --global-batch-size 4 --lr 1e-3 --lr-decay-style cosine --lr-warmup-iters 2
            --old-policy-interval 4 --sft-warmup-iters 1 --no-packing
        """
        return [*shared.split(), *flags]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    root = tmp_path_factory.mktemp("inputs")
    return Inputs(
        model=tiny.build_model(root / "model", "qwen3", tied=True),
        tokenizer=tiny.build_tokenizer(root / "tokenizer"),
        data=tiny.write_records(root / "records.jsonl", 10),
    )


def train(pool, world_size: int, argv: list[str]) -> str:
    """Runs to the end; returns what rank 0 said."""
    results = pool.run(run_cli, world_size, argv)
    assert [result.code for result in results] == [0] * world_size, results[0].err
    return results[0].out + results[0].err


def refuse(pool, argv: list[str], code: int = 2) -> str:
    """Runs a command that must end with one line of explanation; returns it."""
    (result,) = pool.run(run_cli, 1, argv)
    assert result.code == code, result.err
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    return line


def metrics_of(save: Path) -> list[dict[str, float]]:
    """Every line, without what a clock has said and what depends on where a start was."""
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS | OF_EACH_START} for line in lines]


def forget_steps_from(save: Path, step: int) -> None:
    """Makes a copy of a run one that was killed: later checkpoints are unfinished, the last line of metrics is torn."""
    for folder in step_folders(save):
        if int(folder.name.removeprefix("step_")) >= step:
            (folder / MARKER).unlink()
            folder.rename(folder.with_name(folder.name + ".partial"))
    with open(save / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "los')
