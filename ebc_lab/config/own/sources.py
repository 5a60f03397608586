"""A function by its target, `module:function`: found and hashed without importing anything, then loaded.

Modules are looked for in the working directory first, then where Python looks. What is wrong is a LookupError
whose text is a clause of a sentence.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

NAME = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
TARGET = re.compile(rf"{NAME}(?::{NAME})?")
MADE_AT_RUN_TIME = ("globals", "exec", "__getattr__", "modules")  # a module with these may bind any name
SHOWN = 12  # hex digits of a checksum

_loaded: dict[str, str] = {}  # module -> checksum of its file when this process imported it


@dataclass(frozen=True)
class Source:
    """Where a target is. `name` is the function's in its module, with dots inside a class."""

    module: str
    name: str
    path: Path
    sha256: str  # of the file

    @property
    def target(self) -> str:
        return f"{self.module}:{self.name}"


def find(target: str) -> Source:
    """The source of `module:function` or `module.function`.

    Raises LookupError: no target, no such module, no file of it, or no such name in it.
    """
    if not TARGET.fullmatch(target) or not re.search(r"[.:]", target):
        raise LookupError("a target is written module:function")
    module, colon, name = target.partition(":")
    parts = module.split(".")
    specs = list(_specs(parts))
    if not colon:
        named = max(1, min(len(specs), len(parts) - 1))
        parts, name = parts[:named], ".".join(parts[named:])
    if len(specs) < len(parts):
        raise LookupError(_no_module(".".join(parts[: len(specs) + 1])))
    module = ".".join(parts)
    origin = specs[len(parts) - 1].origin
    if origin is None or not os.path.isfile(origin):
        raise LookupError(f"{module} has no file")
    source = Path(origin).read_bytes()
    if origin.endswith(".py"):
        _must_bind(name.partition(".")[0], source, origin)
    return Source(module, name, Path(origin), hashlib.sha256(source).hexdigest())


def load(target: str, sha256: str) -> Callable[..., Any]:
    """Import a target's function. Raises LookupError: as `find`, and where its file is not the one of this
    checksum, or its name is no function's. What the module itself raises is passed on."""
    source = find(target)
    if source.sha256 != sha256:
        raise LookupError(
            f"{source.path} has changed since the run was planned (its sha256 was {sha256[:SHOWN]}… and is "
            f"{source.sha256[:SHOWN]}…): put the old one back, or plan the run again"
        )
    if _loaded.setdefault(source.module, sha256) != sha256:
        raise LookupError(f"{source.path} has changed since this process imported it: start again")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = importlib.import_module(source.module)
    if Path(module.__file__ or "").resolve() != source.path.resolve():
        raise LookupError(
            f"Python imports {source.module} from {module.__file__}, not from {source.path}: rename yours"
        )
    try:
        found = functools.reduce(getattr, source.name.split("."), module)
    except AttributeError:
        raise LookupError(f"there is no {source.name} in {source.path}") from None
    if not callable(found):
        raise LookupError(f"{source.name} in {source.path} is {type(found).__name__}, not a function")
    return found


def _specs(parts: Sequence[str]) -> Iterator[ModuleSpec]:
    """The specs of a, a.b, a.b.c for the parts of `a.b.c`, as far as they are found."""
    importlib.invalidate_caches()
    places = [os.getcwd(), *sys.path]
    for depth, part in enumerate(parts):
        # by its last part alone: with the whole name, a folder without __init__.py would need its parent
        # imported
        spec = PathFinder.find_spec(part, places)
        if spec is None and not depth:
            spec = _spec_of_others(part)
        if spec is None:
            return
        yield spec
        places = list(spec.submodule_search_locations or ())


def _spec_of_others(name: str) -> ModuleSpec | None:
    """What other finders know of a top-level module: editable installs have their own."""
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # of __main__
        return None


def _no_module(module: str) -> str:
    parent, _, last = module.rpartition(".")
    if parent:
        return f"there is no module {last} in {parent}"
    near = difflib.get_close_matches(module, [path.stem for path in Path.cwd().glob("*.py")], 1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return f"there is no module {module}{meant} in {Path.cwd()} or among the installed packages"


def _must_bind(name: str, source: bytes, origin: str) -> None:
    """Raises LookupError where a module's text shows that it has no such name."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise LookupError(f"{origin} cannot be read: {error}") from None
    bound = set(_bound(tree))
    if name not in bound and not bound & {"*", *MADE_AT_RUN_TIME}:
        near = difflib.get_close_matches(name, bound, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise LookupError(f"there is no {name}{meant} in {origin}")


def _bound(node: ast.AST) -> Iterator[str]:
    """The names that a module binds, and those of `MADE_AT_RUN_TIME` that it uses."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child.name
            continue
        if isinstance(child, ast.alias):
            yield (child.asname or child.name).partition(".")[0]
        elif isinstance(child, ast.Name) and (
            isinstance(child.ctx, ast.Store) or child.id in MADE_AT_RUN_TIME
        ):
            yield child.id
        elif isinstance(child, ast.Attribute) and child.attr in MADE_AT_RUN_TIME:
            yield child.attr
        yield from _bound(child)
