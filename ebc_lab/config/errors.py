"""The error for a user's mistake, and the words that error messages share."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence


class UserError(Exception):
    """A user's mistake: what was wrong, where, and what to do next, in one sentence. Exit code 2."""


def any_of(choices: Sequence[str]) -> str:
    return " or ".join([", ".join(choices[:-1]), choices[-1]]) if len(choices) > 1 else choices[0]


def shown(value: object) -> str:
    """A value as messages show it, cut where it is long."""
    text = str(value) if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:80])
    return text if len(text) < 60 else f"{text[:57]}…"


def nearest(word: str, choices: Sequence[str]) -> str:
    """` (did you mean …?)`, or nothing if nothing is near; a dotted path also matches by its last part."""
    tails = {c.rpartition(".")[2]: c for c in reversed(choices)}
    by_tail = [tails[t] for t in difflib.get_close_matches(word.rpartition(".")[2], list(tails), 3, 0.6)]
    near = list(dict.fromkeys(difflib.get_close_matches(word, choices, 3, 0.6) or by_tail))
    return f" (did you mean {any_of(near)}?)" if near else ""


def clock(seconds: float | None) -> str:
    """A duration a person reads at a glance."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    minutes, s = divmod(whole, 60)
    return f"{minutes} min {s:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
