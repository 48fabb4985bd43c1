"""Measured figures stand in one page, and there in tables that are made of the benchmarks' stored lines."""

import csv
import json
import re

import pytest

from docs import figures, generate
from megatron_psft.head.chunked import CHUNK_BYTES
from tests.support.cli import REPOSITORY

STORED = REPOSITORY / "tests" / "docs" / "figures.jsonl"
"""What `python benchmarks/store.py --size tiny` has written."""
PAGES = [
    REPOSITORY / "README.md",
    *(
        REPOSITORY / "docs" / f"{name}.md"
        for name in ("gpu", "index", "method", "metrics", "objectives", "performance")
    ),
]
"""Pages on what the trainer does and how well. Those on limits, resume and data have many quantities: constants;
in miniature.md figures are the subject."""
QUANTITY = re.compile(r"\b\d[\d.,]* ?(?:s|ms|%|[GM]i?B|times|tokens/s|records/s|minutes|seconds)(?![\w/])")
STATED = {
    "README.md": {"28 %"},
    "index.md": {"28 %"},
    "method.md": {"28 %"},
    "metrics.md": {"1 %"},
    "performance.md": {f"{CHUNK_BYTES['cpu'] >> 20} MiB", f"{CHUNK_BYTES['cuda'] >> 30} GiB"},
}
"""Quantities in their text that nobody has measured: constants of the code and of the paper."""


def text_of(path) -> str:
    """The page without blocks and without what is generated."""
    text = path.read_text(encoding="utf-8")
    for part in (r"<!-- generated: .*?<!-- end -->", r"^```.*?^```"):
        text = re.sub(part, "", text, flags=re.M | re.S)
    return text


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_text_names_no_measured_figure(path):
    assert set(QUANTITY.findall(text_of(path))) <= STATED.get(path.name, set()), (
        "measured? then by reference to performance.md"
    )


@pytest.mark.parametrize(
    "line", ["It is 2.4 times as fast.", "Saving takes 0.12 s.", "It is 2.38 times as many.", "fills 98.62 % of it"]
)
def test_a_figure_in_the_text_is_noticed(line):
    assert QUANTITY.search(line)


@pytest.mark.parametrize("name", figures.TABLES)
def test_a_table_shows_what_is_stored(name, tmp_path):
    """Each stored value that a table shows is the table's: another one in the file is another one there."""
    lines = [json.loads(line) for line in STORED.read_text(encoding="utf-8").splitlines()]
    for one in lines:
        if one["benchmark"] == name and one["name"] != "run" and one["value"] is not None:
            one["value"] = 777
    changed = tmp_path / "cpu.jsonl"
    changed.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    before, after = (figures.figures_of(name, path) for path in (STORED, changed))
    assert "777" in after
    assert "777" not in before
    assert "commit `" in before
    assert f"figures of {name}" in generate.PARTS


def test_a_benchmark_without_stored_figures_says_so(tmp_path):
    assert "python benchmarks/store.py head" in figures.figures_of("head", tmp_path / "cpu.jsonl")


def test_expected_times_of_the_method_follow_its_formula():
    page = (REPOSITORY / "docs" / "method.md").read_text(encoding="utf-8")
    expected = [f"{1 + (k - 1) / (3 * k):.2f}" for k in (4, 8, 16)]
    assert "{} at `k` = 4, {} at 8, {} at 16".format(*expected) in " ".join(page.split())


def test_the_table_of_the_miniature_is_of_its_points():
    folder = REPOSITORY / "docs"
    points = list(csv.DictReader((folder / "miniature.csv").read_text(encoding="utf-8").splitlines()))
    page = (folder / "miniature.md").read_text(encoding="utf-8")
    assert f"All {len(points)} points" in page
    known = {(point["method"], point["lr"], point["steps"]): point for point in points}
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if " ± " in line and line[0] == "|"
    ]
    rows = [row for row in rows if (row[0].removesuffix(" (below)"), *row[1:3]) in known]
    assert len(rows) == 8
    columns = ("target_percent", "general_percent", "held_out_entropy", "held_out_nll", "clipped")
    for method, lr, steps, *cells in rows:
        point = known[method.removesuffix(" (below)"), lr, steps]
        for column, cell in zip(columns, cells, strict=True):
            spread = point[f"{column.removesuffix('_percent')}_sd"]
            assert cell == (f"{point[column]} ± {spread}" if spread else ""), (method, column)
