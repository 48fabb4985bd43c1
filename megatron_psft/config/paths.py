"""Paths in settings: `~` and environment variables mean the same in each of them."""

import os
import re
from typing import Annotated

from megatron_psft.errors import UserError, nearest_name_hint

PathText = Annotated[str, "path"]
"""Type of a field that holds a path, or what may be one, such as a hub ID; `expand_path` is applied to it."""

_VARIABLE = re.compile(r"\$(?:(\$)|(\w+)|\{([^{}]*)\}|(\{))")


def expand_path(field: str, text: str) -> str:
    """`~`, `~USER`, `$NAME` and `${NAME}` are replaced as a shell does; `$$` is one `$`.

    Raises UserError, which names the configuration's `field`, where a variable is not set or a user has no home.
    """

    def value_of(match: re.Match[str]) -> str:
        escaped, *names, unclosed = match.groups()
        if unclosed:
            raise UserError(f"{field} ({text}) has a ${{ without its }}; close it, or write $$ for a $ in a name")
        name = next((name for name in names if name is not None), "")
        if escaped:
            return "$"
        if not os.environ.get(name):
            state = "empty" if name in os.environ else "not set"
            raise UserError(
                f"{field} ({text}) names the environment variable {name or '{}'}, which is {state}"
                f"{nearest_name_hint(name, os.environ)}; set it, or write $$ for a $ in a name"
            )
        return os.environ[name]

    path = os.path.expanduser(_VARIABLE.sub(value_of, text))
    if path.startswith("~"):
        home = path.split("/")[0]
        raise UserError(
            f"{field} ({text}) begins with {home}, which is nobody's home here; write ./{path} for that name"
        )
    return path


def escape_path(path: str) -> str:
    """The text of which `expand_path` makes `path`, which itself has made."""
    return path.replace("$", "$$")
