"""A tree of dataclasses as command-line flags and as a flat YAML file. Knows no field by name.

The root's fields are sections, and a section's fields are the flags; the string below a field is its help text, which
text under `help` in the field's metadata continues, or stands for where a field was added to a class. `presets` there
has, for a value of the field, values of other fields, which whatever is said of these wins over.
"""

import argparse
import ast
import functools
import inspect
import json
import math
import os
import signal
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import argcomplete
from argcomplete.completers import ChoicesCompleter

from megatron_psft.config.foreign_names import foreign_name_hint
from megatron_psft.config.paths import PathText, escape_path, expand_path
from megatron_psft.config.yaml_files import read_settings
from megatron_psft.errors import ExplainedError, UserError, nearest_name_hint, storage_error
from megatron_psft.objectives.declare import Range

_Root = TypeVar("_Root")
_RULES: dict[object, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a non-empty string",
}
_METAVARS = {int: "N", float: "F", str: "TEXT"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def require_at_least(minimum: float, section: object, *names: str) -> None:
    """Raises UserError where one of the named fields is set and below `minimum` (or not a number)."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not value >= minimum:
            raise UserError(f"{name} ({value}) must be at least {minimum}")


def require_positive(section: object, *names: str) -> None:
    """Raises UserError where one of the named fields is not above 0."""
    for name in names:
        value = getattr(section, name)
        if not value > 0:
            raise UserError(f"{name} ({value}) must be greater than 0")


def require_range(values: Range | None, section: object, name: str) -> None:
    """Raises UserError where the named number is out of range; None allows any."""
    if values in ("positive", "positive probability"):
        require_positive(section, name)
    if values == "non-negative":
        require_at_least(0, section, name)
    value = getattr(section, name)
    if values in ("probability", "positive probability") and not 0 <= value <= 1:
        raise UserError(f"{name} ({value}) must be a probability, between 0 and 1")


def require_absent(section: object, name: str, kind: Literal["file", "folder"] = "file") -> None:
    """Raises UserError where the path that the named field holds exists."""
    path = getattr(section, name)
    if os.path.exists(path):
        raise UserError(f"{name} ({path}) must not exist; remove it, or name another {kind}")


def run_command(
    root: type[_Root],
    command: Callable[[_Root], int | None],
    argv: Sequence[str],
    *,
    prog: str | None = None,
    epilog: str,
) -> int:
    """Runs `command` with what `parse_flags` builds; returns its exit code (0 where it has none), or that of an error
    that is explained, as 2 after a user's mistake, which is printed as one `error:` line. So is a disk that fails or is
    full, with 4. Ctrl-C ends it with 130."""
    try:
        return command(parse_flags(root, argv, prog=prog, epilog=epilog)) or 0
    except (ExplainedError, OSError) as error:
        explained = error if isinstance(error, ExplainedError) else storage_error(error, str(error))
        if isinstance(error, OSError) and isinstance(explained, UserError):
            raise  # nobody has said what the user's mistake is
        print(f"error: {explained}", file=sys.stderr)  # noqa: T201
        return explained.exit_code
    except KeyboardInterrupt:
        print("ended by SIGINT", file=sys.stderr)  # noqa: T201
        return 128 + signal.SIGINT


def parse_flags(root: type[_Root], argv: Sequence[str], *, prog: str | None = None, epilog: str | None = None) -> _Root:
    """Builds `root` from `argv` and, below it in rank, the YAML file it names with --config. `prog` (the script's name
    if None) begins the help, and `epilog` ends it.

    Raises UserError for unknown names, wrong types, missing fields, and whatever a section's `__post_init__` refuses.
    """
    known = _flag_fields(root)
    parser = _build_parser(root, prog, epilog)
    argcomplete.autocomplete(parser)  # answers a shell that asks how a flag goes on, and ends; else does nothing
    namespace, unknown = parser.parse_known_args(_without_booleans(argv, known))
    if unknown:
        name = unknown[0].split("=")[0]
        hint = foreign_name_hint(name, known, as_flags=True) if name.startswith("-") else ""
        raise UserError(f"unknown argument {name}{hint or nearest_name_hint(name, map(_flag, ['config', *known]))}")
    given = vars(namespace)
    path = given.pop("config")
    stated = {} if path is None else _read_yaml(Path(expand_path("config", path)), known)
    for name, text in given.items():
        stated[name] = _convert(known[name], _read_number(known[name], (int, float), text))
    missing = [_flag(name) for name in _missing(known, stated)]
    if missing:
        raise UserError(f"missing {', '.join(missing)}; give them as flags or in the --config file")
    return _build(root, known, stated)


def from_values(root: type[_Root], given: Mapping[str, Any]) -> _Root:
    """Builds `root` from Python values by field name; paths may be `os.PathLike`, and tuples stand for lists.

    Raises UserError as `parse_flags` does.
    """
    known, stated = _flag_fields(root), {}
    for name, value in given.items():
        if name not in known:
            hint = foreign_name_hint(name, known, as_flags=False) or nearest_name_hint(name, known)
            raise UserError(f"unknown setting {name}{hint}")
        stated[name] = _convert(known[name], _plain(value))
    missing = _missing(known, stated)
    if missing:
        raise UserError(f"missing {', '.join(missing)}; give them as arguments")
    return _build(root, known, stated)


def _plain(value: object) -> object:
    """As YAML has it."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _missing(known: dict[str, Field[Any]], stated: dict[str, Any]) -> list[str]:
    return [name for name, field in known.items() if field.default is MISSING and name not in stated]


def _build(root: type[_Root], known: dict[str, Field[Any]], stated: dict[str, Any]) -> _Root:
    values = {name: field.default for name, field in known.items() if field.default not in (MISSING, None)}
    values |= _preset_values(known, stated) | stated
    values = {name: _expand(known[name], value) for name, value in values.items()}
    sections = {
        name: section(**{field.name: values[field.name] for field in fields(section) if field.name in values})
        for name, section in get_type_hints(root).items()
    }
    return root(**sections)


def _preset_values(known: dict[str, Field[Any]], stated: dict[str, Any]) -> dict[str, Any]:
    """Values of other fields that the value of a stated field stands for, by `presets` in its metadata."""
    values: dict[str, Any] = {}
    for name, value in stated.items():
        values |= known[name].metadata.get("presets", {}).get(value, {})
    return values


def _flag_fields(root: type) -> dict[str, Field[Any]]:
    return {field.name: field for section in get_type_hints(root).values() for field in fields(section)}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _without_booleans(argv: Sequence[str], known: dict[str, Field[Any]]) -> list[str]:
    """`--flag true|false`, and with `=`, as `--flag` or `--no-flag`, which are argparse's own."""
    names = {_flag(name): name for name, field in known.items() if _kinds(field) == [bool]}
    words, waiting = [], list(argv)
    while waiting:
        word = waiting.pop(0)
        flag, equals, text = word.partition("=")
        if flag in names and (equals or (waiting and not waiting[0].startswith("-"))):
            text = text if equals else waiting.pop(0)
            if text.lower() not in ("true", "false"):
                raise UserError(f"{names[flag]} ({text!r}) must be true or false")
            word = flag if text.lower() == "true" else flag.replace("--", "--no-", 1)
        words.append(word)
    return words


def _build_parser(root: type, prog: str | None, epilog: str | None) -> _Parser:
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [--config FILE.yaml] FLAGS",
        allow_abbrev=False,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # an epilog's examples keep their lines
    )
    text = (
        "YAML file that holds any of the flags below, with underscores in their names, and `include`, a file or a list "
        "of files whose settings count where its own say nothing; the command line wins"
    )
    parser.add_argument("--config", metavar="FILE.yaml", help=text)
    docs = field_docs(root)
    for name, section in get_type_hints(root).items():
        group = parser.add_argument_group(name, inspect.getdoc(section))
        for field in fields(section):
            flag = group.add_argument(_flag(field.name), default=argparse.SUPPRESS, **_argument_options(field, docs))
            choices = [choice for kind in _kinds(field) for choice in get_args(kind) if get_origin(kind) is Literal]
            if choices:
                flag.completer = ChoicesCompleter(dict.fromkeys(choices, ""))  # type: ignore[attr-defined]
    return parser


