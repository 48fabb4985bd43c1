"""Every cell about another trainer has a source, and what is not known says so."""

import re

from tests.support.cli import REPOSITORY

SOURCE = re.compile(r"[\w./-]+\.(?:py|sh|md|yaml|yml)\b|\bno [a-z]+")


def rows_of(table: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {cells[0]: cells[1:] for cells in lines if set(cells[1]) != {"-"}}


def test_each_cell_has_its_source():
    page = (REPOSITORY / "docs" / "comparison.md").read_text(encoding="utf-8")
    cells, sources = map(rows_of, re.split(r"^## Sources$", page, flags=re.MULTILINE))
    assert len(cells) > 10
    assert list(cells) == list(sources)
    projects = cells.pop("")
    assert projects == sources.pop("")
    unknown = [
        (feature, project)
        for feature, row in cells.items()
        for project, cell, source in zip(projects, row, sources[feature], strict=True)
        if (cell == "?") == bool(SOURCE.search(source)) or cell not in {"y", "n", "~", "?", "DFT"}
    ]
    assert unknown == []


def test_each_project_names_its_commit_and_date():
    page = (REPOSITORY / "docs" / "comparison.md").read_text(encoding="utf-8")
    assert len(re.findall(r"\)\s[0-9a-f]{7} \(20\d\d-\d\d-\d\d\)", page)) == 6
