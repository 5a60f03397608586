"""Locates and hashes the function of a target, `module:function`, without importing it, then loads it.

Modules are searched for in the remembered places, then in the working directory, then in Python's own path. A
remembered place is a file that a target named by its path, or a folder, such as the study's copies of source
files in a worker. Errors are LookupErrors whose message is a clause for the caller to complete.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PathDistribution
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import nearest

OURS = "ebc_lab"
PLACES = "EBC_LAB_OWN"  # environment variable, by which child processes find the same files
NAME = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
TARGET = re.compile(rf"{NAME}(?::{NAME})?")
BY_PATH = re.compile(rf"(?P<file>.+\.py):(?P<name>{NAME})", re.DOTALL)
DEFINES = re.compile(r"^(?:async\s+)?(?:def|class)\s+(\w+)", re.MULTILINE)  # at the top of a module
BINDS_ANY_NAME = re.compile(r"\b(?:globals|exec|__getattr__|sys)\b|\bimport\s*\*")  # may define any name
RELEASED = (OURS, "torch")  # their versions are in every run's identity anyway
SHOWN = 12  # hex digits of a checksum in messages

_loaded: dict[str, str] = {}  # module -> sha256 of its file when this process imported it
_files: set[str] = set()  # resolved paths of all own files imported by this process


@dataclass(frozen=True)
class Source:
    """The location of a target's function. `name` is its name in the module, dotted if inside a class."""

    module: str
    name: str
    path: Path  # the module's file
    line: int | None  # of the function in this file; None if the text does not show it
    root: Path  # the folder that the names of `files` are relative to
    files: Mapping[str, Path]  # the module's and those it imports below `root`; empty if it is installed
    sha256: str  # of the module's file, or of all `files` if there are several

    @property
    def target(self) -> str:
        """Return the target as `module:function`."""
        return f"{self.module}:{self.name}"

    @property
    def place(self) -> str:
        """Return where the function is, such as `my_opt.py:12`, or `my_opt.py` if the line is unknown."""
        return self.path.name if self.line is None else f"{self.path.name}:{self.line}"


def placed(target: str) -> str:
    """Return `my_opt:Cautious` for a target with the path of its file, such as `./my_opt.py:Cautious`, and
    remember the file. Return other targets unchanged. Raises LookupError if the file is unusable."""
    path = file_of(target)
    if path is None:
        if target.endswith(".py") and ":" not in target:
            raise LookupError(f"which function of that file is not said: write {target}:NAME")
        return target
    if not path.is_file():
        meant = nearest(path.stem, [one.stem for one in path.parent.glob("*.py")])
        raise LookupError(f"there is no {path.name}{meant} in {path.parent}")
    if not path.stem.isidentifier():
        raise LookupError(
            f"{path.name} cannot be imported by Python: rename it with letters, digits and _ alone"
        )
    remember(path)
    return f"{path.stem}:{target.rpartition(':')[2]}"


def file_of(target: str) -> Path | None:
    """Return the absolute path of the file that a target names, or None if the target names a module."""
    written = BY_PATH.fullmatch(target)
    return Path(os.path.abspath(Path(written["file"]).expanduser())) if written else None


def remember(place: Path) -> None:
    """Add a place to search before the working directory: a folder with modules, or a file that is the module
    of the file's name. Child processes inherit the remembered places."""
    place = Path(os.path.abspath(place))
    places = [one for one in _remembered() if one != place and (place.is_dir() or one.name != place.name)]
    if place.parent != Path.cwd() or place.is_dir():
        places.insert(0, place)
    os.environ[PLACES] = os.pathsep.join(map(str, places))


def _remembered() -> list[Path]:
    return [Path(one) for one in os.environ.get(PLACES, "").split(os.pathsep) if one]


