"""The tests that `make test` runs: together they reach nearly what all do. Written to tests/least.json.

    python scripts/least_tests.py [--update] [TEST_FILES…]    chooses anew, from what scripts/reached.py saw
    python scripts/least_tests.py --check                     in a second: is the choice out of date?

First come the tests that alone caught a break of scripts/mutations.py. Then come those that reach steps from
a line to the next that none before them does, those first that reach most per second, until a second reaches
no more than a few: the last fiftieth of all steps takes as long as the rest, and is left to `make test-all`.
One that later ones make useless is dropped. Then, as long as there is time, those that reach what few of the
chosen do: a line that is reached is not yet a line whose value somebody looks at.

least.json names functions of which not every case is chosen, and the cases that are. A test that it does not
name runs: so does every new one, and `--check` fails once there are too many of these. `--update` reads the
test files anew that changed since scripts/reached.py last did; of a file never read the choice stays.
"""

from __future__ import annotations

import ast
import functools
import heapq
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import reached

ROOT = Path(__file__).parent.parent
LIST = ROOT / "tests" / "least.json"
# bits, exact numbers and invented examples: what they hold to is more than the lines they reach
ALWAYS = (
    "tests/config/test_golden_ids.py",
    "tests/training/test_golden.py",
    "tests/ebc/test_properties.py",
    "tests/ebc/test_reference.py",
    "tests/ebm/test_reference.py",
    "tests/test_house.py",
)
BREAKS = Path(__file__).with_name("mutations.txt")
ALONE = "! "  # before a test that alone caught the break above it
RATE = 4.0  # new steps a second that a test must reach
SHARE = 0.195  # of the processor time of all tests that the chosen may take
WORTH = (1.0, 0.2, 0.05)  # of being the first, second, third of the chosen tests to reach a step
UNKNOWN = 0.05  # share of the test functions that may be newer than the choice


@dataclass
class Test:
    """One case of a test, and what it costs and reaches with the fixtures that it shares with others."""

    name: str
    seconds: float
    shared: frozenset[str]
    own: frozenset[int]
    steps: frozenset[int] = field(default_factory=frozenset)

    @property
    def file(self) -> str:
        return self.name.partition("::")[0]


# -- what is known -------------------------------------------------------------------------------------------


def known(files: Iterable[str]) -> tuple[list[Test], dict[str, float], list[reached.Arc]]:
    """Every test of the files that passed, the seconds of each shared fixture, the steps by their number."""
    number: dict[reached.Arc, int] = {}
    tests = []
    seconds: Counter[str] = Counter()
    by_fixture: defaultdict[str, set[int]] = defaultdict(set)
    for file in files:
        if not (seen := reached.read(file)):
            continue
        here = [number.setdefault((path, name, a, b), len(number)) for path, name, a, b in seen["steps"]]
        of = {name: frozenset(here[i] for i in own) for name, own in seen["reached"].items()}
        for name, spent in seen["seconds"].items():
            if name.startswith("fixture "):
                seconds[name] = max(seconds[name], spent)
                by_fixture[name] |= of.get(name, frozenset())
        for name, record in seen["tests"].items():
            if record.get("outcome") == "passed":
                shared = frozenset(record.get("shared", ()))
                spent = max(seen["seconds"].get(name, 0.0), record["wall"] / 3)
                tests.append(Test(name, spent, shared, of.get(name, frozenset())))
    for test in tests:
        test.steps = test.own.union(*(by_fixture[name] for name in test.shared))
    return tests, dict(seconds), list(number)


@functools.cache
def functions(file: str) -> tuple[str, ...]:
    """The tests of a file by their names, `TestClass::test_it` where they are in one."""
    found: list[str] = []
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            found.append(node.name)
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            inner = (n.name for n in node.body if isinstance(n, ast.FunctionDef))
            found += [f"{node.name}::{name}" for name in inner if name.startswith("test")]
    return tuple(found)


