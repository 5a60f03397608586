"""Which deliberate breaks the tests catch: each is one line, made in a copy of the tree.

    python dev/breaks.py [COUNT [SEED]] [--only N …] [--jobs J] [--most SECONDS]     60 breaks take an hour

Each room of ebc_lab (a folder, or the files beside the folders) has as many breaks as its share of all lines
of code in functions; within a room every line that some change fits is as likely as any other. A line that
stands twice in its file is left out, as are messages, for a word in one breaks nothing. Some breaks change
nothing that can be seen: read those that nothing caught before you count them.

All tests run once first, to learn which of them reach a line, in their own process or in one that they start,
and how long each takes (build/breaks; about twice the time of `make test-all`). Of each break the tests of
`make test` that reach its line are asked first, then those that only `make test-all` runs: those of the
file's own folder before others, the shortest first, after them the other tests of their files, and no more
than take `--most` seconds by these times. A test that fails counts if it passes in the tree as it is.

    pip install coverage
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from coverage import CoverageData

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ebc_lab"
FOLDER = ROOT / "build" / "breaks"
NOT_COPIED = (".git", ".venv", "__pycache__", "outputs", "build", "dist", ".*_cache", "node_modules")
HERE = "not slow and not slurm and not nodes and not cuda and not browser and not emulated"
MAKE_TEST, OTHERS, NONE = "make test", "the others alone", "no test"
MARKED = {MAKE_TEST: f"not thorough and {HERE}", OTHERS: f"thorough and {HERE}"}
PASSED, FAILED, NOT_COLLECTED, NOT_FOUND = 0, 1, 2, 4  # what pytest ends with
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]

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
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return  # zip's: what holds anyway
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

# coverage's settings: a process that a test starts has that test for its context; many end by os._exit
SETTINGS = """
[run]
source = ebc_lab
data_file = {folder}/.coverage
parallel = true
sigterm = true
patch = _exit
context = ${{PYTEST_CURRENT_TEST-}}
"""
PLUGIN = """
import coverage, pytest

measured = coverage.Coverage.current()

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    measured.switch_context(item.nodeid)
    return (yield)

def pytest_sessionfinish():
    measured.save()
"""


class Tests:
    """The tests, by an earlier run of all: which of them reach a line, and how many seconds each takes."""

    def __init__(self) -> None:
        self.file = FOLDER / ".coverage"
        if not self.file.exists():
            run_all()
        self.data = CoverageData(str(self.file))
        self.data.read()
        self.kinds = {kind: set(_collected(marked)) for kind, marked in MARKED.items()}

    @cached_property
    def seconds(self) -> dict[str, float]:
        cases = ET.parse(FOLDER / "times.xml").iter("testcase")
        return {
            f"{c.attrib['classname'].replace('.', '/')}.py::{c.attrib['name']}": float(c.attrib["time"])
            for c in cases
        }

    def reaching(self, one: Break, kind: str, most: float) -> list[str]:
        """The tests to ask about a break, in this order."""
        lines = (ROOT / one.file).read_text().splitlines()
        [number] = [i for i, line in enumerate(lines, 1) if line.strip() == one.line]
        measured = [file for file in self.data.measured_files() if file.endswith(f"/{one.file}")]
        contexts = {c for file in measured for c in self.data.contexts_by_lineno(file).get(number, [])}
        tests = {re.sub(r" \((setup|call|teardown)\)$", "", context) for context in contexts}
        own = str(Path("tests", *Path(one.file).parts[1:-1]))
        # what a shared fixture reaches counts for the first test that asks for it, and what a file's import
        # reaches for none
        beside = tuple(f"{file}::" for file in {test.partition("::")[0] for test in tests if test})
        if "" in tests:
            beside += (f"{own}/",)

        def place(test: str) -> tuple[bool, bool, float, str]:
            elsewhere = not test.startswith(f"{own}/")
            return test not in tests, elsewhere, self.seconds.get(test, 1.0), test

        order = sorted(
            (test for test in self.kinds[kind] if test in tests or test.startswith(beside)), key=place
        )
        asked: list[str] = []
        taken = 0.0
        for test in order:
            taken += self.seconds.get(test, 1.0)
            if taken <= most or not asked:
                asked.append(test)
        return asked


def run_all() -> None:
    """Run every test that one of MARKED has, and write what reaches what into FOLDER."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    settings = FOLDER / "coverage.ini"
    settings.write_text(SETTINGS.format(folder=FOLDER))
    (FOLDER / "reached.py").write_text(PLUGIN)
    environment = os.environ | {
        "COVERAGE_PROCESS_START": str(settings),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{FOLDER}",
    }
    subprocess.run(
        [*PYTEST, "-p", "reached", "-n", "2", "-m", HERE, f"--junitxml={FOLDER}/times.xml"],
        cwd=ROOT,
        env=environment,
        check=False,
    )
    subprocess.run(
        [sys.executable, "-m", "coverage", "combine", f"--rcfile={settings}"], cwd=ROOT, check=True
    )


def _collected(marked: str) -> list[str]:
    listed = subprocess.run(
        [*PYTEST, "--collect-only", "-m", marked], cwd=ROOT, capture_output=True, text=True
    )
    return [line for line in listed.stdout.splitlines() if "::" in line]


def fails(tests: Sequence[str], root: Path, most: float) -> str | None:
    """Return the first of these tests that fails in the tree under `root`, or what else ends them."""
    environment = os.environ | {"PYTHONPATH": str(root)}
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder, "tests")
        listed.write_text("\n".join(tests))
        try:
            done = subprocess.run(
                [*PYTEST, "-x", "-rfE", f"--basetemp={folder}/base", f"@{listed}"],
                cwd=root,
                env=environment,
                capture_output=True,
                text=True,
                timeout=most,
            )
        except subprocess.TimeoutExpired:
            return None
    if done.returncode == PASSED:
        return None
    if done.returncode == NOT_FOUND and any("::" in test for test in tests):  # where a file is not imported
        return fails(sorted({test.partition("::")[0] for test in tests}), root, most)
    if done.returncode not in (FAILED, NOT_COLLECTED, NOT_FOUND):
        raise RuntimeError(done.stdout[-2000:] + done.stderr)
    named = re.search(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return named[1] if named else "an import"


def catch(one: Break, tests: Tests, most: float) -> tuple[str, str]:
    """By what a break is caught, and the test that fails."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*NOT_COPIED))
        one.apply(root)
        for kind in MARKED:
            asked = tests.reaching(one, kind, most)
            failed = fails(asked, root, 10 * most) if asked else None
            if failed and ("::" not in failed or not fails([failed], ROOT, 10 * most)):
                return kind, failed
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
    parser.add_argument(
        "--only", nargs="+", type=int, default=(), help="these, by the numbers that are printed"
    )
    parser.add_argument("--jobs", type=int, default=2, help="breaks that are looked at at once")
    parser.add_argument("--most", type=float, default=100, help="seconds of tests of each kind")
    asked = parser.parse_args()
    tests = Tests()
    caught = []

    def look(number_and_break: tuple[int, Break]) -> None:
        number, one = number_and_break
        by, test = catch(one, tests, asked.most)
        caught.append((one, by))
        print(f"{number:3} {one.file}: {one.line}  ->  {one.broken}\n    by {by} {test}", flush=True)

    with ThreadPoolExecutor(asked.jobs) as pool:
        drawn = list(enumerate(draw(asked.count, asked.seed)))
        list(pool.map(look, [pair for pair in drawn if not asked.only or pair[0] in asked.only]))
    print(table(caught))


if __name__ == "__main__":
    main()