def _argument_options(field: Field[Any], docs: dict[str, str]) -> dict[str, Any]:
    default = "required" if field.default is MISSING else f"default: {field.default}"
    suffix = "" if field.default in (None, ()) else f" ({default})"
    text = " ".join(text for text in (docs.get(field.name), field.metadata.get("help")) if text)
    options: dict[str, Any] = {"help": (text + suffix).replace("%", "%%")}
    kinds = _kinds(field)
    if kinds == [bool]:
        return options | {"action": argparse.BooleanOptionalAction}
    if get_origin(kinds[0]) is tuple:
        options["help"] = f"{options['help'].removesuffix('.')}. Given several times, it adds up."
        return options | {"nargs": "+", "metavar": "TEXT", "action": "extend"}
    choices = [_METAVARS[kind] if kind in _METAVARS else "|".join(get_args(kind)) for kind in kinds]
    return options | {"metavar": "|".join(choices)}


def field_docs(root: type) -> dict[str, str]:
    """Returns the string below each field, by field name, read from the source of the sections' classes."""
    docs: dict[str, str] = {}
    for section in get_type_hints(root).values():
        for owner in reversed(section.__mro__[:-1]):  # a class's own string counts before that of a class it extends
            docs |= _docs_by_class(owner.__module__)[owner.__name__]
    return docs


