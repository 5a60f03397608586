"""JSON files, and JSON files with a checksum by which an edit is noticed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ebc_lab.config.errors import HIDDEN, UserError, visible
from ebc_lab.config.identity import digest
from ebc_lab.config.kinds import check_form, misfit

from .files import read_regular, write_atomic

MOST_BYTES = 64 << 20  # of a JSON file; the manifest of 50,000 runs has 42 MB
DEEPEST = 64  # lists and mappings inside each other
REMEDY = "delete it, and the next run writes it again"


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write readable JSON atomically. NaN and infinities become null, because JSON has neither."""
    write_atomic(path, json.dumps(as_json(value), indent=1, allow_nan=False) + "\n", durable=durable)


def as_json(value: Any) -> Any:
    """Return a value as it comes back from a JSON file: lists, string keys, null for NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    if hasattr(value, "item"):  # a numpy scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, kind: Any = Any, remedy: str = REMEDY) -> Any:
    """Return what a JSON file holds, its texts `visible`. `kind`: the type hint that it must fit.

    Raises UserError, naming the file and the remedy, unless it is such a file; FileNotFoundError. Raises
    TypeError as `check_form`, also where there is no file.
    """
    check_form(kind)
    value, clean = _raw(path, remedy)
    fitting = _fitting(path, value, kind, remedy)
    return fitting if clean else _cleaned(fitting)


def parsed(content: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError for what JSON has not (NaN), and for what no file of
    ours holds: numbers of thousands of digits, nesting deeper than `DEEPEST`."""
    text = content if isinstance(content, str) else content.decode()
    try:
        value = DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") <= DEEPEST:
        return value
    level = [value]
    for _ in range(DEEPEST):
        level = [item for items in map(_inside, level) for item in items]
        if not level:
            return value
    raise ValueError("nested too deeply")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is beyond every number")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)


def _inside(value: Any) -> Iterable[Any]:
    """Return the lists and mappings directly inside a value."""
    items: Iterable[Any] = ()
    if isinstance(value, dict):
        items = value.values()
    elif isinstance(value, list):
        items = value
    return [item for item in items if isinstance(item, dict | list)]


def _raw(path: Path, remedy: str) -> tuple[Any, bool]:
    """Return what a JSON file holds, and whether all its texts are `visible`, as those of our own files."""
    content = read_regular(path, MOST_BYTES)
    try:
        text = content.decode()
        return parsed(text), "\\" not in text and text.replace("\n", " ").isprintable()
    except ValueError as error:  # not JSON, or not text
        raise UserError(f"{path} is damaged ({error}): {remedy}.") from None


def _fitting(path: Path, value: Any, kind: Any, remedy: str) -> Any:
    if wrong := misfit(value, kind):
        raise UserError(f"{path} is damaged ({wrong}): {remedy}.")
    return value


def _cleaned(value: Any) -> Any:
    """Return the value with all its texts `visible`."""
    if isinstance(value, str):
        return visible(value) if HIDDEN.search(value) else value
    if isinstance(value, dict):
        return {visible(k): _cleaned(v) for k, v in value.items()}
    return [_cleaned(v) for v in value] if isinstance(value, list) else value


def write_checksummed(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON with a checksum of everything else in it, so that `read_checksummed` notices an edit."""
    write_json(path, with_checksum(value))


def with_checksum(value: Mapping[str, Any], key: str = "checksum") -> dict[str, Any]:
    """Return the value as it is read back, with the digest of everything else in it under `key`."""
    rest = {k: v for k, v in as_json(value).items() if k != key}
    return {**rest, key: digest(rest)}


def checksum_holds(value: Any, key: str = "checksum") -> bool:
    """Tell whether a value still has the checksum that `with_checksum` gave it; False without one."""
    if not isinstance(value, dict):
        return False
    try:
        return bool(value.get(key) == digest({k: v for k, v in value.items() if k != key}))
    except (ValueError, RecursionError):  # an infinity or half a surrogate pair, which we never write
        return False


def read_checksummed(path: Path, remedy: str, kind: Any = Any) -> dict[str, Any]:
    """Return what `write_checksummed` was given. Raises as `read_json`, also if the file was edited since."""
    check_form(kind)
    value, clean = _raw(path, remedy)
    if not checksum_holds(value):
        raise UserError(f"{path} was edited after it was written: {remedy}.")
    value = _fitting(path, value, kind, remedy)
    return {k: v for k, v in (value if clean else _cleaned(value)).items() if k != "checksum"}
