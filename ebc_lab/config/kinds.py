"""Is a value read from a file of the kind that our code takes? Checked against the type hints of the code.

A hint is walked once, all of it, and becomes a function that checks values. A hint with a part that cannot be
checked is therefore refused before there is a value, and none can be accepted that fails at a later reading.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections import abc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

LARGEST_INT = (1 << 63) - 1
NAMES = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", int: "a whole number"}
NAMES |= {float: "a finite number", type(None): "null"}
MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)
NUMBERS = (int, float)
LISTS = (list, tuple, abc.Sequence, abc.MutableSequence)

Wrong = tuple[str, str] | None  # the place inside a value, and what is wrong there; None if it fits
Check = Callable[[Any], Wrong]


def misfit(value: Any, kind: Any, where: str = "") -> str | None:
    """What is wrong with a value as JSON holds it, `steps: text, not a whole number`; None if it fits.

    `kind`: see `check_form`. Raises TypeError as that does, whatever the value.
    """
    wrong = _check_of(kind)(value)
    if wrong is None:
        return None
    place, what = wrong
    return f"{(where + place).lstrip('.') or 'it'} {what}"


def check_form(kind: Any) -> None:
    """Raises TypeError, naming the part, unless values can be checked against every part of a type hint.

    It may be made of TypedDict, dataclass, dict and Mapping (with keys that are text), list and Sequence,
    tuple (a list of so many), union, str, int, float, bool, None and Any, and may not contain itself.
    """
    _check_of(kind)


@functools.cache
def _check_of(kind: Any) -> Check:
    origin = typing.get_origin(kind) or kind
    inside = typing.get_args(kind)
    if kind in (Any, object):
        return lambda value: None
    if origin in (typing.Union, types.UnionType):
        return partial(_one_of, [_check_of(one) for one in inside])
    if origin in (typing.Required, typing.NotRequired):
        return _check_of(inside[0])
    if typing.is_typeddict(kind) or dataclasses.is_dataclass(kind):
        return partial(_fields_of, *_fields(typing.cast(type, kind)))
    if origin is tuple and inside and inside[-1] is not Ellipsis:
        return partial(_so_many, [_check_of(one) for one in inside])
    if origin in LISTS:
        return partial(_list_of, _check_of(inside[0] if inside else Any))
    if origin in MAPPINGS and (not inside or inside[0] in (str, Any)):
        return partial(_mapping_of, _check_of(inside[1] if inside else Any))
    if kind is float:
        return _float
    if kind in NAMES:
        return partial(_plain, kind)
    raise TypeError(f"{kind!r} cannot be checked in a file: use what `check_form` names.")


def _fields(kind: type) -> tuple[dict[str, Check], list[str]]:
    """The check of each key, and the keys that must be there: of a dataclass none, whose constructor asks."""
    hints = typing.get_type_hints(kind, include_extras=True)
    total = getattr(kind, "__total__", True)
    if dataclasses.is_dataclass(kind):
        hints = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
        total = False
    checks = {}
    needed = []
    for name, hint in hints.items():
        try:
            checks[name] = _check_of(hint)
        except TypeError as error:
            raise TypeError(f"{kind.__name__}.{name}: {error}") from None
        # `__required_keys__` takes a NotRequired that is written as a string for a required one
        origin = typing.get_origin(hint)
        if origin is typing.Required or (total and origin is not typing.NotRequired):
            needed.append(name)
    return checks, needed


def _one_of(checks: Sequence[Check], value: Any) -> Wrong:
    for check in checks:
        if check(value) is None:
            return None
    return checks[0](value)


def _list_of(item: Check, value: Any) -> Wrong:
    if wrong := _plain(list, value):
        return wrong
    for place, one in enumerate(value):
        if wrong := item(one):
            return _inside(place, wrong)
    return None


def _so_many(items: Sequence[Check], value: Any) -> Wrong:
    """A list of exactly so many values, each of a kind of its own."""
    if wrong := _plain(list, value):
        return wrong
    if len(value) != len(items):
        return "", f"has {len(value)} values, not {len(items)}"
    for place, (item, one) in enumerate(zip(items, value, strict=True)):
        if wrong := item(one):
            return _inside(place, wrong)
    return None


def _mapping_of(item: Check, value: Any) -> Wrong:
    if wrong := _plain(dict, value):
        return wrong
    for key, one in value.items():
        if wrong := item(one):
            return _inside(key, wrong)
    return None


def _fields_of(checks: Mapping[str, Check], needed: Sequence[str], value: Any) -> Wrong:
    if wrong := _plain(dict, value):
        return wrong
    for name in needed:
        if name not in value:
            return f".{name}", "is missing"
    for key, one in value.items():
        check = checks.get(key)
        if check is not None and (wrong := check(one)):
            return _inside(key, wrong)
    return None


def _inside(key: str | int, wrong: tuple[str, str]) -> tuple[str, str]:
    """What is wrong with a part of a value, its place as seen from the value."""
    place, what = wrong
    return (f"[{key}]" if isinstance(key, int) else f".{key}") + place, what


def _float(value: Any) -> Wrong:
    return None if type(value) is float and math.isfinite(value) else _plain(float, value)


def _plain(kind: Any, value: Any) -> Wrong:
    """What is wrong with a plain value, or with a container whatever it contains."""
    if (type(value) is kind and kind not in NUMBERS) or _is(value, kind):  # most values are, and fit
        return None
    actual = next((name for plain, name in NAMES.items() if _is(value, plain)), "a number out of range")
    return "", f"is {actual}, not {NAMES[kind]}"


def _is(value: Any, kind: Any) -> bool:
    if kind in NUMBERS:
        if isinstance(value, bool) or not isinstance(value, int | kind):
            return False
        return math.isfinite(value) if isinstance(value, float) else abs(value) <= LARGEST_INT
    return isinstance(value, kind)
