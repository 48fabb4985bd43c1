"""The tables of docs/gpu.md show what a GPU's acceptance has stored, whatever a benchmark prints."""

import json

import pytest

from docs import generate
from docs.gpu_figures import NAMES, gpu_figures_of

RUN = {
    "name": "run",
    "value": 31,
    "unit": "s",
    "date": "2026-01-01",
    "command": "python benchmarks/head.py --size gpu",
    "commit": None,
    "machine": {
        "cpu": "a CPU",
        "cores": 16,
        "memory_gib": 128,
        "load_before": 0.1,
        "gpus": [{"name": "NVIDIA H100", "memory_gib": 79.6, "driver": "580.1"}],
    },
    "versions": {"torch": "2.11.0", "transformer-engine": None},
}


def shown(folder, benchmark: str, *figures: dict, file: str = "gpu.jsonl") -> str:
    lines = [{"benchmark": benchmark, **one} for one in (RUN, *figures)]
    (folder / file).write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return gpu_figures_of(benchmark, folder)


def cells(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")
    ]


def test_details_that_vary_are_columns_and_the_others_stand_below(tmp_path):
    figures = [
        {"name": "rate", "value": 1234.0, "unit": "GB/s", "width": width, "dtype": "bf16"} for width in (1, 152064)
    ]
    text = shown(tmp_path, "head", *figures, {"name": "failed", "value": None, "unit": "", "does_not_run": "a | b"})
    header, _, first, second, *_, failed = cells(text.replace("a \\| b", "a or b"))
    assert header == ["figure", "value", "width"]
    assert [first, second] == [["rate", "1,234 GB/s", "1"], ["rate", "1,234 GB/s", "152064"]]
    assert failed == ["failed", "does not run: a or b"]
    assert "All of these: dtype bf16." in text
    assert "NVIDIA H100, 79.6 GiB, driver 580.1" in text


def test_layers_with_and_without_transformer_engine_stand_one_after_the_other(tmp_path):
    shown(tmp_path, "exits", {"name": "seconds", "value": 1.5, "unit": "s"})
    text = shown(tmp_path, "exits", {"name": "seconds", "value": 2.5, "unit": "s"}, file="gpu-te.jsonl")
    portable, engine = text.split("With Transformer Engine's layers:")
    assert portable.startswith("With the portable layers:")
    assert "1.50 s" in portable
    assert "2.50 s" in engine


def test_a_test_that_failed_says_why_beside_what_it_recorded(tmp_path):
    figure = {
        "name": "test_a.py::test_b[c]",
        "value": 12.3,
        "unit": "s",
        "outcome": "failed",
        "reason": "assert 1 == 2",
    }
    text = shown(tmp_path, "training", {**figure, "setup_seconds": 1.0, "largest_difference": 0.00123})
    assert cells(text)[2] == ["`test_a.py::test_b[c]`", "12.3 s", "failed: assert 1 == 2", "largest difference 0.00123"]


def test_the_environment_shows_what_doctor_says(tmp_path):
    figures = [
        {"name": "devices", "value": 1, "unit": "GPUs", "GPU 0": "NVIDIA H100, 79.6 GiB"},
        {"name": "all_reduce", "value": 0.001, "unit": "s", "first": 0.5, "backend": "nccl"},
        {"name": "problems", "value": 1, "unit": "", "texts": ["torch is too old"], "warnings": []},
    ]
    rows = cells(shown(tmp_path, "environment", *figures))
    assert ["GPU 0", "NVIDIA H100, 79.6 GiB"] in rows
    assert ["texts", "torch is too old"] in rows
    assert ["all reduce", "0.00100 s", "0.500"] in rows


@pytest.mark.parametrize("name", NAMES)
def test_every_part_has_its_place_and_says_how_to_measure_it(name, tmp_path):
    assert gpu_figures_of(name, tmp_path) == (
        f"No figures are stored: `python benchmarks/store.py --size gpu {name}` measures them."
    )
    assert f"<!-- generated: gpu {name} -->" in (generate.DOCS / "gpu.md").read_text(encoding="utf-8")
