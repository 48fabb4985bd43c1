"""How to add a record format by docs/extending.md, followed as it is written in a copy of the repository."""

import json
import sys

import pytest

from tests.support.extending import copy_repository, follow, run


@pytest.mark.slow
def test_a_record_format_is_added_in_one_place(tmp_path):
    checkout = copy_repository(tmp_path)
    follow(checkout, "A record format")
    assert "| dialog | `dialog` |" in (checkout / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [{"dialog": ["Hi?", "Yes."]}, {"dialog": ["Hi?", 7]}, {"dialogs": []}]
    (checkout / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = (
        "from megatron_psft.data.records import read_records; "
        "print(*read_records(['a.jsonl'], field='data'), sep='\\n')"
    )
    records, bad = run([sys.executable, "-c", code], checkout).splitlines()
    assert "{'role': 'assistant', 'content': 'Yes.'}" in records
    assert "dialog[1] has content of type int" in bad
    assert "instruction and output; dialog; text; did you mean dialog?" in bad
