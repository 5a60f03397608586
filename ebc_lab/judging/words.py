"""Lists and counts as sentences have them."""

from __future__ import annotations

from collections.abc import Iterable

MOST_NAMED = 6


def listed(names: Iterable[object], most: int = MOST_NAMED) -> str:
    """Return names as a list in words; of many the first ones, and how many more."""
    every = [str(name) for name in names]
    shown = every[:most]
    if len(every) > most:
        shown.append(f"{len(every) - most:,} more")
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def count(number: int, one: str) -> str:
    """Return a number with its noun: `1 run`, `3 runs`."""
    return f"{number:,} {one}{'s' * (number != 1)}"


def has_or_have(number: int) -> str:
    return "has" if number == 1 else "have"