# -- choosing ------------------------------------------------------------------------------------------------


class Choice:
    """The chosen tests, and how many of them reach each step."""

    def __init__(self, fixtures: Mapping[str, float]):
        self.fixtures = fixtures
        self.tests: dict[str, Test] = {}
        self.reaching: Counter[int] = Counter()
        self.paid: set[str] = set()
        self.seconds = 0.0

    def cost(self, test: Test) -> float:
        return 0.003 + test.seconds + sum(self.fixtures.get(f, 0.0) for f in test.shared - self.paid)

    def worth(self, test: Test, most: int) -> float:
        ways = WORTH[:most]
        return sum(ways[n] for step in test.steps if (n := self.reaching[step]) < len(ways))

    def add(self, test: Test) -> None:
        self.seconds += self.cost(test)
        self.paid |= test.shared
        self.tests[test.name] = test
        self.reaching.update(test.steps)

    def drop_useless(self, always: set[str]) -> None:
        """Dearest first, those all of whose steps others of the chosen reach too."""
        for test in sorted(self.tests.values(), key=lambda t: -t.seconds):
            if test.name not in always and all(self.reaching[step] > 1 for step in test.steps):
                del self.tests[test.name]
                self.reaching.subtract(test.steps)
                self.seconds -= test.seconds

    def add_best(self, tests: Iterable[Test], most: int, seconds: float, least: float = 0.0) -> None:
        """Those of most worth for a second first, until none is worth more than `least`, or time is up."""
        heap = [(-self.worth(t, most) / self.cost(t), t.name, t) for t in tests if t.name not in self.tests]
        heapq.heapify(heap)
        while heap:
            _, name, test = heapq.heappop(heap)
            # it is never more than when it was last looked at, so the best is known without looking at all
            rate = self.worth(test, most) / self.cost(test)
            if rate <= least or self.seconds + self.cost(test) > seconds:
                continue
            if heap and rate < -heap[0][0]:
                heapq.heappush(heap, (-rate, name, test))
                continue
            self.add(test)


def time_of_all(tests: Iterable[Test], fixtures: Mapping[str, float]) -> float:
    """Seconds of processor time of all tests, each shared fixture once."""
    return sum(test.seconds for test in tests) + sum(fixtures.values())


def caught_alone() -> set[str]:
    """The tests without which a break of mutations.txt passed `make test`."""
    return {line.removeprefix(ALONE) for line in BREAKS.read_text().splitlines() if line.startswith(ALONE)}


def chosen(tests: list[Test], fixtures: Mapping[str, float]) -> Choice:
    choice = Choice(fixtures)
    alone = caught_alone()
    for test in tests:
        if test.file in ALWAYS or test.name in alone:
            choice.add(test)
    always = set(choice.tests)
    choice.add_best(tests, 1, float("inf"), RATE)
    choice.drop_useless(always)
    choice.add_best(tests, len(WORTH), SHARE * time_of_all(tests, fixtures))
    return choice


# -- the list ------------------------------------------------------------------------------------------------


def split(name: str) -> tuple[str, str, str]:
    """`tests/a/test_b.py::test_c[d-e]` -> its file, `test_c`, `d-e`."""
    file, _, rest = name.partition("::")
    function, _, case = rest.partition("[")
    return file, function, case.removesuffix("]")


def written(tests: Iterable[Test], choice: Choice, old: Mapping[str, Any]) -> dict[str, Any]:
    """What least.json says of these tests, and of files that they are not from what it said before."""
    cases: defaultdict[tuple[str, str], list[tuple[str, bool]]] = defaultdict(list)
    for test in tests:
        file, function, case = split(test.name)
        cases[file, function].append((case, test.name in choice.tests))
    partly: dict[str, dict[str, list[str]]] = {}
    seen = {file for file, _ in cases}
    for file, of_file in old.get("cases", {}).items():
        if file not in seen:
            partly[file] = of_file
    for (file, function), of_function in sorted(cases.items()):
        if not all(is_chosen for _, is_chosen in of_function):
            partly.setdefault(file, {})[function] = [case for case, is_chosen in of_function if is_chosen]
    present = [file for file in reached.test_files() if file in seen or file in old.get("functions", {})]
    return {
        "functions": {
            file: len(functions(file)) if file in seen else old["functions"][file] for file in present
        },
        "modules": sorted(set(old.get("modules", ())) if seen < set(present) else ()),
        "cases": dict(sorted(partly.items())),
    }


