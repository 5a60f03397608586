"""Is a value read from a file of the kind that our code takes? Checked against the type hints of the code."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

LARGEST_INT = (1 << 63) - 1
NAMES = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", int: "a whole number"}
NAMES |= {float: "a finite number", type(None): "null"}


def misfit(value: Any, kind: Any, where: str = "") -> str | None:
    """What is wrong with a value as JSON holds it, `steps: text, not a whole number`; None if it fits.

    `kind`: a type hint: TypedDict, dataclass, dict, list, tuple (a list of so many), union, str, int, float,
    bool, None or Any.
    """
    origin = typing.get_origin(kind)
    if kind is Any or kind is object:
        return None
    if origin is tuple:
        return _wrong(value, list, where) or _misfit_items(value, typing.get_args(kind), where)
    if origin in (typing.Union, types.UnionType):
        found = [misfit(value, one, where) for one in typing.get_args(kind)]
        return None if None in found else found[0]
    if origin in (typing.Required, typing.NotRequired):
        return misfit(value, typing.get_args(kind)[0], where)
    if typing.is_typeddict(kind) or dataclasses.is_dataclass(kind):
        return _wrong(value, dict, where) or _misfit_fields(value, typing.cast(type, kind), where)
    if origin is dict:
        of_values = typing.get_args(kind)[1]
        inside = ((item, of_values, f"{where}.{k}") for k, item in _items(value))
        return _wrong(value, dict, where) or _first(inside)
    if origin is list:
        of_items = typing.get_args(kind)[0]
        each = enumerate(value) if isinstance(value, list) else ()
        return _wrong(value, list, where) or _first((item, of_items, f"{where}[{i}]") for i, item in each)
    return _wrong(value, kind, where)


def _first(parts: Any) -> str | None:
    """The first misfit among (value, kind, where)."""
    return next((wrong for part in parts if (wrong := misfit(*part))), None)


def _items(value: Any) -> Any:
    return value.items() if isinstance(value, Mapping) else ()


def _misfit_items(value: list[Any], kinds: tuple[Any, ...], where: str) -> str | None:
    """A list of exactly so many values, each of a kind of its own."""
    if len(value) != len(kinds):
        return f"{where.lstrip('.') or 'it'} has {len(value)} values, not {len(kinds)}"
    each = enumerate(zip(value, kinds, strict=True))
    return _first((item, one, f"{where}[{i}]") for i, (item, one) in each)


def _misfit_fields(value: Mapping[str, Any], kind: type, where: str) -> str | None:
    fields = _fields(kind)
    for name, (_, required) in fields.items():
        if required and name not in value:
            return f"{where}.{name}".lstrip(".") + " is missing"
    return _first((item, fields[k][0], f"{where}.{k}") for k, item in value.items() if k in fields)


@functools.cache
def _fields(kind: type) -> dict[str, tuple[Any, bool]]:
    """Key -> its kind, and whether it must be there."""
    hints = typing.get_type_hints(kind, include_extras=True)
    if dataclasses.is_dataclass(kind):
        return {f.name: (hints[f.name], False) for f in dataclasses.fields(kind)}
    # `__required_keys__` takes a NotRequired that is written as a string for a required one
    total = getattr(kind, "__total__", True)
    origins = {name: typing.get_origin(hint) for name, hint in hints.items()}
    required = {
        k for k, o in origins.items() if o is typing.Required or (total and o is not typing.NotRequired)
    }
    return {name: (hint, name in required) for name, hint in hints.items()}


def _wrong(value: Any, kind: Any, where: str) -> str | None:
    """What is wrong with a plain value, or with a container whatever it contains."""
    if _is(value, kind):
        return None
    own = next((name for plain, name in NAMES.items() if _is(value, plain)), "a number out of range")
    return f"{where.lstrip('.') or 'it'} is {own}, not {NAMES[kind]}"


def _is(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | kind):
            return False
        return math.isfinite(value) if isinstance(value, float) else abs(value) <= LARGEST_INT
    return isinstance(value, kind)