def find(target: str) -> Source:
    """Return the source of a target, `module:function`, `module.function` or `path/module.py:function`.

    Raises LookupError if the target is malformed, or its module is not found, has no file or lacks the name.
    """
    target = placed(target)
    if not TARGET.fullmatch(target) or not re.search(r"[.:]", target):
        raise LookupError("a target is written module:function or ./file.py:function")
    module, colon, name = target.partition(":")
    parts = module.split(".")
    remembered = [one for one in _remembered() if one.stem == parts[0] or one.is_dir()]
    folders = [one.parent if one.suffix == ".py" else one for one in remembered]
    places = list(map(str, [*folders, Path.cwd()]))
    importlib.invalidate_caches()
    specs = list(_specs(parts, [*places, *sys.path]))
    if not specs:
        with suppress(ValueError):  # `__main__` has no spec
            found = importlib.util.find_spec(parts[0])  # editable installs have their own finder
            specs = [found, *_specs(parts[1:], found.submodule_search_locations or [])] if found else []
    if not colon:
        named = max(1, min(len(specs), len(parts) - 1))
        parts, name = parts[:named], ".".join(parts[named:])
    if len(specs) < len(parts):
        raise LookupError(_no_module(".".join(parts[: len(specs) + 1])))
    module = ".".join(parts)
    origin = specs[len(parts) - 1].origin
    if origin is None or not os.path.isfile(origin):
        raise LookupError(f"{module} has no file")
    path = Path(origin)
    line = _line_of(name.partition(".")[0], path) if path.suffix == ".py" else None
    root = path.parents[len(parts) - 1 + (path.name == "__init__.py")]
    files: dict[str, Path] = {}
    if str(root) in places and parts[0] != OURS:  # the user's own: with its packages and all it imports
        packages = [root.joinpath(*parts[:depth], "__init__.py") for depth in range(1, len(parts))]
        for start in (path, *filter(Path.is_file, packages)):
            files |= {one.relative_to(root).as_posix(): one for one in files_of(start, root)}
    release = None if files or parts[0] in RELEASED else installed_release(path)
    return Source(module, name, path, line, root, files, _sha256(files or {path.name: path}, path, release))


def _sha256(files: Mapping[str, Path], path: Path, release: str | None) -> str:
    """Return the sha256 of the file at `path`, or of all `files` if others in it are not empty. For an
    installed package, its `release` is also hashed, because the module may use other files of the package."""
    texts = {name: file.read_bytes() for name, file in files.items()}
    each = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items() if text}
    if release is not None:
        each["release"] = release
    if len(each) <= 1:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest()


def files_of(path: Path, root: Path) -> list[Path]:
    """Return `path`, then every file below `root` that it imports, directly or indirectly, at any place in
    the text. A file that is not valid Python counts as importing nothing."""
    files = [path]
    for file in files:  # the list grows inside the loop
        for module in _imports(file, list(file.relative_to(root).parent.parts)):
            if module and module[0] not in sys.stdlib_module_names and module[0] != OURS:
                origins = [spec.origin or "" for spec in _specs(module, [str(root)])]
                found = [Path(origin) for origin in origins if origin.endswith(".py")]
                files += [one for one in found if one not in files]
    return files


def _imports(file: Path, package: list[str]) -> Iterator[list[str]]:
    """Yield each module that a file may import, as its name split at the dots. `from a import b` yields both
    a and a.b. `package` is the name of the file's package, split in the same way."""
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


def _specs(parts: Sequence[str], places: Sequence[str]) -> Iterator[ModuleSpec]:
    """Yield the specs of a, a.b and a.b.c for the module a.b.c, stopping where one is not found."""
    for part in parts:
        # look up the last part alone: with the whole name, a folder without __init__.py would need its
        # parent imported
        spec = PathFinder.find_spec(part, places)
        if spec is None:
            return
        yield spec
        places = list(spec.submodule_search_locations or ())


def _no_module(module: str) -> str:
    parent, _, last = module.rpartition(".")
    if parent:
        return f"there is no module {last} in {parent}"
    meant = nearest(module, [path.stem for path in Path.cwd().glob("*.py")])
    return f"there is no module {module}{meant} in {Path.cwd()} or among the installed packages"


