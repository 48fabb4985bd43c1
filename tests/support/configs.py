"""Configurations as a command line or a YAML file gives them."""

from pathlib import Path

from megatron_psft.config.schema import Config, parse_config

REQUIRED = {"load_hf": "hf", "save": "run", "data": "train.jsonl"}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(*flags: str, given_elsewhere: str = "") -> Config:
    """Parses `flags` after the required ones, leaving away the one that they, or their YAML file, give."""
    required = [text for name, value in REQUIRED.items() if name != given_elsewhere for text in (flag(name), value)]
    return parse_config([*required, *flags])


def write_yaml(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)
