"""JSON files, and JSON files with a checksum by which an edit is noticed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ebc_lab.config.dicts import misfit
from ebc_lab.config.errors import UserError, visible
from ebc_lab.config.identity import digest

from .files import read_regular, write_atomic

MOST_BYTES = 64 << 20  # of a JSON file; the manifest of 50,000 runs has 42 MB
DEEPEST = 64  # lists and mappings inside each other
LARGEST_INT = (1 << 63) - 1
LONG_NUMBER = b"0" * 19  # as many digits as the largest has
ZEROS = bytes.maketrans(b"123456789", b"0" * 9)
REMEDY = "delete it, and the next run writes it again"


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write `json_bytes` atomically."""
    write_atomic(path, json_bytes(value), durable=durable)


def json_bytes(value: Any) -> bytes:
    """Return readable JSON of a value as `as_json` makes it."""
    return msgspec.json.format(json.dumps(as_json(value), allow_nan=False).encode(), indent=1) + b"\n"


def as_json(value: Any) -> Any:
    """Return a value as it comes back from a JSON file: lists, string keys, null for NaN and infinities, and
    escapes for the halves of surrogate pairs that stand in a file's name for bytes that are no UTF-8."""
    if value is None or isinstance(value, int):
        return value  # most of what is recorded
    if isinstance(value, str):
        return value if value.isascii() else value.encode(errors="backslashreplace").decode()
    if isinstance(value, Mapping):
        return {as_json(str(k)): as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    if hasattr(value, "item"):  # a numpy scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, kind: Any = Any, remedy: str = REMEDY) -> Any:
    """Return what a JSON file holds, its texts `visible`. `kind`: the type hint that it must fit. Raises
    UserError, naming the file and the remedy, unless it is such a file; FileNotFoundError."""
    return _read(path, kind, remedy, checksummed=False)


def parse_json(content: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError for what is no JSON (NaN), and for what no file of
    ours holds: whole numbers of more than 64 bits, nesting deeper than `DEEPEST`."""
    return _parsed(content.encode() if isinstance(content, str) else content)[0]


def _read(path: Path, kind: Any, remedy: str, *, checksummed: bool) -> Any:
    content = read_regular(path, MOST_BYTES)
    try:
        recorded, value = _parsed(content)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}.") from None
    if checksummed and not checksum_holds(recorded):
        raise UserError(f"{path} was edited after it was written: {remedy}.")
    if wrong := misfit(value, kind):
        raise UserError(f"{path} is damaged ({wrong}): {remedy}.")
    return value


def _parsed(content: bytes) -> tuple[Any, Any]:
    """Return the value of a JSON text, and that value with its texts `visible`. Raises as `parse_json`."""
    try:
        value = msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value, value if _is_plain(content) else _made_visible(value)


def _is_plain(content: bytes) -> bool:
    """Return whether a glance shows, as of most of our files, that nothing in it is hidden or too large, and
    that it is not nested too deeply."""
    if not content.isascii() or b"\\" in content or b"\x7f" in content:
        return False
    digits = content.translate(ZEROS)
    fractions = digits.count(b"." + LONG_NUMBER)  # of floats, which may have as many digits
    return digits.count(LONG_NUMBER) == fractions and content.count(b"[") + content.count(b"{") <= DEEPEST


def _made_visible(value: Any, depth: int = 0) -> Any:
    """Return a value with its texts `visible`. Raises ValueError as `parse_json`."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        raise ValueError(f"{str(value)[:20]}… is too large")
    if not isinstance(value, dict | list):
        return value
    if depth == DEEPEST:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        return {visible(k): _made_visible(v, depth + 1) for k, v in value.items()}
    return [_made_visible(v, depth + 1) for v in value]


def write_checksummed(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON with a checksum of everything else in it, so that `read_checksummed` notices an edit."""
    write_json(path, with_checksum(value))


def with_checksum(value: Mapping[str, Any], key: str = "checksum") -> dict[str, Any]:
    """Return the value as it is read back, with the digest of everything else in it under `key`."""
    rest = {k: v for k, v in as_json(value).items() if k != key}
    return {**rest, key: digest(rest)}


def checksum_holds(value: Any, key: str = "checksum") -> bool:
    """Return whether a value still has the checksum that `with_checksum` gave it; False without one."""
    return isinstance(value, dict) and value.get(key) == digest({k: v for k, v in value.items() if k != key})


def read_checksummed(path: Path, remedy: str, kind: Any = Any) -> dict[str, Any]:
    """Return what `write_checksummed` was given. Raises as `read_json`, also if the file was edited since."""
    return read_sealed(path, remedy, kind)[0]


def read_sealed(path: Path, remedy: str, kind: Any = Any) -> tuple[dict[str, Any], str]:
    """Return what `read_checksummed` does, and the checksum."""
    value = _read(path, kind, remedy, checksummed=True)
    checksum = value.pop("checksum")
    return value, checksum
