"""What pages take from the code is current."""

import json

import pytest

from docs import generate
from docs.model_table import MODEL_NAMES
from megatron_psft.data.files import Row
from megatron_psft.data.formats import PAIR_FORMATS, RECORD_FORMATS, RecordKeys
from megatron_psft.data.pairs import Pair, parse_pair
from megatron_psft.data.records import Record, parse_row
from megatron_psft.model.families import FAMILIES
from tests.support.cli import REPOSITORY


def test_generated_parts_are_current():
    outdated = [path.name for path, text in generate.generated().items() if path.read_text(encoding="utf-8") != text]
    assert outdated == [], "run python -m docs.generate"


def test_every_part_has_a_page():
    pages = "".join(path.read_text(encoding="utf-8") for path in generate.DOCS.glob("*.md"))
    assert [name for name in generate.PARTS if f"<!-- generated: {name} -->" not in pages] == []


@pytest.mark.parametrize("format", RECORD_FORMATS, ids=lambda format: format.name)
def test_the_example_of_a_record_format_is_a_record_in_it(format):
    row = json.loads(format.example)
    assert isinstance(parse_row(Row(source="a:1", value=row), RecordKeys(takes_text=True)), Record)
    assert set(row) <= set(format.all_keys)


@pytest.mark.parametrize("format", PAIR_FORMATS, ids=lambda format: format.name)
def test_the_example_of_a_pair_format_is_a_pair_in_it(format):
    row = json.loads(format.example)
    assert isinstance(parse_pair(Row(source="a:1", value=row), RecordKeys(are_pairs=True)), Pair)
    assert set(row) <= set(format.all_keys)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_a_page_names_all_model_families(page):
    assert MODEL_NAMES.keys() == FAMILIES.keys()
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    assert [name for name in MODEL_NAMES.values() if name not in text] == []