def _line_of(name: str, path: Path) -> int | None:
    """Return the line of a module's file that defines a top-level class or function, or None if the name is
    bound in some other way. Raises LookupError if the text shows that there is no such name."""
    text = path.read_bytes().decode(errors="replace")
    defined = {found[1]: found.start() for found in DEFINES.finditer(text)}
    if name in defined:
        return 1 + text.count("\n", 0, defined[name])
    if not (re.search(rf"\b{name}\b", text) or BINDS_ANY_NAME.search(text)):
        raise LookupError(f"there is no {name}{nearest(name, list(defined))} in {path}")
    return None


@functools.cache
def installed_release(path: Path) -> str | None:
    """Return `name==version` of the installed package that a file belongs to, or None if the file is the
    user's own or belongs to an editable install.

    Packages named like the file are checked first, because reading the records of all packages is slow.
    """
    path = path.absolute()
    folder = next((place for place in path.parents if str(place) in sys.path), None)
    if folder is None:
        return None
    file = path.relative_to(folder).as_posix()
    called = re.sub(r"[-_.]+", "_", file.partition("/")[0].removesuffix(".py")).lower()
    others_last = sorted(
        folder.glob("*.dist-info"), key=lambda info: not info.name.lower().startswith(f"{called}-")
    )
    for info in others_last:
        with suppress(OSError):  # no RECORD: not installed by pip
            record = (info / "RECORD").read_text(encoding="utf-8")
            if f"\n{file}," in f"\n{record}":
                distribution = PathDistribution(info)
                return f"{distribution.metadata['Name']}=={distribution.version.partition('+')[0]}"
    return None


def load(target: str, sha256: str) -> Callable[..., Any]:
    """Import a target and return its function. Raises LookupError as `find` does, and if the source files do
    not have this checksum or the target is not callable. Errors of the module itself are passed on."""
    source = find(target)
    if source.sha256 != sha256:
        others = [name for name, file in source.files.items() if file != source.path]
        also = f", or what it imports ({', '.join(others)})," if others else ""
        raise LookupError(
            f"{source.path}{also} has changed since the run was planned (its sha256 was {sha256[:SHOWN]}… "
            f"and is {source.sha256[:SHOWN]}…): put the old one back, or plan the run again"
        )
    module = _imported(source)
    part: Callable[..., Any]
    try:
        part = functools.reduce(getattr, source.name.split("."), module)  # type: ignore[assignment]
    except AttributeError:
        raise LookupError(f"there is no {source.name} in {source.path}") from None
    if not callable(part):
        raise LookupError(f"{source.name} in {source.path} is {type(part).__name__}, not a function")
    return part


def _imported(source: Source) -> ModuleType:
    """Import a module from its own folder, once, and return it. Raises LookupError if this process has
    already imported something else (another file, or an older version) under the module's name or the name
    of a module that it imports."""
    files = source.files or {source.module: source.path}
    now: dict[str, str] = {}
    for path, file in files.items():  # the module is lib.inner for lib/inner.py and lib/inner/__init__.py
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        now[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        if _loaded.get(name, now[name]) != now[name]:
            raise LookupError(f"{source.path} has changed since this process imported it: start again")
    earlier = source.module in _loaded
    root = str(source.root)
    if source.files and sys.path[:1] != [root]:
        sys.path[:] = [root, *(place for place in sys.path if place != root)]
    _files.update(str(file.resolve()) for file in files.values())
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # keep caches out of a study's copies
    try:
        module = importlib.import_module(source.module)
    finally:
        sys.dont_write_bytecode = writes
    if not earlier and Path(module.__file__ or "").resolve() != source.path.resolve():
        raise LookupError(
            f"Python imports {source.module} from {module.__file__}, not from {source.path}: rename yours"
        )
    _loaded.update(now)
    return module


def line_of_fault(error: BaseException) -> str | None:
    """Return the innermost line of an error's traceback that lies in a source file of the user's, such as
    `my_opt.py:12`, or None if there is none."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        places.append((error.filename, error.lineno))
    own = [f"{Path(file).name}:{line}" for file, line in places if str(Path(file).resolve()) in _files]
    return own[-1] if own else None
