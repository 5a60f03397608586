"""Which deliberate breaks tests catch, `make test` and all of them: each is made in a copy of the tree.

    python scripts/mutations.py [NUMBERS…]        after scripts/reached.py; hours (12-90: from 12 to 90)

scripts/mutations.txt names a file, a line of it and what becomes of that line; scripts/draw_breaks.py draws
them at random, from all rooms by their size. Of each, those tests run that reach the line, those of its own
file and folder first, then the quickest, until one fails: first those of `make test`, then, if none of them
fails, all others. A test that alone caught one goes below it, after `! `: scripts/least_tests.py has
`make test` run it.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import least_tests
import pytest
import reached

ROOT = Path(__file__).parent.parent
NOT_COPIED = (
    ".git",
    ".venv",
    ".reached",
    "__pycache__",
    "outputs",
    "build",
    "dist",
    ".*_cache",
    "node_modules",
)
FIRST = 80  # tests that are tried together
MOST_SECONDS = 100  # of processor time, foreseen, that the tests may take of which none fails
HANGS = 300  # seconds until a break is taken for caught because nothing ends any more
MAKE_TEST, OTHERS, NONE = "make test", "the others alone", "no test"
ALL_PASS, SOME_FAIL, NONE_LEFT = 0, 1, 5  # what pytest ends with


@dataclass(frozen=True)
class Break:
    """A line of a file, and what becomes of it."""

    file: str
    line: str
    broken: str

    def apply(self, root: Path) -> None:
        """Raises ValueError unless the line is there once."""
        path = root / self.file
        lines = path.read_text().splitlines(keepends=True)
        at = [i for i, line in enumerate(lines) if line.strip() == self.line]
        if len(at) != 1:
            raise ValueError(f"{self.file} has {len(at)} lines {self.line!r}")
        lines[at[0]] = lines[at[0]].replace(self.line, self.broken)
        path.write_text("".join(lines))

    def place(self) -> tuple[str, set[int]]:
        """The function that the line is in, and the lines of its statement as reached.py counts them."""
        source = (ROOT / self.file).read_text()
        number = [line.strip() for line in source.splitlines()].index(self.line) + 1
        around = [
            node
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.stmt) and node.lineno <= number <= (node.end_lineno or node.lineno)
        ]
        statement = max(around, key=lambda node: node.lineno)
        name, first = reached.functions(ROOT / self.file)[number]
        end = max(number, min(statement.end_lineno or number, number + 8))
        return name, {line - first for line in range(statement.lineno, end + 1)}


def breaks() -> list[Break]:
    """Those of mutations.txt: three lines each, the file, `- ` the line and `+ ` what becomes of it."""
    lines = least_tests.BREAKS.read_text().splitlines()
    lines = [line for line in lines if not line.startswith(least_tests.ALONE)]
    thirds = zip(lines[::3], lines[1::3], lines[2::3], strict=True)
    return [Break(file, line.removeprefix("- "), broken.removeprefix("+ ")) for file, line, broken in thirds]


class Failed:
    """A plugin of pytest: notes the test that failed."""

    def __init__(self, note: Path):
        self.note = note

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.note.write_text(report.nodeid)


def fails(names: Sequence[str], root: Path) -> str | None:
    """The first of these tests that fails in the copy; empty where not even an import succeeds."""
    sys.stdout.flush()
    note = root.with_name("failed")
    note.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        try:
            os.setpgid(0, 0)
            os._exit(_tested(names, root, note))
        finally:
            os._exit(SOME_FAIL)
    until = time.monotonic() + HANGS
    code = None
    while code is None and time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if pid else None
        time.sleep(0.1)
    if code is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if code in (ALL_PASS, NONE_LEFT):
        return None
    return note.read_text() if note.exists() else ""


def _tested(names: Sequence[str], root: Path, note: Path) -> int:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.chdir(root)
    sys.path.insert(0, str(root))
    os.environ["PYTHONPATH"] = str(root)
    with tempfile.TemporaryDirectory() as temp:
        settings = ["-x", "-p", "no:cacheprovider", f"--basetemp={temp}/t", f"--rootdir={root}"]
        return int(pytest.main([*settings, *names], plugins=[Failed(note)]))


def caught(names: Sequence[str], root: Path) -> str | None:
    """The test that fails in the copy, and passes in the tree as it is."""
    left = list(names)
    while left:
        part = left[:FIRST]
        failed = fails(part, root)
        if failed is None:
            left = left[FIRST:]
        elif not failed or fails([failed], ROOT) is None:
            return failed or "an import"
        else:
            left = [name for name in left if name != failed]
    return None


def in_time(tests: Sequence[least_tests.Test], file: str) -> list[str]:
    """Those that are let run: the tests of this file's own, of its folder, all others; the quickest first."""
    path = Path(file)
    folder = f"{Path('tests', *path.parts[1:-1])}/"
    names, seconds = [], 0.0

    def order(test: least_tests.Test) -> tuple[bool, bool, float]:
        own = test.name.startswith(f"{folder}test_{path.stem}.py")
        return not own, not test.name.startswith(folder), test.seconds

    for test in sorted(tests, key=order):
        seconds += test.seconds
        if seconds < MOST_SECONDS:
            names.append(test.name)
    return names


