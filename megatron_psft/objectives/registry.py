"""All built-in objectives by name, their settings, and objectives of other packages by MODULE:FUNCTION."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import field
from types import MappingProxyType, ModuleType
from typing import Any, Literal, TypeVar

from megatron_psft.errors import UserError, nearest_name_hint
from megatron_psft.objectives import builtin
from megatron_psft.objectives.declare import (
    Declaration,
    Requirement,
    Setting,
    Settings,
    declaration_of,
    unknown_requirements,
)

_LISTED_FIRST = ("psft", "sft")

_Section = TypeVar("_Section")


def _load_builtin() -> Mapping[str, Declaration]:
    """Reads every file of builtin/: the file is the name, its one decorated function the declaration."""
    found = {}
    for module in pkgutil.iter_modules(builtin.__path__):
        content = importlib.import_module(f"{builtin.__name__}.{module.name}")
        declared = _declared_in(content)
        if len(declared) != 1:
            raise TypeError(f"{content.__file__} must have one function under @objective, not {len(declared)}")
        found[module.name.replace("_", "-")] = declaration_of(declared[0])
    names = [*_LISTED_FIRST, *sorted(found.keys() - set(_LISTED_FIRST))]
    return MappingProxyType({name: found[name] for name in names})


def _declared_in(content: ModuleType) -> list[Callable[..., Any]]:
    return [
        value
        for value in vars(content).values()
        if hasattr(value, "declaration") and value.__module__ == content.__name__  # not one that it imports
    ]


OBJECTIVES = _load_builtin()
"""The built-in ones by name, in the order in which users see them."""

SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {setting.name: setting for declaration in OBJECTIVES.values() for setting in declaration.settings}
)
"""All settings of built-in objectives by name; objectives that share one import the same."""


def find_objective(name: str) -> Declaration:
    """Returns the declaration of a built-in objective, or of the function that MODULE:FUNCTION names, after its import.

    Raises:
        UserError: there is none, or it needs what does not exist.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        choices = ", ".join(OBJECTIVES)
        hint = nearest_name_hint(name, OBJECTIVES)
        raise UserError(f"objective ({name!r}) must be one of {choices}, or MODULE:FUNCTION{hint}")
    declaration = declaration_of(_import_function(name, module, function))
    for setting in declaration.settings:
        if SETTINGS.get(setting.name) != setting:
            raise UserError(
                f"objective ({name}) has a setting {setting.name} that is no flag; remove it, or use one of a built-in "
                f"objective ({', '.join(SETTINGS)})"
            )
    return declaration


def needs_of(name: str, config: Settings) -> frozenset[Requirement]:
    """What objective `name` needs under the settings of `config`.

    Raises:
        UserError: as `find_objective` does.
    """
    needs = find_objective(name).needs(config)
    if unknown := unknown_requirements(needs):
        raise UserError(f"objective ({name}) needs {', '.join(unknown)}, which does not exist; see docs/extending.md")
    if {"records", "ref_top"} <= needs:
        raise UserError(f"objective ({name}) cannot need both records and ref_top; remove one of them")
    return needs


def with_settings(settings: Mapping[str, Setting]) -> Callable[[type[_Section]], type[_Section]]:
    """Below `@dataclass`: gives the class a field for each of these settings, after its own."""

    def add(section: type[_Section]) -> type[_Section]:
        for setting in settings.values():
            kind = Literal[setting.choices] if setting.choices else type(setting.default)
            section.__annotations__[setting.name] = kind
            setattr(section, setting.name, field(default=setting.default, metadata={"help": _help(setting)}))
        return section

    return add


def _help(setting: Setting) -> str:
    owners = [name for name, declaration in OBJECTIVES.items() if setting in declaration.settings]
    return f"{' and '.join(owners)}: {setting.help}"


def _import_function(name: str, module: str, function: str) -> Callable[..., Any]:
    try:
        content = importlib.import_module(module)
    except Exception as error:  # whatever a module of the user's raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"objective ({name}) cannot be imported: {reason}; fix it, or put its folder on PYTHONPATH"
        ) from error
    found = getattr(content, function, None)
    if not callable(found):
        problem = "does not exist" if found is None else "is not a function"
        raise UserError(f"objective ({name}) {problem} in {content.__file__}; name another one")
    return found
