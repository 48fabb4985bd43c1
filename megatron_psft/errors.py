"""The exceptions whose text is all that a user needs; every other one is a bug and keeps its traceback."""

import difflib
import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar


class ExplainedError(Exception):
    """The base of errors whose text is all that a user needs: the entry point prints it as one `error:` line."""

    exit_code: ClassVar[int]
    """With which the process ends, so that a job script can tell what to do next."""


class UserError(ExplainedError, ValueError):
    """A mistake in flags, files or data: what has to be fixed before a next start.

    The text names the field, the value found, the rule and the remedy. All ranks raise it together.
    """

    exit_code = 2


class DivergenceError(ExplainedError, ArithmeticError):
    """Loss or gradients are not finite: the same start would end alike. All ranks raise it together, before the update.

    The text names step and rank.
    """

    exit_code = 3


class InfrastructureError(ExplainedError):
    """A peer, a disk or a node was lost: the same start may do better elsewhere or later. All ranks raise it together.

    The text says what was lost while doing what.
    """

    exit_code = 4


class RankError(InfrastructureError):
    """As `InfrastructureError`, but only this rank may know of it: it leaves without waiting for the others."""


def is_shared(error: BaseException) -> bool:
    """Whether all ranks raise it together, and none waits for another."""
    return isinstance(error, ExplainedError) and not isinstance(error, RankError)


_LOST_STORAGE = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.EROFS,  # how a file system answers that was taken out of use after an error
        errno.ESTALE,
        errno.EREMOTEIO,
        errno.ENODEV,
        errno.ENXIO,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
        errno.ECONNRESET,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
    }
)


def storage_error(error: OSError, text: str) -> UserError | InfrastructureError:
    """What to raise, with `text`, for a file that could not be read or written: `InfrastructureError` where the disk is
    full or fails, `UserError` where the path or the rights to it are wrong."""
    return InfrastructureError(text) if error.errno in _LOST_STORAGE else UserError(text)


def folder_error(name: str, folder: Path, error: OSError) -> UserError | InfrastructureError:
    """What to raise (`storage_error`) for a folder, the value of `name`, in which nothing can be written."""
    reason = "a file has this name" if isinstance(error, FileExistsError) else error.strerror
    return storage_error(error, f"{name} ({folder}) must be a folder that can be written: {reason}")


def nearest_name_hint(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean X?` for the known name closest to `name`, or an empty string where none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def first_line(error: BaseException) -> str:
    """What an error says in a line; one that says nothing is told by its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def reason_of(error: BaseException) -> str:
    """What an error says, in a line. Of one of the system the words alone, as whoever quotes it names the path."""
    said = error.strerror if isinstance(error, OSError) else None
    if isinstance(error, FileNotFoundError):  # that of safetensors has the path in its words alone
        said = os.strerror(errno.ENOENT)
    return said or " ".join(str(error).split()) or type(error).__name__


def counted(number: float, unit: str, spec: str = ",") -> str:
    """`1 step`, `1,024 steps`, `0.5 passes`: a number, formatted by `spec`, with its unit, given in the singular."""
    text = format(number, spec)
    if text == "1":
        return f"1 {unit}"
    return f"{text} {unit}{'es' if unit.endswith(('s', 'x', 'ch', 'sh')) else 's'}"


def in_words(names: Iterable[object]) -> str:
    """`a, b and c`."""
    *first, last = map(str, names)
    return f"{', '.join(first)} and {last}" if first else last
