"""Builds every recipe and checks it for eight ranks:
`WORLD_SIZE=8 python -m tests.nemo.cpu tests.nemo.build_recipes QUESTION.json`.

Prints one JSON line: what the fields that the question names are in each recipe, by recipe and field; and what becomes
of a recipe that is built by the example's command line, by its name in the question.
"""

import json
from pathlib import Path
from typing import Any

from megatron.bridge.training.config import ConfigContainer, runtime_config_update

from examples.nemo import finetune_psft
from megatron_psft.config.flags import parse_flags
from megatron_psft.errors import UserError
from megatron_psft.nemo import recipes


def field_of(config: ConfigContainer, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value if isinstance(value, (bool, int, float, type(None))) else str(value)


def check(config: ConfigContainer) -> None:
    """As at the start of a run, apart from what only Transformer Engine has."""
    config.model.apply_rope_fusion = config.model.moe_permute_fusion = False
    runtime_config_update(config)


def outcome_of(argv: list[str], fields: list[str]) -> dict[str, Any]:
    """Of the example's command line: fields of what it would train with, once that is checked, or the error."""
    try:
        config = finetune_psft.build_recipe(parse_flags(finetune_psft.FinetuneConfig, argv).run)
        check(config)
    except UserError as error:
        return {"error": str(error)}
    return {name: field_of(config, name) for name in fields}


def main(argv: list[str]) -> None:
    question = json.loads(Path(argv[0]).read_text())
    answer: dict[str, Any] = {}
    for name, fields in question["recipes"].items():
        config = getattr(recipes, name)()
        answer[name] = {field: field_of(config, field) for field in fields}
        check(config)
    for name, (argv, fields) in question["commands"].items():
        answer[name] = outcome_of(argv, fields)
    print(json.dumps(answer))  # noqa: T201
