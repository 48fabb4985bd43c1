"""Files and names that the pages mention exist."""

import re

import pytest

from megatron_psft.metrics.table import METRICS
from tests.support.cli import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"(?:[\w-]+/)+[\w.-]*|[\w-]+\.py")
PLACES = ("", "megatron_psft", "docs")
MADE_BY_READERS = ("runs/", "my_objectives.py", "megatron_psft/objectives/builtin/focal.py")
NAMES = re.compile(r"\.?[A-Za-z_]\w*(?:\.\w+)*")
EXAMPLE = re.compile(r"steps?_\w+(\.\w+)*")
OF_OTHERS = {
    "README.md": {".venv"},
    "comparison.md": {"use_cpu"},
    "limits.md": {"ChildFailedError"},
    "miniature.md": {"_sd"},
    "models.md": {
        *("Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"),
        *("longrope", "mistral3", "ministral"),
    },
    "resume.md": {"TORCH_FR_BUFFER_SIZE", "pytorch_model.bin"},
    "tutorial.md": {".venv"},
}
"""Words in code type of a page that are none of the package's."""
WRITTEN = [path for path in PAGES if path.name not in ("data.md", "extending.md")]
"""Pages whose other words in code type are of the package. data.md has keys of other people's data; extending.md adds
names of its own, and tests follow it."""


def words_of(path) -> set[str]:
    """Words in code type, outside of blocks and of tables that are generated."""
    blocks = r"^```.*?^```|<!-- generated: .*?<!-- end -->"
    return set(CODE.findall(re.sub(blocks, "", path.read_text(encoding="utf-8"), flags=re.M | re.S)))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_of_a_page_exist(path):
    words = [word for word in words_of(path) if word.split("/")[0] not in METRICS]  # as valid_nll/NAME
    files = [word for word in words if FILE.fullmatch(word) and not word.startswith(MADE_BY_READERS)]
    missing = [
        file
        for file in files
        if not any((REPOSITORY / place / file).exists() for place in PLACES)
        and not any((REPOSITORY / "megatron_psft").rglob(file))  # in layout.md, below the room of its table
    ]
    assert missing == [], f"{path.name} names files that do not exist"


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Every word of the package's sources."""
    files = (REPOSITORY / "megatron_psft").rglob("*.py")
    return {word for file in files for word in re.findall(r"\w+", file.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_names_of_a_page_exist(path, known):
    words = {word for word in words_of(path) if NAMES.fullmatch(word) and not EXAMPLE.fullmatch(word)}
    unknown = {word for word in words for part in word.split(".") if part and part not in known}
    assert unknown == OF_OTHERS.get(path.name, set()), "a word in code type that the package does not know"


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
