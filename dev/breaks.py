"""Which deliberate breaks the tests catch: each is one line, made in a copy of the tree.

    python dev/breaks.py [COUNT [SEED]] [--coverage .coverage] [--most SECONDS]      60 breaks take hours

Each room of ebc_lab (a folder, or the files beside the folders) has as many breaks as its share of all lines
of code in functions; within a room every line that some change fits is as likely as any other. A line that
stands twice in its file is left out, as are messages, for a word in one breaks nothing. Some breaks change
nothing that can be seen: read those that nothing caught before you count them.

Of each break the tests of the file's own folder run first, then all others of `make test`, then those that
only `make test-all` runs, until one fails that passes in the tree as it is. With the coverage of an earlier
run only tests that reach the line are asked:

    pip install pytest-cov
    python -m pytest -n 2 -m "not slow" --cov=ebc_lab --cov-context=test --cov-report=
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ebc_lab"
NOT_COPIED = (".git", ".venv", "__pycache__", "outputs", "build", "dist", ".*_cache", "node_modules")
HERE = "not slow and not slurm and not nodes and not cuda and not browser and not emulated"
MAKE_TEST, OTHERS, NONE = "make test", "the others alone", "no test"
MARKED = {MAKE_TEST: f"not thorough and {HERE}", OTHERS: f"thorough and {HERE}"}
PASSED, FAILED, NOT_COLLECTED, NO_TESTS = 0, 1, 2, 5  # what pytest ends with

# -- drawing -------------------------------------------------------------------------------------------------

SWAPPED: dict[type[ast.AST], Any] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sum": "len", "sorted": "list"}


@dataclass(frozen=True)
class Break:
    """A line of a file, and what becomes of it."""

    file: str
    line: str
    broken: str

    @property
    def room(self) -> str:
        return self.file.split("/")[1]

    def apply(self, root: Path) -> None:
        path = root / self.file
        path.write_text(path.read_text().replace(self.line, self.broken))


def changed(node: ast.AST) -> ast.AST | None:
    """The node, changed in one place of its own; None where nothing of it can be."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=others):
            return ast.Compare(left, [SWAPPED[type(op)]()], others)
        case ast.BoolOp(op=op, values=values):
            return ast.BoolOp(SWAPPED[type(op)](), values)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in SWAPPED and not _is_text(node):
            return ast.BinOp(left, SWAPPED[type(op)](), right)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return operand
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return ast.IfExp(test, orelse, body)
        case ast.Constant(value=bool(value)):
            return ast.Constant(not value)
        case ast.Constant(value=int() | float() as value) if value + 1 != value:
            return ast.Constant(value + 1)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in NAMES:
            return ast.Call(ast.Name(NAMES[name]), args, [k for k in keywords if NAMES[name] != "list"])
    return None


def _is_text(node: ast.AST) -> bool:
    return any(isinstance(n, ast.JoinedStr) or _string(n) for n in ast.walk(node))


def _string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def whole(node: ast.stmt) -> str | None:
    """What becomes of a statement as a whole; None where nothing does."""
    match node:
        case ast.Return(value=ast.expr()):
            return "return None"
        case ast.Expr(value=ast.Call()):
            return "pass"
        case ast.AugAssign(target=target, op=op, value=value) if type(op) in SWAPPED and not _is_text(value):
            return ast.unparse(ast.AugAssign(target, SWAPPED[type(op)](), value))
    return None


