"""The rules of docs/architecture.md that neither import-linter nor ruff has, and the pictures of that page.

usage: python scripts/house.py [--write]    prints what breaks a rule; --write redraws the pictures

The layers themselves are contracts of import-linter, in pyproject.toml.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from textwrap import shorten

import grimp

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
ABOUT = {  # what each package is for
    "integrations": "ebc in Lightning and Hugging Face; imports ebc, torch",
    "ebc": "the method; imports torch only",
    "axiom": "training with little memory beside the weights; imports torch only",
    "verity": "training whose bits no machine changes; imports torch only",
    "lowbit": "few levels, packed and measured; imports torch, numpy only",
    "ebm": "an energy-based language model on the sphere; imports torch, numpy only",
    "judging": "runs of others: read, compared, judged; no torch",
    "config": "settings, their checks, a run's identity; no torch",
    "records": "files on disk: formats, columns, locks",
    "workloads": "what is trained: model, text, loss",
    "components": "what the parts of a run do",
    "training": "one run",
    "bench": "measurements on this machine",
    "study": "many runs: stages, store, launchers",
    "results": "a study as data; many studies ranked",
    "report": "tables, pictures, page",
    "cli": "commands",
}
# can be copied into another project: each imports the standard library, torch and what is named here
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
MOST_FILES = 16  # in a folder, without __init__.py
# these have a file for each group of conf/, each stage, each format, however many
GROUPED = ("config/parts", "components", "study/stages", "judging/readers")
MOST_ENTRIES = 13  # at the top of the package, libraries aside
LONGEST_FUNCTION = 70  # lines: a function is as long as its thought


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package and its file; a package's own module is its `__init__.py`."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


# -- rules of imports ----------------------------------------------------------------------------------------


def foreign(graph: grimp.ImportGraph) -> Iterator[str]:
    """What a library imports of others' code beyond torch and what `LIBRARIES` names."""
    for library, named in LIBRARIES.items():
        allowed = {PACKAGE, "torch", *named, *sys.stdlib_module_names}
        here = f"{PACKAGE}.{library}"
        for module in sorted({here, *graph.find_descendants(here)}):
            for imported in sorted(graph.find_modules_directly_imported_by(module)):
                if imported.partition(".")[0] not in allowed:
                    yield f"{module} imports {imported}: {library} may import {', '.join(('torch', *named))}"


def circles(graph: grimp.ImportGraph) -> Iterator[str]:
    """A circle of files that import each other, and one of folders."""
    files: dict[str, set[str]] = defaultdict(set)
    folders: dict[str, set[str]] = defaultdict(set)
    ours = sorted(module for module in graph.modules if not graph.is_module_squashed(module))
    packages = {module for module in ours if graph.find_children(module)}
    for module in ours:
        folder = module if module in packages else module.rpartition(".")[0]
        for imported in graph.find_modules_directly_imported_by(module).intersection(ours):
            other = imported if imported in packages else imported.rpartition(".")[0]
            if not _nested(module, imported):
                files[module].add(imported)
            if not _nested(folder, other):
                folders[folder].add(other)
    for edges in (files, folders):
        try:
            TopologicalSorter(edges).prepare()
        except CycleError as error:
            yield f"{' imports '.join(reversed(error.args[1]))}"


def _nested(one: str, other: str) -> bool:
    """Whether one of two modules is the other, or inside it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def spelling(module: str, path: Path, nodes: Sequence[ast.AST]) -> Iterator[str]:
    """Relative imports between packages, absolute ones inside one. `nodes`: all of the file's code."""
    folders = module.count(".") + (path.name == "__init__.py")  # that the file is in, ebc_lab among them
    own = ".".join(module.split(".")[:2])
    for node in nodes:
        if not isinstance(node, ast.ImportFrom) or folders < 2:
            continue
        if node.level == folders:
            yield f"{path}:{node.lineno}: absolute between packages, please"
        elif node.level == 0 and f"{node.module}.".startswith(f"{own}."):
            yield f"{path}:{node.lineno}: relative inside a package, please"


# -- rules of files and lines --------------------------------------------------------------------------------


