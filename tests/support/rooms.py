"""The rooms of the package: which imports there are, and which the table in docs/layout.md allows."""

import ast
import re
from collections import defaultdict
from pathlib import Path

from tests.support.cli import REPOSITORY

PACKAGE = REPOSITORY / "megatron_psft"
SHARED = ("errors", "atomic", "lock", "sealed", "progress")
TABLE_LINE = re.compile(r"^\| `(\w+)` \| .* \| ([\w, ]+) \|$", re.MULTILINE)


def allowed_imports() -> dict[str, list[str]]:
    """The rooms that each room may import, in the order of the table, top room first."""
    table = TABLE_LINE.findall((REPOSITORY / "docs" / "layout.md").read_text(encoding="utf-8"))
    everything = [room for room, _ in table]
    named = {"all": everything[1:], "none": []}
    return {room: named[allowed] if allowed in named else allowed.split(", ") for room, allowed in table}


def imports_of(package: Path) -> dict[str, dict[str, list[str]]]:
    """`[importer][imported]`: the places, `file:line`, where a room or file of the top level imports another."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(package.rglob("*.py")):
        importer = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in _imported_names(node, package.name):
                if (package / name).is_dir() or (package / f"{name}.py").is_file():
                    found[importer][name].append(f"{path.relative_to(package.parent)}:{node.lineno}")
        found[importer].pop(importer, None)
    return {importer: dict(imported) for importer, imported in found.items()}


def _imported_names(node: ast.AST, package: str) -> list[str]:
    """What stands right after `megatron_psft.` in an import statement, wherever in a file it is."""
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute here"
        modules = [node.module] if node.module != package else [f"{package}.{alias.name}" for alias in node.names]
    else:
        return []
    return [module.split(".")[1] for module in modules if module.startswith(f"{package}.")]
