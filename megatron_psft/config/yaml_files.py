"""YAML files of settings: read by the core schema of YAML 1.2; what is written means the same in YAML 1.1."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_psft.config.paths import expand_path
from megatron_psft.errors import UserError, reason_of

_INCLUDE = "include"
_SCHEMA = {
    "null": (r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    "int": (r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)", list("-+0123456789")),
    "float": (
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
        list("-+.0123456789"),
    ),
}
"""What a scalar without quotes is, and its first characters (YAML 1.2.2, 10.3.2); all others are text."""


class _Loader(yaml.SafeLoader):
    # PyYAML's own table is that of YAML 1.1, where 010 is 8, 1:30 is 90, 1e-6 is text, and yes is true.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own annotation)


class _Dumper(yaml.SafeDumper):
    """Puts text into quotes that either version of YAML would take for something else."""


def _read_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _read_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(re.sub(r"\.(?=inf|nan)", "", str(loader.construct_scalar(node)).lower()))


for _name, (_pattern, _first) in _SCHEMA.items():
    for _user in (_Loader, _Dumper):
        _user.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern + r"\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _read_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _read_float)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A key of a file and its value."""

    file: Path
    name: Any
    value: object


def read_settings(path: Path, including: tuple[Path, ...] = ()) -> list[Setting]:
    """The settings of a file, those of the files that its `include` names before its own: the last of a name counts.

    `include` is a path or a list of paths, relative to the file that has it; `including` are files that have led here.

    Raises UserError for a file that cannot be read or is no mapping, for a key that is given twice, and for files that
    include each other.
    """
    if path.resolve() in including:
        raise UserError(f"{path} includes itself, through {including[-1]}; remove one include")
    settings = _read_mapping(path)
    found: list[Setting] = []
    for base in _included(path, [setting.value for setting in settings if setting.name == _INCLUDE]):
        found += read_settings(base, (*including, path.resolve()))
    return found + [setting for setting in settings if setting.name != _INCLUDE]


def _included(path: Path, values: list[object]) -> list[Path]:
    bases = []
    for name in (name for value in values for name in (value if isinstance(value, list) else [value])):
        if not isinstance(name, str) or not name:
            raise UserError(f"{path}: {_INCLUDE} ({name!r}) must be a path, or a list of paths")
        bases.append(path.parent / expand_path(_INCLUDE, name))
    return bases


def _read_mapping(path: Path) -> list[Setting]:
    try:
        text = path.read_text(encoding="utf-8")
        # Composed too, as a mapping has lost all but the last of equal names.
        node, content = yaml.compose(text, _Loader), yaml.load(text, _Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read --config {path}: {reason_of(error)}") from error
    if node is None:  # an empty file
        return []
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"--config {path} must map names to values, but holds a {type(content).__name__}")
    names = [key.value for key, _ in node.value]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: {name} is given {names.count(name)} times; keep one")
    return [Setting(file=path, name=name, value=value) for name, value in content.items()]


def dump(values: Mapping[str, object]) -> str:
    """A YAML mapping of these values, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