def crowded(root: Path) -> Iterator[str]:
    """Folders with too many files, and too many entries at the top."""
    package = root / PACKAGE
    for folder in [package, *(p for p in package.rglob("*") if p.is_dir())]:
        files = [f.name for f in folder.glob("*.py") if f.name != "__init__.py"]
        if len(files) > MOST_FILES and folder.relative_to(package).as_posix() not in GROUPED:
            yield f"{folder.relative_to(root)} has {len(files)} files, {MOST_FILES} at most"
    entries = {p.name for p in package.iterdir() if p.name not in ("__pycache__", "conf", *LIBRARIES)}
    if len(entries) > MOST_ENTRIES:
        yield f"{PACKAGE} has {len(entries)} entries besides libraries, {MOST_ENTRIES} at most"


def hard_to_read(path: Path, nodes: Sequence[ast.AST]) -> Iterator[str]:
    """Functions that are too long, nested conditional expressions, crowded comprehensions."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LONGEST_FUNCTION:
                where = f"{path}:{node.lineno}"
                yield f"{where}: {node.name} has {length} lines, {LONGEST_FUNCTION} at most: split it"
        elif isinstance(node, ast.IfExp):
            if any(isinstance(inner, ast.IfExp) for inner in (node.test, node.body, node.orelse)):
                yield f"{path}:{node.lineno}: a conditional expression inside another: write if, elif, else"
        elif isinstance(node, ast.comprehension):
            conditions = [
                c for test in node.ifs for c in (test.values if isinstance(test, ast.BoolOp) else [test])
            ]
            if len(conditions) > 2:
                where = f"{path}:{node.iter.lineno}"
                yield f"{where}: {len(conditions)} conditions in a comprehension, two at most"
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Return | ast.Expr):
            inside = [n for n in ast.walk(node) if isinstance(n, ast.ListComp | ast.SetComp | ast.DictComp)]
            if len(inside) > 2:
                yield f"{path}:{node.lineno}: {len(inside)} comprehensions in one statement, two at most"


def violations(root: Path, graph: grimp.ImportGraph) -> list[str]:
    """Return what breaks a rule in the tree under `root`, whose imports `graph` has, a sentence each."""
    broken = [*foreign(graph), *circles(graph), *crowded(root)]
    for module, path in modules(root).items():
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        broken += [*spelling(module, path, nodes), *hard_to_read(path, nodes)]
    return broken


# -- the pictures --------------------------------------------------------------------------------------------


def layers_picture(root: Path, graph: grimp.ImportGraph) -> str:
    """Draw a row for each package, the top layer first, with a dot under each that it imports from."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    [layers] = [
        contract["layers"]
        for contract in project["tool"]["importlinter"]["contracts"]
        if contract.get("containers") == [PACKAGE]
    ]
    names = [name for layer in layers for name in layer.split(" | ")]
    packages = {f"{PACKAGE}.{name}": name for name in names}
    for package in packages:
        graph.squash_module(package)
    imported = {}
    for package, name in packages.items():
        others = graph.find_modules_directly_imported_by(package) - {package}
        imported[name] = {packages[other] for other in others if other in packages}
    title = "Packages of ebc_lab, the top layer first, and which others each imports from"
    return grid(title, [(name, ABOUT[name]) for name in names], names[1:], imported)


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
    height, left, step = 34, 590, 40
    head = 40 + 6 * max(map(len, columns))  # where the longest column's words, which rise, have room
    lines = []
    for x, name in enumerate(columns):
        middle = left + step * x + step / 2
        lines.append(f'<text transform="translate({middle + 4:g} {head - 8}) rotate(-50)">{name}</text>')
    for y, (name, about) in enumerate(rows):
        top = head + height * y
        lines.append(f'<rect x="8" y="{top}" width="572" height="{height - 6}" rx="4" class="row"/>')
        lines.append(f'<text x="18" y="{top + 19}" class="name">{name}</text>')
        lines.append(f'<text x="124" y="{top + 19}">{shorten(about, 66, placeholder=" …")}</text>')
        for x, other in enumerate(columns):
            middle = left + step * x + step / 2
            kind = "dot" if other in dots[name] else "none"
            radius = 6 if other in dots[name] else 1.5
            lines.append(f'<circle cx="{middle:g}" cy="{top + 14}" r="{radius}" class="{kind}"/>')
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
    sys.path.insert(0, str(ROOT))  # where grimp finds the package
    graph = grimp.build_graph(PACKAGE, include_external_packages=True, cache_dir=None)
    broken = violations(ROOT, graph)
    if "--write" in sys.argv[1:]:
        (ROOT / PICTURE).write_text(layers_picture(ROOT, graph))
        (ROOT / PARTS_PICTURE).write_text(parts_picture())
    print(*broken, f"{len(broken)} violation(s)", sep="\n")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
