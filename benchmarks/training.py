"""Runs the tests that need a GPU, and prints of each how long it took, how it ended and which numbers it recorded.

Several at a time share the GPU, where pytest-xdist is installed. `--size gpu` runs them; other sizes only collect them.
"""

import importlib.util
import os
import sys
from contextlib import redirect_stdout
from typing import Any, TextIO

import pytest
from common import ROOT, emit, emit_machine, parse_size

TESTS = ROOT / "tests" / "gpu"
AT_A_TIME = 4


class Printer:
    """A plugin of pytest's that prints a figure as each test ends; what pytest prints goes elsewhere."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._setup = out, dict[str, float]()

    def emit(self, name: str, value: float | None, unit: str, **details: Any) -> None:
        with redirect_stdout(self._out):
            emit(name, value, unit, **details)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test has three reports: what it shares with others is made before it, and removed after it."""
        name = report.nodeid.removeprefix("tests/gpu/")
        if report.when == "setup":
            self._setup[name] = report.duration
        if report.when == "call" or report.outcome != "passed":
            reason = {"reason": reason_of(report)} if report.outcome != "passed" else {}
            numbers = dict(report.user_properties)
            setup = round(self._setup.pop(name, 0.0), 2)
            self.emit(name, report.duration, "s", outcome=report.outcome, **reason, setup_seconds=setup, **numbers)


def reason_of(report: pytest.TestReport) -> str:
    """The first line of why a test failed or was skipped."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr) if crash is None else crash.message
    return next(filter(None, map(str.strip, text.splitlines())), "")[:300]


def main() -> int:
    size = parse_size(__doc__)
    emit_machine()
    printer = Printer(sys.stdout)
    words = [
        str(TESTS),
        "-m",
        "gpu",
        "--rootdir",
        str(ROOT),
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "--disable-warnings",
    ]
    os.chdir(ROOT)  # with which the tests' ids begin
    if size != "gpu":
        collected = Collected()
        with redirect_stdout(sys.stderr):
            code = pytest.main([*words, "-q", "--collect-only"], plugins=[collected])
        emit("tests", collected.count, "tests, of which none was run")
        return int(code)
    if importlib.util.find_spec("xdist") is not None:
        words += ["-n", str(AT_A_TIME)]
    with redirect_stdout(sys.stderr):
        code = pytest.main([*words, "-v"], plugins=[printer])
    return int(code)


class Collected:
    """Counts the tests that are there."""

    count = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.count = len(session.items)


if __name__ == "__main__":
    sys.exit(main())
