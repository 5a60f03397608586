"""The layers of ebc_lab, read from its imports, and what breaks the rules of docs/architecture.md.

usage: python scripts/house.py [--write]    prints layers and violations; --write redraws the picture of them
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

ROOT = Path(__file__).parent.parent
PACKAGE = "ebc_lab"
PICTURE = "docs/images/layers.svg"
PARTS_PICTURE = "docs/images/parts.svg"
BRINGS = {  # what a `Part` may override -> what the picture calls it
    "changes_nothing": "a choice that changes nothing",
    "refuses": "refusals",
    "unfit": "unfit for a mode",
    "unfit_for": "unfit for a mode",
    "tail": "name and label",
    "columns": "columns of steps.csv",
    "figures": "figures",
    "table": "a table",
    "picture": "a picture",
    "versions": "versions in suites",
}

# From the bottom up, what each package is for. Packages of one layer do not import each other.
LAYERS: tuple[dict[str, str], ...] = (
    {
        "integrations": "ebc in Lightning and Hugging Face; imports ebc, torch",
        "ebc": "the method; imports torch only",
        "axiom": "training with little memory beside the weights; imports torch only",
        "verity": "training whose bits no machine changes; imports torch only",
        "lowbit": "few levels, packed and measured; imports torch, numpy only",
        "ebm": "an energy-based language model on the sphere; imports torch, numpy only",
        "config": "settings, their checks, a run's identity; no torch",
    },
    {"records": "files on disk: formats, columns, locks"},
    {"workloads": "what is trained: model, text, loss"},
    {"components": "what the parts of a run do"},
    {"training": "one run"},
    {"bench": "measurements on this machine"},
    {"study": "many runs: stages, store, launchers"},
    {"results": "a study as data; many studies ranked"},
    {"report": "tables, pictures, page"},
    {"cli": "commands"},
)
# can be copied into another project: each imports the standard library, torch and what is named here, and
# nothing else of ours, but for `ALLOWED`
LIBRARIES: dict[str, tuple[str, ...]] = {
    "ebc": (),
    "integrations": ("lightning", "transformers"),
    "axiom": ("matplotlib", "torchao", "transformers"),
    "verity": (),
    "lowbit": ("numpy", "sklearn", "cupy"),
    "ebm": (
        *("numpy", "scipy", "sklearn", "faiss", "tokenizers", "safetensors"),
        *("starlette", "uvicorn", "pydantic", "langchain_core"),
    ),
}
WITHOUT_TORCH = ("config",)  # these import neither torch nor what is as slow to load
SLOW_TO_LOAD = ("torch", "numpy", "scipy", "pandas", "matplotlib")
ALLOWED = {
    ("config", f"{PACKAGE}.ebc.options"),  # the method's names and constants, without torch
    ("integrations", f"{PACKAGE}.ebc.options"),
    ("integrations", f"{PACKAGE}.ebc"),
    ("", f"{PACKAGE}.results"),  # the package's own names, loaded when they are asked for
}
# Inside these packages, too, a file or folder imports only from those to its left.
ROOMS = {
    "study": (
        ("stages", "trackers"),
        ("store",),
        ("mirror",),
        ("launch",),
        ("resolve", "guards", "so_far"),
        ("autopilot",),
        ("inspect",),
    ),
    "report": (("text",), ("kinds",), ("pictures",), ("page",), ("conclude",)),
}
MOST_FILES = 16  # in a folder, without __init__.py
OF_GROUPS = ("config/parts", "components")  # these have a file for each group of conf/, however many
MOST_ENTRIES = 12  # at the top of the package, libraries aside
LONGEST_FUNCTION = 70  # lines: a function is as long as its thought


@dataclass(frozen=True)
class Import:
    """One import: `ebc_lab.study.guards` imports `ebc_lab.config.errors`, or another library's module."""

    importer: str
    imported: str
    line: int
    relative: bool

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}, imports {self.imported}"


# -- reading -------------------------------------------------------------------------------------------------


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package and its file; a package's own module is its `__init__.py`."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


