"""With which code a training process ends, and how a job script behind torchrun, which ends with 1, learns it."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_psft.errors import ExplainedError, InfrastructureError, UserError, storage_error

EXIT_BUG = 1
"""Python's own, after a traceback."""
EXIT_SIGNALLED = 128
"""Plus the signal's number, as shells have it: 130 after Ctrl-C, 143 after SIGTERM."""

FILE_VARIABLE = "PSFT_EXIT_CODE_FILE"
"""Names a file that does not exist: the first rank that fails writes its code there."""


def exit_code_of(error: BaseException) -> int:
    """The exit code of a process that `error` ends."""
    if isinstance(error, ExplainedError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_SIGNALLED + signal.SIGINT
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return error.code or 0
    if isinstance(error, OSError) and isinstance(storage_error(error, ""), InfrastructureError):
        return InfrastructureError.exit_code
    return EXIT_BUG


def check_file() -> None:
    """Raises UserError where `leave` could not write."""
    path = os.environ.get(FILE_VARIABLE)
    if path and not os.path.isdir(os.path.dirname(path) or "."):
        raise UserError(f"{FILE_VARIABLE} ({path}) must be a file in an existing folder; create the folder")


def leave(code: int) -> None:
    """Writes a code other than 0 for the job script, unless another rank has done so: its failure was the first, and
    what follows comes of it. On storage that all nodes share, that is so over all of them."""
    path = os.environ.get(FILE_VARIABLE)
    if not path or code == 0:
        return
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(f"{code}\n")
    except FileExistsError:
        pass
    except OSError as error:  # as on a full disk, which may be what has ended the run
        print(f"{FILE_VARIABLE} ({path}) cannot be written: {error.strerror}", file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def left_behind() -> Iterator[None]:
    """Leaves the code of an exception that passes through, at once: what is taken down after it may hang."""
    try:
        yield
    except BaseException as error:
        leave(exit_code_of(error))
        raise
