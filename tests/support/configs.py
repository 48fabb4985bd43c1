"""Configurations as a command line or a YAML file gives them."""

from dataclasses import Field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from megatron_psft.config.schema import Config, parse_config

REQUIRED = {"load_hf": "hf", "save": "run", "data": "train.jsonl"}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(*flags: str, given_elsewhere: str = "") -> Config:
    """Parses `flags` after the required ones, without those that they, or their YAML file, give."""
    required = {flag(name): value for name, value in REQUIRED.items() if name != given_elsewhere}
    missing = [text for name, value in required.items() if name not in flags for text in (name, value)]
    return parse_config([*missing, *flags])


def write_yaml(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def two_texts(name: str) -> tuple[str, str]:
    """Legal members of the field `name`, which is a list."""
    known = {"recompute_modules": ("mlp", "moe"), "lora_targets": ("q_proj", "v_proj")}
    return known.get(name, ("a.jsonl", "b.jsonl"))


def other_value(field: Field) -> Any:
    """Returns a legal value that is not the field's default."""
    kind = next(kind for kind in get_args(field.type) or [field.type] if kind is not NoneType)
    if isinstance(kind, str) or get_origin(kind) is Literal:  # the first choice, or Literal within a union
        choices = get_args(field.type) if isinstance(kind, str) else get_args(kind)
        return next(choice for choice in choices if choice != field.default)
    if get_origin(field.type) is tuple:
        return two_texts(field.name)
    if field.name == "chat_template_kwargs":
        return '{"enable_thinking": false}'
    if kind is bool:
        return not field.default
    if kind is int:
        return (field.default or 5) + 1
    return (field.default or 1.0) / 2 if kind is float else "other"
