"""How to add a metric by docs/extending.md, followed as it is written in a copy of the repository."""

import json
import sys

import pytest

from tests.support.extending import copy_repository, follow, run

CODE = """
import json, torch
from megatron_psft.config.schema import ObjectiveConfig
from megatron_psft.objectives.labels import LabelInputs, LabelStats
from megatron_psft.metrics.sums import batch_sums
from megatron_psft.metrics.table import METRICS, means
from megatron_psft.report.charts import SECTIONS
stats = LabelStats(torch.tensor([0.5, 0.25]).log(), torch.zeros(2))
sums = batch_sums(torch.tensor(0.0), stats, LabelInputs(), ObjectiveConfig(), labelled_records=1).totals
print(json.dumps({
    "sum": sums["label_prob"].item(),
    "over": sums[means(())["label_prob"]].item(),
    "printed": METRICS["label_prob"].is_printed,
    "charts": [chart.unit for section in SECTIONS for chart in section.charts if chart.metric == "label_prob"],
}))
"""


@pytest.mark.slow
def test_a_metric_is_an_entry_and_a_sum(tmp_path):
    checkout = copy_repository(tmp_path)
    follow(checkout, "A metric")
    page = (checkout / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert (
        "| `label_prob` | probability | Probability that the model gives to the label tokens. | label tokens |" in page
    )
    assert json.loads(run([sys.executable, "-c", CODE], checkout)) == {
        "sum": 0.75,
        "over": 2,
        "printed": True,
        "charts": ["probability"],
    }