class Outcome(NamedTuple):
    """What became of a break."""

    number: int
    one: Break
    first: int  # tests of `make test` that reach it
    reaching: int
    by: str  # MAKE_TEST, OTHERS or NONE
    test: str = ""

    @property
    def room(self) -> str:
        return self.one.file.split("/")[1]


class Tried:
    """Tries breaks, by what is known of the tests."""

    def __init__(self) -> None:
        self.every = breaks()
        self.tests, _, self.steps = least_tests.known(reached.test_files())
        self.chosen = least_tests.listed(self.tests)

    def outcome(self, number: int) -> Outcome:
        one = self.every[number]
        function, lines = one.place()
        where = [one.file, function]
        here = {i for i, (*place, a, b) in enumerate(self.steps) if place == where and lines & {a, b}}
        reaching = [test for test in self.tests if test.steps & here]
        first = [test for test in reaching if test.name in self.chosen]
        rest = [test for test in reaching if test.name not in self.chosen]
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "tree"
            shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*NOT_COPIED))
            one.apply(root)
            for by, tests in ((MAKE_TEST, first), (OTHERS, rest)):
                if found := caught(in_time(tests, one.file), root):
                    return Outcome(number, one, len(first), len(reaching), by, found)
        return Outcome(number, one, len(first), len(reaching), NONE)


def tried_here(number: int) -> Outcome:
    """In a process that was forked from one that has set `TRIED`."""
    assert TRIED is not None
    return TRIED.outcome(number)


TRIED: Tried | None = None  # too large to be sent to each process


def by_room(outcomes: Sequence[Outcome]) -> str:
    """A table: of each room, and of all, how many were caught and by what."""
    rows = [f"| room | breaks | {MAKE_TEST} | {OTHERS} | {NONE} |", "|---|---|---|---|---|"]
    for room in [*sorted({o.room for o in outcomes}), "all"]:
        ways = Counter(o.by for o in outcomes if room in (o.room, "all"))
        rows.append(f"| {room} | {ways.total()} | {ways[MAKE_TEST]} | {ways[OTHERS]} | {ways[NONE]} |")
    return "\n".join(rows)


def numbers(asked: Sequence[str], count: int) -> list[int]:
    """`3 12-90` as numbers; all without any."""
    found: list[int] = []
    for word in asked:
        begin, _, end = word.partition("-")
        found += range(int(begin), int(end or begin) + 1)
    return found if asked else list(range(count))


def main(asked: Sequence[str]) -> int:
    for name in reached.SLOW_TO_IMPORT:
        __import__(name)
    global TRIED
    TRIED = Tried()
    outcomes = []
    wanted = numbers(asked, len(TRIED.every))
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        for outcome in pool.map(tried_here, wanted):
            outcomes.append(outcome)
            number, one, first, reaching, by, test = outcome
            print(f"{number:3} {one.file}: {one.line}  ->  {one.broken}")
            print(f"    {first} of {reaching} tests that reach it; by {by} {test}", flush=True)
    print(by_room(outcomes))
    by_some = [o for o in outcomes if o.by != NONE]
    return sum(o.by == MAKE_TEST for o in by_some) < 0.95 * len(by_some)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
