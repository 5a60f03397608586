"""The files that a module of one's own is made of: its own, and those of its folder that it imports."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

OURS = "ebc_lab"  # whose versions are part of a run's identity by other means


def files_of(path: Path, root: Path) -> list[Path]:
    """Return the module in `path`, then every file below `root` that it imports, directly or through others,
    anywhere in its text. What cannot be read as Python imports nothing."""
    files = [path]
    for file in files:  # which grows
        name = list(file.relative_to(root).parent.parts)
        for module in _imported(file, name):
            files += [one for one in _files_named(module, root) if one not in files]
    return files


def _imported(file: Path, package: list[str]) -> Iterator[list[str]]:
    """Yield the names, in parts, of the modules that a file may import: of `from a import b` both a and
    a.b."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            start = [*above, *(node.module.split(".") if node.module else [])]
            yield start
            yield from ([*start, alias.name] for alias in node.names)


def _files_named(module: list[str], root: Path) -> Iterator[Path]:
    """Yield the files of a, a.b and a.b.c for the module a.b.c, as far as they are Python below `root`."""
    if not module or module[0] in sys.stdlib_module_names or module[0] == OURS:
        return
    places = [str(root)]
    for part in module:
        spec = PathFinder.find_spec(part, places)
        if spec is None:
            return
        if spec.origin is not None and spec.origin.endswith(".py"):
            yield Path(spec.origin)
        places = list(spec.submodule_search_locations or ())
