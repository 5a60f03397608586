"""Which test reaches which lines of ebc_lab, and how long each takes.

    python scripts/reached.py [--update] [TEST_FILES…]        needs `pip install coverage`; half an hour

Every test file runs in a process of its own, so that no test finds what those of others left in a cache.
What was seen is written to .reached/, one file for each test file; `--update` reads anew only those that
have changed since. Lines are kept as a function's name and the line's place in it: an edit elsewhere in
its file moves none of them. Code outside functions runs whenever its file is imported, whichever test is
first; it is left out.
"""

from __future__ import annotations

import argparse
import ast
import functools
import gzip
import hashlib
import json
import os
import resource
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
SEEN = ROOT / ".reached"
NOT_HERE = "not slow and not slurm and not nodes and not cuda and not browser and not emulated"
CONTEXT = "REACHED_BY"  # an environment variable: the test for which a process was started
STARTS_COVERAGE = """
import coverage, os
watch = coverage.process_startup() or getattr(coverage.process_startup, "coverage", None)
leave = os._exit

def save_and_leave(code):  # a process that ends so, as those that train a run together do, would save nothing
    watch.stop()
    watch.save()
    leave(code)

if watch:
    os._exit = save_and_leave
"""
SETTINGS = """[run]
branch = true
parallel = true
source = {package}
data_file = {data}
context = ${{{context}-}}
"""
SLOW_TO_IMPORT = (
    *("torch", "torch._dynamo", "pytorch_optimizer", "numpy", "scipy.stats", "pandas", "matplotlib.pyplot"),
    *("hydra.main", "hydra.core.config_store", "omegaconf", "submitit", "pooch", "typer", "rich", "jinja2"),
)

# a step from one line of a function to another: (file, function, from, to), both counted from its first line
Arc = tuple[str, str, int, int]
ENDS = -1  # in place of a line: the function begins, or ends


