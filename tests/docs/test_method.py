"""The table of the paper's settings has the values of the configuration and of `config/paper.py`."""

import pytest

from megatron_psft.config.inputs import DataConfig
from megatron_psft.config.paper import EVALUATED_STEPS, RUNS
from megatron_psft.config.schema import BatchConfig, ObjectiveConfig, OptimizerConfig
from tests.support.cli import REPOSITORY

PSFT, SFT = RUNS["psft"], RUNS["sft"]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[str]]:
    text = (REPOSITORY / "docs" / "method.md").read_text(encoding="utf-8").split("## The paper's settings")[1]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


@pytest.mark.parametrize(
    ("setting", "paper", "baseline", "default"),
    [
        (
            "records per optimizer step",
            PSFT["global_batch_size"],
            SFT["global_batch_size"],
            BatchConfig.global_batch_size,
        ),
        ("`k`", PSFT["old_policy_interval"], "", ObjectiveConfig.old_policy_interval),
        ("`eps`", PSFT["clip_ratio_high"], "", ObjectiveConfig.clip_ratio_high),
        ("learning rate", "1e-6", "2e-5", "1e-6"),
        ("its decay", PSFT["lr_decay_style"], SFT["lr_decay_style"], OptimizerConfig.lr_decay_style),
        (
            "its warm-up, optimizer steps",
            PSFT["lr_warmup_iters"],
            SFT["lr_warmup_iters"],
            OptimizerConfig.lr_warmup_iters,
        ),
        ("Adam's betas", f"{PSFT['adam_beta1']} and {PSFT['adam_beta2']}", "the same", "the same"),
        ("weight decay, gradient clip", f"{PSFT['weight_decay']}, {PSFT['clip_grad']}", "the same", "the same"),
        ("epochs", PSFT["epochs"], SFT["epochs"], "`--epochs`"),
        ("evaluated checkpoint, optimizer steps", f"{EVALUATED_STEPS['psft']:,}", EVALUATED_STEPS["sft"], ""),
        ("longest prompt, answer", "2,048", "the same", f"`--seq-length` {DataConfig.seq_length:,}"),
    ],
    ids=lambda value: str(value),
)
def test_a_row_has_the_values_of_the_code(rows, setting, paper, baseline, default):
    cells = rows[setting]
    assert cells[0].split(":")[0].startswith(str(paper))
    assert cells[1] == str(baseline)
    assert cells[3].startswith(str(default))


def test_defaults_that_are_the_papers_are(rows):
    defaults = {
        "lr": OptimizerConfig.lr,
        "adam_beta1": OptimizerConfig.adam_beta1,
        "adam_beta2": OptimizerConfig.adam_beta2,
    }
    defaults |= {"weight_decay": OptimizerConfig.weight_decay, "clip_grad": OptimizerConfig.clip_grad}
    assert {name: PSFT[name] for name in defaults} == defaults
    assert (PSFT["lr"], SFT["lr"]) == (float(rows["learning rate"][0]), float(rows["learning rate"][1]))