def parts(node: ast.AST, inside: bool = False) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """The parts of functions that something can be made of, and what: for one node, maybe several."""
    if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.arguments)):
        return  # messages, what holds anyway, and defaults
    if inside and isinstance(node, ast.stmt) and (text := whole(node)):
        yield node, text
    if inside and isinstance(node, ast.If):
        yield node.test, f"not ({ast.unparse(node.test)})"
    if inside and isinstance(node, ast.expr) and (other := changed(node)):
        text = ast.unparse(ast.fix_missing_locations(other))
        yield node, text if isinstance(node, (ast.Constant, ast.Call)) else f"({text})"
    for child in ast.iter_child_nodes(node):
        yield from parts(child, inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def breaks(path: Path) -> dict[str, list[str]]:
    """Line of a file -> what may become of it."""
    source = path.read_text()
    lines = source.splitlines()
    found: defaultdict[str, list[str]] = defaultdict(list)
    for node, text in parts(ast.parse(source)):
        line = lines[node.lineno - 1]
        if node.end_lineno == node.lineno and source.count(line.strip()) == 1:
            encoded = line.encode()
            broken = encoded[: node.col_offset].decode() + text + encoded[node.end_col_offset :].decode()
            if broken != line:
                found[line.strip()].append(broken.strip())
    return found


def draw(count: int, seed: int) -> list[Break]:
    """`count` breaks, of each room as many as its share of the lines that can be broken."""
    generator = random.Random(seed)
    rooms: defaultdict[str, list[tuple[str, str, list[str]]]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        room = inside.parts[0] if len(inside.parts) > 1 else ""
        rooms[room] += [(str(path.relative_to(ROOT)), *each) for each in breaks(path).items()]
    total = sum(map(len, rooms.values()))
    # the largest remainders make the shares add up
    exact = {room: count * len(lines) / total for room, lines in rooms.items()}
    counts = {room: int(share) for room, share in exact.items()}
    for room in sorted(exact, key=lambda r: counts[r] - exact[r])[: count - sum(counts.values())]:
        counts[room] += 1
    return [
        Break(file, line, generator.choice(broken))
        for room, lines in sorted(rooms.items())
        for file, line, broken in sorted(generator.sample(lines, counts[room]))
    ]


# -- testing -------------------------------------------------------------------------------------------------


def reaching(one: Break, coverage: Path) -> list[str]:
    """The tests that reach a line, by a file of coverage's that was written with pytest-cov's contexts."""
    from coverage import CoverageData

    data = CoverageData(str(coverage))
    data.read()
    [measured] = [file for file in data.measured_files() if file.endswith(f"/{one.file}")] or [""]
    lines = (ROOT / one.file).read_text().splitlines()
    [number] = [i for i, line in enumerate(lines, 1) if line.strip() == one.line]
    contexts = data.contexts_by_lineno(measured).get(number, []) if measured else []
    return sorted({context.partition("|")[0] for context in contexts} - {""})


def fails(tests: Sequence[str], marked: str, root: Path, most: float) -> str | None:
    """Return the first of these tests that fails in the tree under `root`, or what else ends them."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-n",
        "2",
        "-p",
        "no:cacheprovider",
        "-rfE",
        "-m",
        marked,
    ]
    environment = os.environ | {"PYTHONPATH": str(root)}
    try:
        done = subprocess.run(
            [*command, *tests], cwd=root, env=environment, capture_output=True, text=True, timeout=most
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode in (PASSED, NO_TESTS):
        return None
    if done.returncode not in (FAILED, NOT_COLLECTED):
        raise RuntimeError(done.stderr)
    named = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return named[0] if named else "an import"


def catch(one: Break, coverage: Path | None, most: float) -> tuple[str, str]:
    """By what a break is caught, and the test that fails."""
    own = Path("tests", *Path(one.file).parts[1:-1])
    reached = reaching(one, coverage) if coverage else ["tests"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*NOT_COPIED))
        one.apply(root)
        nearest = [test for test in reached if test.startswith(f"{own}/")] if coverage else [str(own)]
        for by, marked in MARKED.items():
            for tests in (nearest, reached):
                if not tests or not (ROOT / tests[0].partition("::")[0]).exists():
                    continue
                failed = fails(tests, marked, root, most)
                if failed and (failed == "an import" or not fails([failed], marked, ROOT, most)):
                    return by, failed
    return NONE, ""


def table(caught: Sequence[tuple[Break, str]]) -> str:
    """Of each room, and of all, how many were caught and by what."""
    rows = [f"| room | breaks | {MAKE_TEST} | {OTHERS} | {NONE} |", "|---|---|---|---|---|"]
    for room in [*sorted({one.room for one, _ in caught}), "all"]:
        ways = Counter(by for one, by in caught if room in (one.room, "all"))
        rows.append(f"| {room} | {ways.total()} | {ways[MAKE_TEST]} | {ways[OTHERS]} | {ways[NONE]} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", nargs="?", type=int, default=60)
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("--coverage", type=Path, help="the .coverage of an earlier run of all tests")
    parser.add_argument("--most", type=float, default=600, help="seconds that a call of pytest may take")
    asked = parser.parse_args()
    caught = []
    for number, one in enumerate(draw(asked.count, asked.seed)):
        by, test = catch(one, asked.coverage, asked.most)
        caught.append((one, by))
        print(f"{number:3} {one.file}: {one.line}  ->  {one.broken}\n    by {by} {test}", flush=True)
    print(table(caught))


if __name__ == "__main__":
    main()
