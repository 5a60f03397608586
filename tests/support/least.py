"""The tests of `make test`: all but what tests/least.json leaves out; scripts/least_tests.py chooses."""

from __future__ import annotations

import functools
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

LIST = Path(__file__).parent.parent / "least.json"
FUNCTION = re.compile(r"^(?:class (Test\w*)|    def (test\w*)|def (test\w*))", re.MULTILINE)


@functools.cache
def cases() -> dict[str, dict[str, list[str]]]:
    """Test file -> those of its functions of which some cases are left out -> the cases that run."""
    of_files: dict[str, dict[str, list[str]]] = json.loads(LIST.read_text())["cases"]
    return of_files


def _split(item: pytest.Item) -> tuple[str, str, str]:
    """File, function and case of a test: `tests/test_a.py`, `TestB::test_c`, `d-1`."""
    file, _, rest = item.nodeid.partition("::")
    function, _, case = rest.partition("[")
    return file, function, case.removesuffix("]")


def mark(items: Iterable[pytest.Item], whole_files: bool) -> None:
    """Mark the tests that `make test` runs. UsageError where a case is named that is no more."""
    known: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for item in items:
        file, function, case = _split(item)
        known[file, function].add(case)
        chosen = cases().get(file, {}).get(function)
        if chosen is None or case in chosen:
            item.add_marker("least")
    for (file, function), collected in known.items() if whole_files else ():
        gone = set(cases().get(file, {}).get(function, ())) - collected
        if gone:
            raise pytest.UsageError(
                f"tests/least.json names cases of {file}::{function} that are no more: {sorted(gone)}; "
                f"`python scripts/least_tests.py {file}` chooses anew."
            )


def left_out(path: Path, root: Path) -> bool:
    """Whether `make test` runs no test of this file, so that it need not even be imported."""
    of_file = cases().get(path.relative_to(root).as_posix(), {}) if path.is_relative_to(root) else {}
    if not of_file or any(of_file.values()):
        return False
    place = ""
    for inside, method, function in FUNCTION.findall(path.read_text()):
        place = inside or place
        name = f"{place}::{method}" if method else function
        if name and not inside and name not in of_file:
            return False
    return True


def asked(config: Any) -> bool:
    """Whether only the tests of `make test` run."""
    return bool(re.match(r"least\b", config.option.markexpr))
