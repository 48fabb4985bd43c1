"""The demo's records, rules and verdicts; tests/docs/test_tutorial.py runs `make demo` itself."""

import json
import subprocess
import sys

import pytest

from tests.support.cli import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "examples" / "demo"))

import findings
import general
import tickets
from measure import Answered, Measured


def test_a_seed_gives_the_same_mails_each_with_what_its_ticket_says():
    records = tickets.records(200, seed=5)
    assert records[:50] == tickets.records(50, seed=5)
    for record in records:
        mail, ticket = record["prompt"].lower(), json.loads(record["completion"])
        assert tuple(ticket) == tickets.FIELDS
        for name in ("customer", "order", "product"):
            assert str(ticket[name]).lower() in mail
        assert any(thing in ticket["product"] for thing in tickets.THINGS)
    assert {json.loads(record["completion"])["problem"] for record in records} == set(tickets.PROBLEMS)


def test_no_held_out_mail_is_trained_on():
    trained = tickets.records(30, seed=tickets.HELD_OUT_SEED)  # those that held-out ones are drawn like
    held_out = tickets.held_out(trained)
    assert len(held_out) == tickets.NUM_HELD_OUT
    assert not {record["prompt"] for record in trained} & {record["prompt"] for record in held_out}


@pytest.mark.parametrize(
    ("reply", "fields"),
    [
        ('{"customer": "Mei Xu", "order": 12345, "product": "red rug", "problem": "late", "urgent": true}', 5),
        ('{"urgent": true, "order": 12345, "customer": "Mei Xu", "product": "red rug", "problem": "refund"}', 4),
        ('{"customer": "mei xu", "order": "12345"}', 0),
        ('Here it is: {"customer": "Mei Xu"}', 0),
        ("[1, 2]", 0),
    ],
)
def test_fields_count_where_the_reply_is_a_ticket_and_nothing_else(reply, fields):
    ticket = '{"customer": "Mei Xu", "order": 12345, "product": "red rug", "problem": "late", "urgent": true}'
    assert tickets.right_fields(reply, ticket) == fields


def test_a_ticket_is_no_answer_to_a_general_request():
    request = next(request for request in general.REQUESTS if "France" in request.prompt)
    assert request.is_right("The capital of France is Paris.")
    assert not request.is_right("Parish")
    assert not request.is_right('{"customer": "Paris"}')


def measured(name, *, points, drift):
    """A model that was right, 1, or wrong, 0, on each general request."""
    run = [{"step": 0, "valid_nll/target": 1.0}, {"step": 8, "valid_nll/target": 0.1}]
    run[1] |= {"drift/general": drift, "drift_stderr/general": 0.01, "tokens_per_second": 100.0}
    return Measured(
        name=name,
        tickets=[Answered(f"{tickets.REQUEST}\n\nmail", "{}", 5)],
        general=[Answered(f"request {number}", f"answer of {name}", each) for number, each in enumerate(points)],
        metrics=[] if name == "base" else run,
    )


@pytest.mark.parametrize(
    ("sft", "psft", "drifts", "said"),
    [
        ([1] * 20, [1] * 20, (0.1, 0.11), ("requests: PSFT and SFT are equal", "no difference beyond")),
        (
            [0, 0, 1] + [1] * 17,
            [1] * 20,
            (0.1, 0.05),
            ("PSFT better on 2, worse on 0 (probability 0.5 if", "no clear difference", "PSFT has stayed"),
        ),
        ([0] * 12 + [1] * 8, [1] * 20, (0.1, 0.2), ("PSFT is better here", "SFT has stayed nearer")),
        ([1] * 20, [0] * 9 + [1] * 11, (0.1, 0.1), ("SFT is better here", "no difference beyond")),
    ],
)
def test_a_difference_is_claimed_where_chance_does_not_make_it(sft, psft, drifts, said):
    found = [
        measured("base", points=[1] * 20, drift=0),
        measured("sft", points=sft, drift=drifts[0]),
        measured("psft", points=psft, drift=drifts[1]),
    ]
    text = findings.text(found)
    assert all(part in text for part in said)
    assert f"{sum(psft)}\n" in text.split("general requests right", 1)[1]
    assert "answer of psft" in text


def test_a_model_that_cannot_be_fetched_is_one_line_with_a_way_on(tmp_path):
    """As without a way to the package registry: here its address is wrong, and the cache empty."""
    environment = {"PATH": "", "HOME": str(tmp_path), "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "PIP_CONFIG_FILE": "/dev/null"}
    command = [sys.executable, "examples/demo/run.py"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: SmolLM2 could not be fetched")
    assert "make demo MODEL=DIR|ID" in line
