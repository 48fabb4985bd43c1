"""A name that another trainer has is answered with ours."""

import re
from dataclasses import fields
from typing import get_type_hints

import pytest

from megatron_psft.config.conversion import ConvertConfig
from megatron_psft.config.flags import parse_flags
from megatron_psft.config.foreign_names import TRAINERS
from megatron_psft.config.schema import Config
from megatron_psft.errors import UserError
from tests.support.configs import parse, write_yaml

FIELDS = {field.name for section in get_type_hints(Config).values() for field in fields(section)}
NAMES = [(name, here) for rows in TRAINERS.values() for row in rows for name, here in row.names.items()]


def test_every_counterpart_exists_and_no_name_is_ours():
    for name, here in NAMES:
        assert name not in FIELDS
        assert " " in here or here in FIELDS, name
        assert set(re.findall(r"[a-z]+(?:_[a-z]+)+", here)) <= FIELDS
    assert len({name for name, _ in NAMES}) == len(NAMES)


def test_flags_of_the_tables_exist():
    cells = "".join(row.here for rows in TRAINERS.values() for row in rows)
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]*[a-z])", cells)}
    assert flags <= FIELDS | {"eval_interval"}


@pytest.mark.parametrize(
    ("name", "flag_hint", "key_hint"),
    [
        ("num_train_epochs", "here it is --epochs", "here it is epochs"),
        ("learning-rate", "here it is --lr", "here it is lr"),
        ("data-path", "here it is --data", "here it is data"),
        ("finetune", "here it is --init-from", "here it is init_from"),
        ("data.train_files", "here it is --data", "here it is data"),
        ("warmup_ratio", "here it is --lr-warmup-fraction", "here it is lr_warmup_fraction"),
        ("profile-ranks", "here it is --profile-rank", "here it is profile_rank"),
        ("hidden-size", "the model's config.json says it", "the model's config.json says it"),
        ("enable_dft_loss", "here objective dft", "here objective dft"),
        ("model", "here it is --load-hf", "here it is load_hf"),
    ],
)
def test_the_error_says_our_name(name, flag_hint, key_hint, tmp_path):
    with pytest.raises(UserError) as error:
        parse(f"--{name}", "1")
    assert str(error.value) == f"unknown argument --{name}; {flag_hint}"
    with pytest.raises(UserError) as error:
        parse(f"--{name}=1")
    assert str(error.value) == f"unknown argument --{name}; {flag_hint}"
    with pytest.raises(UserError) as error:
        parse("--config", write_yaml(tmp_path, f"{name}: 1"))
    assert str(error.value).endswith(f"unknown key {name}; {key_hint}")


def test_a_command_that_does_not_train_has_no_such_hint():
    with pytest.raises(UserError, match=r"^unknown argument --learning-rate$"):
        parse_flags(ConvertConfig, ["--learning-rate", "1"])
