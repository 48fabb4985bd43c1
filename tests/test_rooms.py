"""The package keeps its shape: imports go down the table of docs/layout.md, and files and functions stay short."""

import ast
import graphlib
import statistics
from pathlib import Path

import pytest

from tests.support.cli import REPOSITORY
from tests.support.rooms import PACKAGE, SHARED, allowed_imports, imports_of

TOP_LEVEL = {"__init__", "__main__", *SHARED}
ADVICE = "move the code or what it needs to another room, pass it in, or change the table in docs/layout.md"
FOLDERS = ("megatron_psft", "tests", "examples", "benchmarks", "tools", "docs")


def violations(package: Path) -> list[str]:
    """What is wrong with the imports of a package, in words."""
    allowed = {**allowed_imports(), "__main__": ["cli"], "__init__": ["train"]}
    found = [
        f"{place}: {importer} may not import {imported}; {ADVICE}"
        for importer, imports in imports_of(package).items()
        for imported, places in imports.items()
        for place in places
        if imported not in {*(TOP_LEVEL if importer in TOP_LEVEL else SHARED), *allowed.get(importer, ())}
    ]
    # Not by folders: of a room that moved, __pycache__ may remain.
    names = {path.relative_to(package).parts[0].removesuffix(".py") for path in package.rglob("*.py")}
    found += [
        f"{package.name}/{name} is not known; put it into a room, or add the room to docs/layout.md"
        for name in sorted(names - set(allowed) - TOP_LEVEL)
    ]
    try:
        graphlib.TopologicalSorter(imports_of(package)).prepare()
    except graphlib.CycleError as error:
        found.append(f"rooms import each other: {' <- '.join(error.args[1])}; {ADVICE}")
    return found


def test_imports_go_down_the_table():
    found = violations(PACKAGE)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("config/a.py", "import megatron_psft.data.cache", "config/a.py:1: config may not import data; move"),
        ("config/a.py", "def f():\n    from megatron_psft import hf", "config/a.py:2: config may not import hf; move"),
        ("errors.py", "from megatron_psft.config import schema", "errors.py:1: errors may not import config; move"),
        ("data/a.py", "from megatron_psft.model import gpt", "rooms import each other: "),
        ("utils.py", "", "megatron_psft/utils is not known; put it into a room"),
        ("helpers/__init__.py", "", "megatron_psft/helpers is not known; put it into a room"),
    ],
)
def test_a_planted_import_or_file_is_found(tmp_path, file, text, complaint):
    rooms = {"data": "", "hf": "", "model": "from megatron_psft.data import a", "config": ""}
    for room, content in rooms.items():
        (tmp_path / "megatron_psft" / room).mkdir(parents=True)
        (tmp_path / "megatron_psft" / room / "__init__.py").write_text(content)
    path = tmp_path / "megatron_psft" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert any(complaint in violation for violation in violations(tmp_path / "megatron_psft"))


def test_the_table_itself_has_no_circle():
    graphlib.TopologicalSorter(allowed_imports()).prepare()


@pytest.mark.parametrize("room", allowed_imports())
def test_a_room_says_what_its_line_of_the_table_says(room):
    """So that whoever opens a room need not know of the table."""
    docstring = " ".join((ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or "").split())
    allowed = ", ".join(allowed_imports()[room]) or "no other room"
    allowed = "all other rooms" if room == "cli" else allowed
    assert f"May import {allowed}." in docstring, f"write 'May import {allowed}.' into {room}/__init__.py"


def test_files_have_at_most_400_lines():
    files = [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")]
    lengths = {str(path.relative_to(REPOSITORY)): len(path.read_text().splitlines()) for path in files}
    assert {file: length for file, length in lengths.items() if length > 400} == {}, (
        "divide them by what they are about"
    )


def test_functions_have_at_most_60_lines_and_half_of_them_8():
    lengths = {
        f"{path.relative_to(REPOSITORY)}:{node.lineno}": node.end_lineno - node.lineno + 1
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert {place: length for place, length in lengths.items() if length > 60} == {}, "take steps out into functions"
    assert statistics.median(lengths.values()) <= 8


def test_no_test_is_imported():
    """What several tests need lies in tests/support, or in a file of the room's folder that is no test."""
    for path in sorted((REPOSITORY / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            tests = [name for name in modules if name.startswith("tests.") and ".test_" in name]
            assert not tests, f"{path}:{node.lineno}: move what is shared with {tests[0]} to tests/support"
