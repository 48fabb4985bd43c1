"""What each setting may do on resume: every one of them changed alone."""

import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from typing import get_type_hints

import pytest

from megatron_psft.config.resume import FREE, SAME, TOLD, changes_since, settings_of
from megatron_psft.config.schema import Config
from tests.support.configs import other_value, parse

FIELDS = {
    field.name: (section, field) for section, cls in get_type_hints(Config).items() for field in fields(cls)
}  # of those that exist, whatever the table says
REFUSED = [name for names in SAME.values() for name in names]
NAMED = {name: meaning for meaning, names in TOLD.items() for name in names}


def changed(name: str) -> tuple[Config, Config]:
    """A configuration, and the same with another legal value of one field."""
    section, field = FIELDS[name]
    before = parse()
    return before, replace(before, **{section: replace(getattr(before, section), **{name: other_value(field)})})


def test_every_field_has_chosen_what_it_may_do() -> None:
    """A new field fails here until it is in the one table where it belongs."""
    assert Counter([*REFUSED, *NAMED, *FREE]) == Counter(list(FIELDS))


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_field_changed_alone_does_what_the_table_says(name: str) -> None:
    before, now = (settings_of(config) for config in changed(name))
    found = changes_since(before, now)
    assert [(change.name, change.before, change.now) for change in found] == (
        [] if name in FREE else [(name, before[name], now[name])]
    )
    assert [change.is_refused for change in found] == ([] if name in FREE else [name in REFUSED])
    assert [str(change).endswith(f" ({NAMED[name]})") for change in found if name in NAMED] == [True] * (name in NAMED)


def test_a_start_with_the_same_settings_has_changed_nothing() -> None:
    assert changes_since(settings_of(parse()), settings_of(parse())) == []


def test_a_line_has_both_values_as_a_user_writes_them() -> None:
    before = settings_of(parse("--lr", "1e-3", "--train-iters", "4"))
    now = settings_of(parse("--lr", "5e-4", "--epochs", "2", "--valid-data", "a.jsonl", "b.jsonl"))
    assert [str(change).partition(" (")[0] for change in changes_since(before, now)] == [
        "valid_data: unset -> a.jsonl b.jsonl",
        "train_iters: 4 -> unset",
        "epochs: unset -> 2",
        "lr: 0.001 -> 0.0005",
    ]


def test_a_setting_that_an_earlier_release_did_not_have_had_its_default() -> None:
    before = dict(settings_of(parse()))
    del before["clip_ratio_high"], before["lr"]
    assert changes_since(before, settings_of(parse())) == []
    now = settings_of(parse("--clip-ratio-high", "0.3", "--lr", "1e-3"))
    assert [(change.name, change.is_refused) for change in changes_since(before, now)] == [
        ("clip_ratio_high", True),
        ("lr", False),
    ]


def test_a_run_begun_with_a_default_that_has_changed_is_told_how_to_go_on_as_before() -> None:
    """As its config.yaml has it; who sets the value by hand reads the plain line."""
    before = {**settings_of(parse()), "adam_beta2": 0.95}
    assert settings_of(parse())["adam_beta2"] == 0.999
    (change,) = changes_since(before, settings_of(parse()))
    assert not change.is_refused
    assert str(change) == (
        "adam_beta2: 0.95 -> 0.999 (counts from the next step on); the default has changed: "
        "--adam-beta2 0.95 goes on as before"
    )
    assert changes_since(before, settings_of(parse("--adam-beta2", "0.95"))) == []
    (chosen,) = changes_since(before, settings_of(parse("--adam-beta2", "0.9")))
    assert "default" not in str(chosen)


SEVEN = "up_proj gate_proj down_proj o_proj v_proj k_proj q_proj"


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("--lora-rank 4", f"--lora-rank 4 --lora-targets {SEVEN}"),
        ("--lora-rank 4 --lora-targets linear_qkv o_proj", "--lora-rank 4 --lora-targets v_proj,q_proj,o_proj,k_proj"),
        ("--lora-rank 4 --lora-targets q_proj all-linear", "--lora-rank 4"),
        ("--no-packing", "--no-packing --global-batch-unit records"),
        ('--chat-template-kwargs {"a":1,"b":2}', '--chat-template-kwargs {"b":2,"a":1}'),
    ],
)
def test_the_same_spelled_otherwise_is_no_change(before: str, now: str) -> None:
    old, new = (settings_of(parse(*flags.split())) for flags in (before, now))
    assert old != new
    assert changes_since(old, new) == changes_since(new, old) == []


@pytest.mark.parametrize(
    ("before", "now", "names"),
    [
        ("--lora-rank 4 --lora-targets q_proj", "--lora-rank 4 --lora-targets k_proj", ["lora_targets"]),
        ("--lora-rank 4 --lora-targets linear_fc1", "--lora-rank 4 --lora-targets up_proj", ["lora_targets"]),
        ("--lora-rank 4 --lora-alpha 8 --lora-targets q_proj", "--lora-rank 0", ["lora_rank"]),
        ("--lora-rank 4 --lora-alpha 8", "--lora-rank 5 --lora-alpha 9", ["lora_rank", "lora_alpha"]),
        ("--clip-ratio-high 0.2 --old-policy-interval 4", "--objective sft", ["objective"]),
        ("--global-batch-unit records", "", ["global_batch_unit"]),
        ("--global-batch-unit records", "--no-packing", ["global_batch_unit", "packing"]),
    ],
)
def test_a_setting_that_one_side_has_no_use_for_is_not_quoted(before: str, now: str, names: list[str]) -> None:
    old, new = (settings_of(parse(*flags.split())) for flags in (before, now))
    assert sorted(change.name for change in changes_since(old, new)) == sorted(names)


def test_a_setting_of_another_release_alone_is_not_compared() -> None:
    before = {**settings_of(parse()), "of_another_release": 3}
    assert changes_since(before, settings_of(parse())) == []


def test_comparing_settings_loads_no_numeric_library() -> None:
    heavy = {"torch", "numpy", "transformers", "megatron", "megatron.core", "datasets"}
    script = f"import sys, megatron_psft.config.resume; print(*{heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).split() == []
