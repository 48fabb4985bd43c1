"""Prints the lines of a constraints file whose packages are not installed here.

NVIDIA's images come with a torch and libraries that were built for each other, in versions that PyPI does not have.
What an image brings stays as it is; what it lacks is installed in the tested version.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path


def normalized(name: str) -> str:
    """The name as package indices compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def absent_pins(lines: Iterable[str], installed: Iterable[str]) -> Iterator[str]:
    """Those of `name==version` that are not among the names installed, without comments."""
    present = {normalized(name) for name in installed}
    for line in lines:
        pin = line.split("#")[0].strip()
        if pin and normalized(pin.split("==")[0]) not in present:
            yield pin


if __name__ == "__main__":
    found = [distribution.metadata["Name"] for distribution in distributions()]
    print("\n".join(absent_pins(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines(), found)))  # noqa: T201
