"""JSON files, and JSON files with a checksum by which an edit is noticed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest

from .files import write_atomic


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write readable JSON atomically. NaN and infinities become null, because JSON has neither."""
    write_atomic(path, json.dumps(as_json(value), indent=1, allow_nan=False) + "\n", durable=durable)


def as_json(value: Any) -> Any:
    """A value as it comes back from a JSON file: lists, string keys, null for NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    if hasattr(value, "item"):  # a numpy scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Raises UserError, naming the file, when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): delete it, and the next run writes it again."
        ) from None


def write_checksummed(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON with a checksum of everything else in it, so that `read_checksummed` notices an edit."""
    write_json(path, with_checksum(value))


def with_checksum(value: Mapping[str, Any], key: str = "checksum") -> dict[str, Any]:
    """The value as it is read back, with the digest of everything else in it under `key`."""
    rest = {k: v for k, v in as_json(value).items() if k != key}
    return {**rest, key: digest(rest)}


def checksum_holds(value: Any, key: str = "checksum") -> bool:
    """Whether a value still has the checksum that `with_checksum` gave it; False without one."""
    if not isinstance(value, dict):
        return False
    try:
        return bool(value.get(key) == digest({k: v for k, v in value.items() if k != key}))
    except ValueError:  # a NaN, which we never write
        return False


def read_checksummed(path: Path, remedy: str) -> dict[str, Any]:
    """What `write_checksummed` was given. Raises UserError with the remedy if the file was edited since."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:  # not JSON, or not text
        raise UserError(f"{path} is damaged ({error}): {remedy}.") from None
    if not checksum_holds(value):
        raise UserError(f"{path} was edited after it was written: {remedy}.")
    return {k: v for k, v in value.items() if k != "checksum"}
