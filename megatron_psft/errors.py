"""The exceptions whose text is all that a user needs; every other one is a bug and keeps its traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in flags, files or data.

    The text names the field, the value found, the rule and the remedy. All ranks raise it together; the entry point
    prints it as one `error:` line and exits with code 2.
    """


class RankError(Exception):
    """What went wrong around the program, as a peer that is gone or a disk that fails, and only this rank may know of.

    The entry point prints it as this rank's `error:` line and leaves with code 2 without waiting for the other ranks.
    """


def nearest_name_hint(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean X?` for the known name closest to `name`, or an empty string where none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""
