"""Version bounds are those of the constraints that tests run with, and pages name the same ones."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.support.cli import REPOSITORY

PINS = [*sorted((REPOSITORY / "constraints").glob("py3*.txt")), REPOSITORY / "tests" / "nemo" / "constraints.txt"]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BOUNDED = [one for one in map(Requirement, PROJECT["dependencies"]) if one.specifier]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/tutorial.md")
MINORS = [f"0.{minor}" for minor in range(10, 30)]
"""Of Megatron-Core, with room on both sides."""


def pinned_versions(name: str) -> list[Version]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in PINS)
    return sorted(map(Version, re.findall(rf"^{re.escape(name)}==(\S+)", text, re.MULTILINE)))


@pytest.mark.parametrize("requirement", BOUNDED, ids=lambda requirement: requirement.name)
def test_the_lower_bound_is_the_oldest_minor_version_that_is_tested(requirement):
    tested = pinned_versions(requirement.name)
    (lower,) = (Version(one.version) for one in requirement.specifier if one.operator == ">=")
    assert lower <= tested[0]
    assert lower.release[:2] == tested[0].release[:2]
    assert all(version in requirement.specifier for version in tested)


def test_megatron_core_has_no_minor_version_that_is_not_tested():
    (bounds,) = (one.specifier for one in BOUNDED if one.name == "megatron-core")
    allowed = [minor for minor in MINORS if any(f"{minor}.{patch}" in bounds for patch in range(5))]
    assert allowed == [f"{version.major}.{version.minor}" for version in pinned_versions("megatron-core")]


def test_python_is_what_constraints_are_for():
    pinned = [f"3.{path.stem.removeprefix('py3')}" for path in PINS[:2]]
    bounds = SpecifierSet(PROJECT["requires-python"])
    assert [version for version in (f"3.{minor}" for minor in range(8, 20)) if version in bounds] == pinned
    assert [one.split()[-1] for one in PROJECT["classifiers"] if "Python :: 3." in one] == pinned
    for page in PAGES:
        assert f"Python {' or '.join(pinned)}" in (REPOSITORY / page).read_text(encoding="utf-8")


def test_the_readme_names_the_versions_that_ran():
    text = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    oldest, newest = pinned_versions("megatron-core")
    assert f"megatron-core {oldest} (Python 3.11) and {newest} (Python 3.12)" in text
