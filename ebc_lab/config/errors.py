"""The error for a user's mistake, and the words that error messages share."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

LONG = 400  # characters of a list of choices

# what a terminal or a page obeys instead of showing it: controls but tab and line feed, bidirectional
# overrides, tags, halves of surrogate pairs
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Text from outside with every control character as an escape that can be read."""
    return HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class UserError(Exception):
    """A user's mistake: what was wrong, where, and what to do next, in one sentence. Exit code 2."""

    def __str__(self) -> str:
        return visible(super().__str__())


def require(ok: bool, message: str) -> None:
    """Raise UserError with this message unless it is so."""
    if not ok:
        raise UserError(message)


# what code raises that takes a value for something else
MISTAKEN = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    StopIteration,
)


@contextmanager
def blamed(what: str, remedy: str) -> Iterator[None]:
    """Around code that takes what it has read for what it should be: its failure is the file's.

    For contents that no type hint describes, as those of a stage's decision. Raises UserError.
    """
    try:
        yield
    except MISTAKEN as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{what} holds what ebc-lab never writes ({why}): {remedy}.") from error


def any_of(choices: Sequence[str]) -> str:
    """`a, b or c`; the last ones are counted where naming all would fill the screen."""
    length = list(accumulate(len(choice) + 2 for choice in choices))
    if length[-1] > LONG:
        shown_count = sum(end <= LONG for end in length)
        choices = [*choices[:shown_count], f"{len(choices) - shown_count} more"]
    return " or ".join([", ".join(choices[:-1]), choices[-1]]) if len(choices) > 1 else choices[0]


def shown(value: object) -> str:
    """A value as messages show it: on one line, and cut where it is long."""
    text = str(value).replace("\n", "\\n") if isinstance(value, str) else repr(value)
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