@functools.cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def imports(root: Path) -> list[Import]:
    """Every import of the package, those inside functions and `TYPE_CHECKING` blocks included."""
    known = modules(root)
    found = []
    for name, path in known.items():
        folder = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(parsed(path.read_text())):
            if isinstance(node, ast.Import):
                found += [Import(name, alias.name, node.lineno, relative=False) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                source = _source(node, folder)
                targets = {
                    f"{source}.{a.name}" if f"{source}.{a.name}" in known else source for a in node.names
                }
                found += [Import(name, target, node.lineno, node.level > 0) for target in sorted(targets)]
    return found


def _source(node: ast.ImportFrom, folder: str) -> str:
    """The full name of the module that a `from … import …` in `folder` names."""
    if not node.level:
        return node.module or ""
    parts = folder.split(".")
    above = parts[: len(parts) - node.level + 1]
    return ".".join([*above, node.module] if node.module else above)


def part(module: str, depth: int) -> str:
    """`part("ebc_lab.study.store.find", 1)` is `study`, at depth 2 it is `store`; empty beyond the end."""
    parts = module.split(".")
    return parts[depth] if len(parts) > depth else ""


# -- rules of imports ----------------------------------------------------------------------------------------


def upward(found: Iterable[Import]) -> Iterator[str]:
    """Imports of packages that do not lie in a lower layer, and the same for the rooms of a package."""
    layer = {name: height for height, names in enumerate(LAYERS) for name in names}
    for i in found:
        if part(i.imported, 0) != PACKAGE or (part(i.importer, 1), i.imported) in ALLOWED:
            continue
        here = part(i.importer, 1)
        there = part(i.imported, 1)
        if here == there:
            order = {name: height for height, names in enumerate(ROOMS.get(here, ())) for name in names}
            here = part(i.importer, 2)
            there = part(i.imported, 2)
        else:
            order = layer
        if order and here != there and there and order.get(there, 99) >= order.get(here, 0):
            yield f"{i}: {there} is not below {here or 'it'}"


def foreign(found: Iterable[Import]) -> Iterator[str]:
    """What a library, or a package that must load quickly, imports of others' code."""
    for i in found:
        package = part(i.importer, 1)
        source = part(i.imported, 0)
        allowed = (PACKAGE, "torch", *LIBRARIES.get(package, ()))
        if package in LIBRARIES and source not in allowed and source not in sys.stdlib_module_names:
            yield f"{i}: {package} may import {', '.join(allowed[1:])} and the standard library alone"
        if package in WITHOUT_TORCH and source in SLOW_TO_LOAD:
            yield f"{i}: {package} must load without {source}"


def spelling(found: Iterable[Import]) -> Iterator[str]:
    """Relative imports between packages, absolute ones inside one."""
    for i in found:
        if part(i.imported, 0) != PACKAGE:
            continue
        same = part(i.importer, 1) == part(i.imported, 1)
        if i.relative != same:
            yield f"{i}: {'relative inside a package' if same else 'absolute between packages'}, please"


def cycles(found: Iterable[Import], name: Callable[[str], str] = str) -> list[str]:
    """Groups that import each other, of files or (with `name=folder_of`) of folders."""
    edges: dict[str, set[str]] = defaultdict(set)
    for i in found:
        here, there = name(i.importer), name(i.imported)
        inside = f"{there}.".startswith(f"{here}.") or f"{here}.".startswith(
            f"{there}."
        )  # one is of the other
        if part(i.imported, 0) == PACKAGE and not inside:
            edges[here].add(there)
    reach: dict[str, set[str]] = {}
    for start in list(edges):
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            new = edges.get(ahead.pop(), set()) - seen
            seen |= new
            ahead += new
        reach[start] = seen
    rings = {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in reach if a in reach[a]}
    return [f"{', '.join(sorted(ring))} import each other" for ring in sorted(rings, key=sorted)]


def folder_of(root: Path) -> Callable[[str], str]:
    """Module -> its folder, for `cycles`."""
    packages = {m for m, path in modules(root).items() if path.name == "__init__.py"}
    return lambda module: module if module in packages else module.rpartition(".")[0]


# -- rules of files and lines --------------------------------------------------------------------------------


def crowded(root: Path) -> Iterator[str]:
    """Folders with too many files, and too many entries at the top."""
    package = root / PACKAGE
    for folder in [package, *(p for p in package.rglob("*") if p.is_dir())]:
        files = [f.name for f in folder.glob("*.py") if f.name != "__init__.py"]
        if len(files) > MOST_FILES and folder.relative_to(package).as_posix() not in OF_GROUPS:
            yield f"{folder.relative_to(root)} has {len(files)} files, {MOST_FILES} at most"
    entries = {p.name for p in package.iterdir() if p.name not in ("__pycache__", "conf", *LIBRARIES)}
    if len(entries) > MOST_ENTRIES:
        yield f"{PACKAGE} has {len(entries)} entries besides libraries, {MOST_ENTRIES} at most"


def hard_to_read(path: Path) -> Iterator[str]:
    """Functions that are too long, nested conditional expressions, crowded comprehensions."""
    for node in ast.walk(parsed(path.read_text(encoding="utf-8"))):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LONGEST_FUNCTION:
                yield f"{where}: {node.name} has {length} lines, {LONGEST_FUNCTION} at most: split it"
        elif isinstance(node, ast.IfExp):
            if any(isinstance(inner, ast.IfExp) for inner in (node.test, node.body, node.orelse)):
                yield f"{where}: a conditional expression inside another: write if, elif, else"
        elif isinstance(node, ast.comprehension):
            conditions = [
                c for test in node.ifs for c in (test.values if isinstance(test, ast.BoolOp) else [test])
            ]
            if len(conditions) > 2:
                at = f"{path}:{node.iter.lineno}"
                yield f"{at}: {len(conditions)} conditions in a comprehension, two at most"
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Return | ast.Expr):
            inside = [n for n in ast.walk(node) if isinstance(n, ast.ListComp | ast.SetComp | ast.DictComp)]
            if len(inside) > 2:
                yield f"{where}: {len(inside)} comprehensions in one statement, two at most"


