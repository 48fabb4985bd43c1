"""Configurations as a command line or a YAML file gives them."""

from pathlib import Path

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
