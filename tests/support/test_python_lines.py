"""`make test-py312` leaves out only what runs on Python 3.12 as it does on 3.11."""

import ast
import re

from tests.support.cli import REPOSITORY

DIFFERENT_THERE = {"megatron", "tokenizers", "transformers"}
"""Libraries of other versions than on 3.11 (tests/nemo/constraints.txt), whose calls change from one to the next."""


def test_rooms_left_out_of_python_312_call_no_library_of_another_version():
    (once,) = re.findall(r"^ONCE = (.*)$", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for name in once.split():
        assert (REPOSITORY / "tests" / name).is_dir(), name
        for path in (REPOSITORY / "megatron_psft" / name).rglob("*.py"):
            assert not _libraries(path) & DIFFERENT_THERE, f"{path}: take {name} out of ONCE in the Makefile"


def _libraries(path) -> set[str]:
    """What a file imports, at its top or within a function, but not for its types alone."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    for_types = [node for node in nodes if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {inner for node in for_types for inner in ast.walk(node)}
    imports = [node for node in nodes if node not in skipped]
    names = [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in imports if isinstance(node, ast.ImportFrom) and node.module]
    return {name.partition(".")[0] for name in names}