def violations(root: Path) -> list[str]:
    """What breaks a rule of imports or of folders in the tree under `root`, a sentence each."""
    found = imports(root)
    always = [i for i in found if (part(i.importer, 1), i.imported) not in ALLOWED]
    return [
        *upward(found),
        *foreign(found),
        *spelling(found),
        *cycles(always),
        *cycles(always, folder_of(root)),
        *crowded(root),
    ]


# -- the picture ---------------------------------------------------------------------------------------------


def packages_imported(found: Iterable[Import]) -> dict[str, set[str]]:
    """Package -> the packages that it imports from."""
    out: dict[str, set[str]] = defaultdict(set)
    for i in found:
        if part(i.imported, 0) == PACKAGE and part(i.importer, 1) != part(i.imported, 1):
            out[part(i.importer, 1)].add(part(i.imported, 1))
    for used in out.values():
        used.discard("")
    return out


def picture(found: Iterable[Import]) -> str:
    """Draw a row for each package, the top layer first, with a dot under each that it imports from."""
    rows = [(name, about) for layer in reversed(LAYERS) for name, about in layer.items()]
    title = "Packages of ebc_lab, the top layer first, and which others each imports from"
    return grid(title, rows, [name for name, _ in rows[1:]], packages_imported(found))


def parts_picture() -> str:
    """Draw a row for each part of a run, in the order of its name, with a dot under what its files bring."""
    from ebc_lab.config.part import Part
    from ebc_lab.config.parts import PARTS

    brings: dict[str, set[str]] = {}
    for part_ in PARTS:
        own = {words for name, words in BRINGS.items() if getattr(part_, name) != getattr(Part, name)}
        file = ROOT / PACKAGE / "components" / f"{part_.group_name}.py"
        acts = file.exists() and re.search("^(HOOK|NUMERICS)\\b", file.read_text(), re.MULTILINE)
        brings[part_.group_name] = own | ({"acts in a step"} if acts else set())
    rows = [(part_.group_name, (part_.__doc__ or "").split(".")[0].split(" (")[0]) for part_ in PARTS]
    columns = [*dict.fromkeys(BRINGS.values()), "acts in a step"]
    return grid("Parts of a run, and what the files of each bring", rows, columns, brings)


def grid(
    title: str, rows: Sequence[tuple[str, str]], columns: Sequence[str], dots: Mapping[str, set[str]]
) -> str:
    """Draw an SVG: rows of a name and what it is, with a dot under each column that it has."""
    height, head, left, step = 34, 136, 590, 40
    lines = []
    for x, name in enumerate(columns):
        at = left + step * x + step / 2
        lines.append(f'<text transform="translate({at + 4:g} {head - 8}) rotate(-50)">{name}</text>')
    for y, (name, about) in enumerate(rows):
        top = head + height * y
        lines.append(f'<rect x="8" y="{top}" width="572" height="{height - 6}" rx="4" class="row"/>')
        lines.append(f'<text x="18" y="{top + 19}" class="name">{name}</text>')
        lines.append(f'<text x="124" y="{top + 19}">{shorten(about, 66, placeholder=" …")}</text>')
        for x, other in enumerate(columns):
            at = left + step * x + step / 2
            kind = "dot" if other in dots[name] else "none"
            radius = 6 if other in dots[name] else 1.5
            lines.append(f'<circle cx="{at:g}" cy="{top + 14}" r="{radius}" class="{kind}"/>')
    width = left + step * len(columns) + 70
    height = head + height * len(rows) + 10
    style = "text{font:13px sans-serif;fill:#222}.name{font-weight:bold}"
    style += ".row{fill:#e8eef6}.dot{fill:#2f5f9e}.none{fill:#bbb}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img">',
            f"<title>{title}</title>",
            f"<style>{style}</style>",
            '<rect width="100%" height="100%" fill="white"/>',
            *lines,
            "</svg>\n",
        ]
    )


def main() -> None:
    found = imports(ROOT)
    uses = packages_imported(found)
    for height, layer in reversed(list(enumerate(LAYERS, 1))):
        for name in layer:
            print(f"{height}  {name:11} imports {', '.join(sorted(uses[name])) or 'nothing of ours'}")
    if "--write" in sys.argv[1:]:
        (ROOT / PICTURE).write_text(picture(found))
        (ROOT / PARTS_PICTURE).write_text(parts_picture())
    broken = violations(ROOT)
    for path in modules(ROOT).values():
        broken += hard_to_read(path)
    print(*broken, f"{len(broken)} violation(s)", sep="\n")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
