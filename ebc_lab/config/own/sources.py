"""A function by its target, `module:function`: found and hashed without importing anything, then loaded.

Modules are looked for among the remembered places, in the working directory, then where Python looks. A place
is the file of a target that was written with its path, or a folder: workers remember a study's copies. What
is wrong is a LookupError whose text is a clause of a sentence.
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
PLACES = "EBC_LAB_OWN"  # variable of the environment, so that child processes find the same files
NAME = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
TARGET = re.compile(rf"{NAME}(?::{NAME})?")
BY_PATH = re.compile(rf"(?P<file>.+\.py):(?P<name>{NAME})", re.DOTALL)
DEFINES = re.compile(r"^(?:async\s+)?(?:def|class)\s+(\w+)", re.MULTILINE)  # at the top of a module
BINDS_ANY_NAME = re.compile(r"\b(?:globals|exec|__getattr__|sys)\b|\bimport\s*\*")  # it may have any name
RELEASED = (OURS, "torch")  # whose versions are part of every run's identity by other means
SHOWN = 12  # hex digits of a checksum

_loaded: dict[str, str] = {}  # module -> checksum of its file when this process imported it
_files: set[str] = set()  # of the modules among them


@dataclass(frozen=True)
class Source:
    """Where a target is. `name` is that of the function in its module, with dots inside a class."""

    module: str
    name: str
    path: Path
    line: int | None  # of the function in its file, where the text shows that
    root: Path  # the folder that `files` are named in
    files: Mapping[str, Path]  # its own and those below `root` that it imports; of an installed module: none
    sha256: str  # of the module's file, or of all `files` where it imports some

    @property
    def target(self) -> str:
        """Return `module:function`."""
        return f"{self.module}:{self.name}"

    @property
    def place(self) -> str:
        """Return `my_opt.py:12`, or `my_opt.py` where the line is not known."""
        return self.path.name if self.line is None else f"{self.path.name}:{self.line}"


def placed(target: str) -> str:
    """Return `my_opt:Cautious` for a target that is written with its file, `./my_opt.py:Cautious`, and
    remember that file; return any other target as it is. Raises LookupError where there is no such file."""
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
    """Return the absolute path of the file that a target is written with; None where it names a module."""
    written = BY_PATH.fullmatch(target)
    return Path(os.path.abspath(Path(written["file"]).expanduser())) if written else None


def remember(place: Path) -> None:
    """Have modules looked for in this folder, or the module of its name in this file, before the working
    directory. Processes that this one starts do so as well."""
    place = Path(os.path.abspath(place))
    places = [one for one in _remembered() if one != place and (place.is_dir() or one.name != place.name)]
    if place.parent != Path.cwd() or place.is_dir():
        places.insert(0, place)
    os.environ[PLACES] = os.pathsep.join(map(str, places))


def _remembered() -> list[Path]:
    return [Path(one) for one in os.environ.get(PLACES, "").split(os.pathsep) if one]


def find(target: str) -> Source:
    """Return the source of `module:function`, `module.function` or `path/module.py:function`.

    Raises LookupError: no target, no such module, no file of it, or no such name in it.
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
        with suppress(ValueError):  # of __main__
            found = importlib.util.find_spec(parts[0])  # editable installs have a finder of their own
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
    if str(root) in places and parts[0] != OURS:  # one's own: it, its packages and all that they import there
        packages = [root.joinpath(*parts[:depth], "__init__.py") for depth in range(1, len(parts))]
        for start in (path, *filter(Path.is_file, packages)):
            files |= {one.relative_to(root).as_posix(): one for one in files_of(start, root)}
    release = None if files or parts[0] in RELEASED else installed_release(path)
    return Source(module, name, path, line, root, files, _sha256(files or {path.name: path}, path, release))


def _sha256(files: Mapping[str, Path], path: Path, release: str | None) -> str:
    """Return the checksum of the file in `path`, or of all `files` where others have contents as well. It
    includes the `release` of the installed package of that file, which may use other files of it."""
    texts = {name: file.read_bytes() for name, file in files.items()}
    each = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items() if text}
    if release is not None:
        each["release"] = release
    if len(each) <= 1:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest()


def files_of(path: Path, root: Path) -> list[Path]:
    """Return the module in `path`, then every file below `root` that it imports, directly or through others,
    anywhere in its text. What cannot be read as Python imports nothing."""
    files = [path]
    for file in files:  # which grows
        for module in _imports(file, list(file.relative_to(root).parent.parts)):
            if module and module[0] not in sys.stdlib_module_names and module[0] != OURS:
                origins = [spec.origin or "" for spec in _specs(module, [str(root)])]
                found = [Path(origin) for origin in origins if origin.endswith(".py")]
                files += [one for one in found if one not in files]
    return files


def _imports(file: Path, package: list[str]) -> Iterator[list[str]]:
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


def _specs(parts: Sequence[str], places: Sequence[str]) -> Iterator[ModuleSpec]:
    """Yield the specs of a, a.b and a.b.c for the module a.b.c, as far as they are found."""
    for part in parts:
        # by its last part alone: with the whole name, a folder without __init__.py would need its parent
        # imported
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
    """Return the line in which a module's text begins a class or function at its top; None for a name that is
    bound otherwise. Raises LookupError where the text shows that there is no such name."""
    text = path.read_bytes().decode(errors="replace")
    defined = {found[1]: found.start() for found in DEFINES.finditer(text)}
    if name in defined:
        return 1 + text.count("\n", 0, defined[name])
    if not (re.search(rf"\b{name}\b", text) or BINDS_ANY_NAME.search(text)):
        raise LookupError(f"there is no {name}{nearest(name, list(defined))} in {path}")
    return None


@functools.cache
def installed_release(path: Path) -> str | None:
    """Return `name==version` of the installed package that brought this file; None for a file of one's own,
    and for one that an editable install only points at.

    A package of the file's name is asked first: the records of all of them have tens of thousands of lines.
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
        with suppress(OSError):  # it was not pip that installed this one
            record = (info / "RECORD").read_text(encoding="utf-8")
            if f"\n{file}," in f"\n{record}":
                distribution = PathDistribution(info)
                return f"{distribution.metadata['Name']}=={distribution.version.partition('+')[0]}"
    return None


def load(target: str, sha256: str) -> Callable[..., Any]:
    """Return a target's function, imported. Raises LookupError: as `find`, and where its files do not have
    this checksum or its name is not a function's. What the module itself raises is passed on."""
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
    """Return the module, imported once and from its own folder. Raises LookupError where this process has
    imported another file under its name, or under that of a module that it imports."""
    files = source.files or {source.module: source.path}
    now: dict[str, str] = {}
    for path, file in files.items():  # lib.inner for lib/inner.py and lib/inner/__init__.py
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        now[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        if _loaded.get(name, now[name]) != now[name]:
            raise LookupError(f"{source.path} has changed since this process imported it: start again")
    earlier = source.module in _loaded
    root = str(source.root)
    if source.files and sys.path[:1] != [root]:
        sys.path[:] = [root, *(place for place in sys.path if place != root)]
    _files.update(str(file.resolve()) for file in files.values())
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a study's copies stay as they are
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
    """Return `my_opt.py:12`, the last line of a user's own files that an error went through, or None."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        places.append((error.filename, error.lineno))
    own = [f"{Path(file).name}:{line}" for file, line in places if str(Path(file).resolve()) in _files]
    return own[-1] if own else None
