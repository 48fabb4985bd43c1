"""Files and names that the pages mention exist."""

import re

import pytest

from tests.support.cli import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"(?:[\w-]+/)+[\w.-]*|[\w-]+\.py")
PLACES = ("", "megatron_psft", "docs")
MADE_BY_READERS = ("runs/", "my_objectives.py", "megatron_psft/objectives/builtin/focal.py")
NAMES = re.compile(r"\.?[A-Za-z_]\w*(?:\.\w+)*")
EXAMPLES = ("step_0000012",)
WRITTEN = ("internals.md", "glossary.md")
"""Pages whose every word in code type is of the package."""


def words_of(path) -> set[str]:
    """Words in code type, outside of blocks."""
    return set(CODE.findall(re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_of_a_page_exist(path):
    files = [word for word in words_of(path) if FILE.fullmatch(word) and not word.startswith(MADE_BY_READERS)]
    missing = [
        file
        for file in files
        if not any((REPOSITORY / place / file).exists() for place in PLACES)
        and not any((REPOSITORY / "megatron_psft").rglob(file))  # in layout.md, below the room of its table
    ]
    assert missing == [], f"{path.name} names files that do not exist"


@pytest.mark.parametrize("name", WRITTEN)
def test_names_of_a_page_exist(name):
    sources = "".join(file.read_text(encoding="utf-8") for file in (REPOSITORY / "megatron_psft").rglob("*.py"))
    known = set(re.findall(r"\w+", sources))
    words = [word for word in words_of(REPOSITORY / "docs" / name) if NAMES.fullmatch(word) and word not in EXAMPLES]
    missing = {word for word in words for part in word.split(".") if part and part not in known}
    assert sorted(missing) == [], f"{name} has words in code type that the package does not know"


def test_internals_find_each_name_in_the_file_they_name():
    """`name` (`file.py`), `name` in `file.py`, and the rows | `name` | `file.py` | of the table."""
    page = (REPOSITORY / "docs" / "internals.md").read_text(encoding="utf-8")
    places = re.findall(r"`(?:\w+\.)?(\w+)`\s(?:\(|in\s|of `\w+` \()(`[\w/]+\.py`)", page)
    for names, files in re.findall(r"^\| (`[^|]*) \| (`[^|]*\.py`) \|", page, re.MULTILINE):
        places += [(name, files) for name in CODE.findall(names)]
    assert len(places) > 30
    missing = [(name, files) for name, files in places if not any(defines(file, name) for file in CODE.findall(files))]
    assert missing == []


def defines(file: str, name: str) -> bool:
    text = (REPOSITORY / "megatron_psft" / file).read_text(encoding="utf-8")
    return re.search(rf"^\s*(def|class) {name}\b", text, re.MULTILINE) is not None