@functools.cache
def _docs_by_class(module: str) -> dict[str, dict[str, str]]:
    """Of each class of a module, the string below each of its fields."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: _docs(node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _docs(node: ast.ClassDef) -> dict[str, str]:
    docs = {}
    for statement, below in pairwise(node.body):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


def _read_yaml(path: Path, known: dict[str, Field[Any]]) -> dict[str, Any]:
    values = {}
    for setting in read_settings(path):
        name = setting.name
        if name not in known:
            hint = foreign_name_hint(str(name), known, as_flags=False) or nearest_name_hint(str(name), known)
            raise UserError(f"{setting.file}: unknown key {name}{hint}")
        # Numbers in quotes count as numbers, for fractions only: 1e-6 needs quotes for other readers of YAML.
        values[name] = _convert(known[name], _read_number(known[name], (float,), setting.value))
    return values


def _kinds(field: Field[Any]) -> list[Any]:
    """Returns the types a field's value may have, None left out."""
    is_union = get_origin(field.type) in (Union, types.UnionType)
    kinds: Sequence[Any] = get_args(field.type) if is_union else [field.type]
    plain = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds]
    return [kind for kind in plain if kind is not types.NoneType]


def is_path(field: Field[Any]) -> bool:
    """Whether the field holds paths (`PathText`)."""
    return field.type == PathText or PathText in get_args(field.type)


def _expand(field: Field[Any], value: Any) -> Any:
    """Returns `value` with `~` and environment variables replaced, where it is a path or several."""
    if not is_path(field) or value is None:
        return value
    return (
        tuple(expand_path(field.name, path) for path in value)
        if isinstance(value, tuple)
        else expand_path(field.name, value)
    )


def as_given(field: Field[Any], value: Any) -> Any:
    """Returns what a file gives for the field to have `value`."""
    if not is_path(field) or value is None:
        return value
    return tuple(map(escape_path, value)) if isinstance(value, tuple) else escape_path(value)


def _read_number(field: Field[Any], numbers: tuple[type, ...], value: object) -> object:
    """Returns the number that text stands for, where the field takes one of these types; else `value` as it is."""
    for kind in _kinds(field):
        if kind in numbers and isinstance(value, str) and "_" not in value:
            with suppress(ValueError):
                return kind(value)
    return value


def _convert(field: Field[Any], value: object) -> object:
    """Returns `value` in the field's type, or raises UserError."""
    if value is None and field.default is None:
        return None
    kinds = _kinds(field)
    if isinstance(value, dict) and field.metadata.get("is_json"):
        value = json.dumps(value)  # a flag has it as text, and YAML has a way of its own
    if get_origin(kinds[0]) is tuple and isinstance(value, str):
        value = [value]
    for kind in kinds:
        if _matches(kind, value):
            if kind is float and isinstance(value, int):
                return float(value)
            return tuple(value) if isinstance(value, list) else value
    raise UserError(f"{field.name} ({value!r}) must be {' or '.join(map(_rule, kinds))}")


def _matches(kind: object, value: object) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_matches(str, item) for item in value)
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if isinstance(value, bool):  # a bool is an int to isinstance
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    assert isinstance(kind, type)
    return isinstance(value, kind) and value != ""


def _rule(kind: object) -> str:
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    return "a list of non-empty strings" if get_origin(kind) is tuple else _RULES[kind]
