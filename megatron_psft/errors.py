"""The one exception that means "the user can fix this"."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in flags, files or data.

    The text names the field, the value found, the rule and the remedy. The entry point prints it as one `error:` line
    and exits with code 2; every other exception is a bug and keeps its traceback.
    """


def nearest_name_hint(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean X?` for the known name closest to `name`, or an empty string where none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""
