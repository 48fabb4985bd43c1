"""Flags, commands and make's targets that pages name exist."""

import ast
import re

import pytest

from megatron_psft.cli.main import COMMANDS
from megatron_psft.config.foreign_names import TRAINERS
from tests.support.cli import REPOSITORY

SCHEDULERS = ("kubernetes", "slurm")
"""Examples whose pages name flags of their own commands."""
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *(path for path in sorted((REPOSITORY / "examples").rglob("README.md")) if path.parent.name not in SCHEDULERS),
]
SOURCES = [
    path for folder in ("megatron_psft", "benchmarks", "examples") for path in (REPOSITORY / folder).rglob("*.py")
]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*+(?!<Tab>)")
GENERATED = re.compile(r"<!-- generated: .*?<!-- end -->", re.DOTALL)
ELSEWHERE = {
    "--nproc-per-node": "torchrun",
    "--nnodes": "torchrun",
    "--shutdown-timeout": "torchrun",
    "--prefix": "torchfrtrace",
    "--sft": "Megatron-LM",
    "--no-deps": "pip",
    "--kill-on-bad-exit": "srun",
}
"""Flags of other programs."""
EXAMPLES = {"--focal-gamma"}
"""Flags that readers of docs/extending.md add."""


def own_flags() -> set[str]:
    """Of the dataclasses that commands are parsed into, of declared objectives, and of argparse in scripts."""
    flags = {"--help", "--version"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names = [one.target.id for one in node.body if isinstance(one, ast.AnnAssign)]
            elif isinstance(node, ast.Call):
                names = [
                    one.value.removeprefix("--")
                    for one in [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "name")]
                    if isinstance(one, ast.Constant) and isinstance(one.value, str)
                ]
            else:
                continue
            flags |= {f"--{prefix}{name.replace('_', '-')}" for name in names for prefix in ("", "no-")}
    return flags


KNOWN = own_flags()


def exists(flag: str) -> bool:
    """Whether it is a flag, or what some flags begin with (`--overlap-*`)."""
    return flag in KNOWN or (flag.endswith("-") and any(one.startswith(flag) for one in KNOWN))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_flags_of_a_page_exist(path):
    flags = set(FLAG.findall(GENERATED.sub("", path.read_text(encoding="utf-8"))))
    assert sorted(flag for flag in flags - ELSEWHERE.keys() - EXAMPLES if not exists(flag)) == []


def test_flags_of_the_migration_tables_exist():
    here = " ".join(row.here for rows in TRAINERS.values() for row in rows)
    assert sorted(flag for flag in set(FLAG.findall(here)) if not exists(flag)) == []


@pytest.mark.parametrize("flag", ["--global-batch", "--no-such-flag", "--learning-rate", "--overlapping-"])
def test_a_flag_that_does_not_exist_is_noticed(flag):
    assert not exists(flag)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_commands_of_a_page_exist(path):
    text = path.read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for name in re.findall(r"(?:`|bin/|^)psft ([a-z]+)\b", text, re.MULTILINE)} <= COMMANDS.keys()
    assert set(re.findall(r"(?:`|^)make ([a-z0-9-]+)", text, re.MULTILINE)) <= set(targets)