def spent() -> float:
    """Seconds of processor time, of this process and of all it has waited for."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, kinds))


class Recorder:
    """A plugin of pytest: tells coverage which test runs, or which fixture that several of them share."""

    def __init__(self, coverage: Any):
        self.coverage = coverage
        self.tests: dict[str, dict[str, Any]] = {}
        self.shared: dict[str, float] = {}  # the fixtures that several tests share, and what each took
        self.within: list[str] = []
        self.begun = 0.0
        self.seconds: dict[str, float] = {}

    def _switch(self) -> None:
        now = spent()
        if self.current:
            self.seconds[self.current] = self.seconds.get(self.current, 0.0) + now - self.begun
        self.begun = now

    @property
    def current(self) -> str:
        return self.within[-1] if self.within else ""

    def enter(self, name: str) -> None:
        self._switch()
        self.within.append(name)
        self._told()

    def leave(self) -> None:
        self._switch()
        self.within.pop()
        self._told()

    def _told(self) -> None:
        self.coverage.switch_context(self.current)
        os.environ[CONTEXT] = self.current

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.enter(item.nodeid)
        begun = time.perf_counter()
        result = yield
        self.leave()
        known = getattr(item, "_fixtureinfo", None)
        definitions = known.name2fixturedefs.values() if known else ()
        shared = {_shared(of_name[-1]) for of_name in definitions}
        record = self.tests.setdefault(item.nodeid, {})
        record |= {"wall": time.perf_counter() - begun, "shared": sorted(shared - {""})}
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, object, object]:
        if not (name := _shared(fixturedef)):
            return (yield)
        self.enter(name)
        try:
            return (yield)
        finally:
            self.leave()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        record = self.tests.setdefault(report.nodeid, {})
        if report.when == "call" or report.outcome != "passed":
            record["outcome"] = report.outcome


def _shared(fixture: Any) -> str:
    return "" if fixture.scope == "function" else f"fixture {fixture.baseid}::{fixture.argname}"


# -- lines of functions --------------------------------------------------------------------------------------


@functools.cache
def functions(path: Path) -> dict[int, tuple[str, int]]:
    """Line -> the innermost function that it is in, and that function's first line."""
    lines: dict[int, tuple[str, int]] = {}

    def visit(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            inside = name
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inside = f"{name}.{child.name}".lstrip(".")
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = range(child.body[0].lineno, (child.end_lineno or child.lineno) + 1)
                lines.update(dict.fromkeys(body, (inside, child.lineno)))
            visit(child, inside)

    visit(ast.parse(path.read_text()), "")
    return lines


@functools.cache
def arc(path: str, start: int, end: int) -> Arc | None:
    """The step in terms of its function; None outside functions."""
    lines = functions(Path(path))
    function = lines.get(start) or lines.get(end)
    if function is None:
        return None
    name, first = function
    inside = [line - first if lines.get(line, ("",))[0] == name else ENDS for line in (start, end)]
    return str(Path(path).relative_to(ROOT)), name, inside[0], inside[1]


def _arcs(data: Path) -> Iterable[tuple[str, str, int, int]]:
    """What a file of coverage says: test, file, from, to."""
    with sqlite3.connect(data) as base:
        try:
            yield from base.execute(
                "select context.context, file.path, arc.fromno, arc.tono from arc"
                " join file on file.id = arc.file_id join context on context.id = arc.context_id"
            )
        except sqlite3.DatabaseError:  # of a process that was killed while it wrote
            return


# -- one test file -------------------------------------------------------------------------------------------


def seen_file(test_file: str) -> Path:
    return SEEN / (test_file.replace("/", "-").removesuffix(".py") + ".json.gz")


def digest(test_file: str) -> str:
    return hashlib.sha256((ROOT / test_file).read_bytes()).hexdigest()


def record(test_file: str) -> int:
    """Run the tests of a file in this process and write down what they reach. -> pytest's exit code"""
    import coverage

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        settings = folder / "settings"
        data = folder / "data" / "of"
        (folder / "site").mkdir()
        data.parent.mkdir()
        (folder / "site" / "sitecustomize.py").write_text(STARTS_COVERAGE)
        settings.write_text(SETTINGS.format(package=ROOT / "ebc_lab", data=data, context=CONTEXT))
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(folder / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        watch = coverage.Coverage(
            config_file=False,
            data_file=str(data),
            data_suffix="main",
            branch=True,
            source=[str(ROOT / "ebc_lab")],
        )
        recorder = Recorder(watch)
        watch.start()
        os.environ["COVERAGE_PROCESS_START"] = str(settings)
        code = pytest.main(
            [
                "-m",
                NOT_HERE,
                "--disable-warnings",
                "-p",
                "no:cacheprovider",
                f"--basetemp={folder / 'temp'}",
                test_file,
            ],
            plugins=[recorder],
        )
        watch.stop()
        watch.save()
        if apart := sys.modules.get("ebc_lab.training.apart"):
            apart._close_idle()  # processes that wait for further runs
        reached: dict[str, set[Arc]] = {}
        for part in sorted(data.parent.iterdir()):
            for test, path, start, end in _arcs(part):
                if test and path.endswith(".py") and (step := arc(path, start, end)):
                    reached.setdefault(test, set()).add(step)
    steps = sorted(set().union(*reached.values())) if reached else []
    number = {step: i for i, step in enumerate(steps)}
    written = {
        "file": test_file,
        "sha256": digest(test_file),
        "steps": steps,
        "seconds": recorder.seconds,
        "tests": recorder.tests,
        "reached": {test: sorted(number[s] for s in own) for test, own in sorted(reached.items())},
    }
    SEEN.mkdir(exist_ok=True)
    with gzip.open(seen_file(test_file), "wt") as file:
        json.dump(written, file)
    return int(code)


def read(test_file: str) -> dict[str, Any] | None:
    path = seen_file(test_file)
    if not path.exists():
        return None
    with gzip.open(path, "rt") as file:
        written: dict[str, Any] = json.load(file)
    return written


def test_files() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in TESTS.rglob("test_*.py"))


def changed(test_file: str) -> bool:
    """Whether it was read, and is no more as it was then."""
    seen = read(test_file)
    return seen is not None and seen["sha256"] != digest(test_file)


def read_anew(files: Sequence[str]) -> None:
    """Run the tests of these files, and write down what they reach."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for name in SLOW_TO_IMPORT:
        __import__(name)
    with tempfile.TemporaryDirectory() as shared:
        os.environ["TESTS_SHARED"] = shared  # studies that tests of several files share are trained once
        for i, test_file in enumerate(files, 1):
            begun = time.perf_counter()
            code = _in_own_process(test_file)
            took = time.perf_counter() - begun
            print(f"[{i}/{len(files)}] {test_file}: pytest ended with {code}, {took:.0f} s", flush=True)


def _in_own_process(test_file: str) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        code = record(test_file)
        sys.stdout.flush()
        os._exit(code)
    except BaseException:
        traceback.print_exc()
        os._exit(70)


def arguments(about: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("files", nargs="*", help="test files; all of them by default")
    parser.add_argument("--update", action="store_true", help="only those that changed since they were read")
    asked = parser.parse_args()
    files = asked.files or test_files()
    read_anew([f for f in files if not asked.update or read(f) is None or changed(f)])


if __name__ == "__main__":
    main()