def listed(tests: Iterable[Test]) -> set[str]:
    """Those of the tests that least.json has `make test` run."""
    partly = json.loads(LIST.read_text())["cases"]
    names = set()
    for test in tests:
        file, function, case = split(test.name)
        cases = partly.get(file, {}).get(function)
        if cases is None or case in cases:
            names.add(test.name)
    return names


def choose(files: list[str]) -> None:
    """Write the choice, and say what it comes to."""
    tests, fixtures, steps = known(files)
    choice = chosen(tests, fixtures)
    old = json.loads(LIST.read_text()) if LIST.exists() else {}
    said = written(tests, choice, old)
    reached_by_any = {step for test in tests for step in test.steps}
    modules = {steps[step][0] for step in reached_by_any}
    said["modules"] = sorted({*said["modules"], *modules} & set(_modules()))
    LIST.write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n")
    everything = time_of_all(tests, fixtures)
    lost = len(reached_by_any) - sum(count > 0 for count in choice.reaching.values())
    print(
        f"{len(choice.tests)} of {len(tests)} tests, {choice.seconds:.0f} of {everything:.0f} s of processor "
        f"time, reach {len(steps) - lost} of {len(steps)} steps from line to line"
    )


# -- whether it is out of date -------------------------------------------------------------------------------


@functools.cache
def _modules() -> tuple[str, ...]:
    """The files of ebc_lab that have functions."""
    return tuple(
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "ebc_lab").rglob("*.py"))
        if any(isinstance(node, ast.FunctionDef) for node in ast.walk(ast.parse(path.read_text())))
    )


def stale(said: Mapping[str, Any]) -> list[str]:
    """What of the list is no longer so. Cases are looked at where pytest collects them: tests/conftest.py."""
    found = []
    files = {file: functions(file) for file in reached.test_files()}
    for file, of_file in said["cases"].items():
        gone = sorted(set(of_file) - set(files.get(file, ())))
        found += [f"{file}::{name} is named, and there is no such test" for name in gone]
    found += [f"{file} was read, and is no more" for file in sorted(set(said["functions"]) - set(files))]
    unread = set(_modules()) - set(said["modules"])
    found += [f"{path}: no test that was read reaches it" for path in sorted(unread)]
    new = sum(max(len(names) - said["functions"].get(file, 0), 0) for file, names in files.items())
    if new > UNKNOWN * sum(said["functions"].values()):
        found.append(f"{new} test functions are newer than the choice: all of them run in `make test`")
    return found


def main() -> int:
    parser = reached.arguments(__doc__)
    parser.add_argument("files", nargs="*", help="test files to read anew before")
    parser.add_argument("--update", action="store_true", help="read anew those that changed")
    parser.add_argument("--check", action="store_true", help="fail if the choice is out of date")
    asked = parser.parse_args()
    if asked.check:
        found = stale(json.loads(LIST.read_text()))
        print("\n".join([*found, *(["run python scripts/least_tests.py --update"] if found else [])]), end="")
        return bool(found)
    new = set(reached.test_files()) - set(json.loads(LIST.read_text())["functions"]) if LIST.exists() else ()
    if asked.files or asked.update:
        reached.read_anew(asked.files or [f for f in reached.test_files() if reached.changed(f) or f in new])
    choose(reached.test_files())
    return 0


if __name__ == "__main__":
    sys.exit(main())
