"""Reading and writing JSON files, with or without a checksum that reveals edits."""

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

MOST_BYTES = 64 << 20  # largest JSON file that is read; the manifest of 50,000 runs has 42 MB
DEEPEST = 64  # levels of nested lists and mappings
LARGEST_INT = (1 << 63) - 1
LONG_NUMBER = b"0" * 19  # as many digits as LARGEST_INT has
ZEROS = bytes.maketrans(b"123456789", b"0" * 9)
REMEDY = "delete it, and the next run writes it again"


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write a value as JSON through `write_atomic`."""
    write_atomic(path, json_bytes(value), durable=durable)


def json_bytes(value: Any) -> bytes:
    """Return `value`, converted by `as_json`, as the bytes of indented JSON text."""
    return msgspec.json.format(json.dumps(as_json(value), allow_nan=False).encode(), indent=1) + b"\n"


def as_json(value: Any) -> Any:
    """Return a value as it would be read back from a JSON file. Tuples become lists, keys become strings, and
    NaN and infinities become None. Lone surrogates, for undecodable bytes in file names, become escapes."""
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
    """Return the value in a JSON file, with its strings made `visible`. `kind`: the type hint that the value
    must fit. Raises FileNotFoundError, and UserError with the `remedy` if the file is invalid or unfit."""
    return _read(path, kind, remedy, checksummed=False)


def try_read(path: Path, kind: Any = Any) -> Any:
    """Return the value as `read_json` does; None if the file is missing, damaged or cannot be read. On NFS, a
    file that is being replaced is stale for a moment."""
    try:
        return read_json(path, kind)
    except (OSError, UserError):
        return None


def parse_json(content: str | bytes) -> Any:
    """Return the value that a JSON text encodes, with its strings unchanged (`read_json` makes them
    `visible`). Raises ValueError if the text is not strict JSON (NaN, for example), contains an integer
    beyond `LARGEST_INT`, or is nested more deeply than `DEEPEST`."""
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
    """Return the value of a JSON text, and that value with its strings `visible`. Raises as `parse_json`."""
    try:
        value = msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value, value if _is_plain(content) else _made_visible(value)


def _is_plain(content: bytes) -> bool:
    """Return whether a quick scan proves that no string of a JSON text needs `visible` and that the text
    breaks no limit, as is true of most files. If the scan proves nothing, the value must be checked."""
    if not content.isascii() or b"\\" in content or b"\x7f" in content:
        return False
    digits = content.translate(ZEROS)
    fractions = digits.count(b"." + LONG_NUMBER)  # floats may have that many decimals
    return digits.count(LONG_NUMBER) == fractions and content.count(b"[") + content.count(b"{") <= DEEPEST


def _made_visible(value: Any, depth: int = 0) -> Any:
    """Return a value with its strings made `visible`. Raises ValueError as `parse_json` does."""
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
    """Write a mapping as JSON with a checksum, by which `read_checksummed` detects edits."""
    write_json(path, with_checksum(value))


def with_checksum(value: Mapping[str, Any], key: str = "checksum") -> dict[str, Any]:
    """Return the mapping as it would be after writing it to JSON and reading it back, with a digest of all
    items but `key` stored under `key`."""
    rest = {k: v for k, v in as_json(value).items() if k != key}
    return {**rest, key: digest(rest)}


def checksum_holds(value: Any, key: str = "checksum") -> bool:
    """Return whether a value has the checksum that `with_checksum` adds; False if it is wrong or missing."""
    return isinstance(value, dict) and value.get(key) == digest({k: v for k, v in value.items() if k != key})


def read_checksummed(path: Path, remedy: str, kind: Any = Any) -> dict[str, Any]:
    """Return what `write_checksummed` wrote. Raises as `read_json` does, and UserError if it was edited."""
    return read_sealed(path, remedy, kind)[0]


def read_sealed(path: Path, remedy: str, kind: Any = Any) -> tuple[dict[str, Any], str]:
    """Return the mapping without its checksum, and the checksum. Raises as `read_checksummed` does."""
    value = _read(path, kind, remedy, checksummed=True)
    checksum = value.pop("checksum")
    return value, checksum
