"""The exception for a user's mistake, and helpers for wording messages."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate

ENDS = 1500  # characters of a message that are kept at each end, where a name from a file makes it longer
LONG = 400  # characters of a list of choices; the rest are only counted

# characters that a terminal or a browser obeys instead of showing: controls except tab and line feed,
# bidirectional overrides, tags, halves of surrogate pairs
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Return `text`, possibly from an untrusted source, with control characters replaced by escapes."""
    if text.isprintable():  # true of nearly every text, and twice as fast as the substitution
        return text
    return HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class UserError(Exception):
    """A user's mistake. The message says on one line what is wrong, where, and what to do next. The exit code
    is 2."""

    def __str__(self) -> str:
        text = visible(super().__str__()).replace("\n", "\\n")
        return text if len(text) <= 2 * ENDS else f"{text[:ENDS]} … {text[-ENDS:]}"


def require(ok: bool, message: str) -> None:
    """Raise UserError with this message unless `ok`."""
    if not ok:
        raise UserError(message)


def refuse(mistakes: Mapping[str, object]) -> None:
    """Raise UserError with the first sentence in `mistakes` whose value is true, if there is one."""
    for sentence, is_made in mistakes.items():
        require(not is_made, sentence)


# what code raises when data does not have the structure that it expects
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
    """If the contents of the file `what` make the block fail, raise UserError ending in `remedy`.

    This is for contents that no type hint describes, such as a stage's decision.
    """
    try:
        yield
    except MISTAKEN as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{what} holds what ebc-lab never writes ({why}): {remedy}.") from error


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Put the path of the settings at fault, if it is not empty, before the message of a UserError raised in
    the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}" if path else str(error)) from None


def any_of(choices: Sequence[str]) -> str:
    """Return the choices as a list in words, such as `a, b or c`; `none` where there are none. A list of more
    than LONG characters is cut, and ends in the number of choices left out."""
    if not choices:
        return "none"
    length = list(accumulate(len(choice) + 2 for choice in choices))
    if length[-1] > LONG:
        shown_count = sum(end <= LONG for end in length)
        choices = [*choices[:shown_count], f"{len(choices) - shown_count} more"]
    return " or ".join([", ".join(choices[:-1]), choices[-1]]) if len(choices) > 1 else choices[0]


def listed(names: Iterable[object], most: int = 6) -> str:
    """Return names as a list in words, such as `a, b and c`; of many the first ones, and how many more."""
    every = [str(name) for name in names]
    named = every[:most]
    if len(every) > most:
        named.append(f"{len(every) - most:,} more")
    return " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)


def count(number: int, one: str) -> str:
    """Return a number with its noun: `1 run`, `3 runs`."""
    return f"{number:,} {one}{'s' * (number != 1)}"


def shown(value: object) -> str:
    """Return a value as text for a message, on one line and shortened if it is long."""
    text = str(value).replace("\n", "\\n") if isinstance(value, str) else repr(value)
    return text if len(text) < 60 else f"{text[:57]}…"


def nearest(word: str, choices: Sequence[str]) -> str:
    """Return ` (did you mean …?)` with the choices most similar to `word`, or an empty string if none is
    similar. If no whole choice is similar, the last parts of dotted paths are compared."""
    tails = {c.rpartition(".")[2]: c for c in reversed(choices)}
    by_tail = [tails[t] for t in difflib.get_close_matches(word.rpartition(".")[2], list(tails), 3, 0.6)]
    near = list(dict.fromkeys(difflib.get_close_matches(word, choices, 3, 0.6) or by_tail))
    return f" (did you mean {any_of(near)}?)" if near else ""


def clock(seconds: float | None) -> str:
    """Return a duration as text, such as `45 s`, `3 min 05 s` or `2 h 07 min`, or `–` if it is unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    minutes, s = divmod(whole, 60)
    return f"{minutes} min {s:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
