"""JSON lines, and JSON arrays of objects: a record an evaluation, or a record a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ebc_lab.config.errors import UserError, require, shown

from ..asked import Asked
from .delimited import NOT_UTF8, table_source
from .names import STEP_NAMES
from .reader import Source, cell, flat

ENDINGS = (".jsonl", ".ndjson", ".json")


TITLE = "JSON lines"


def claims(path: Path) -> bool:
    if not path.is_file() or path.suffix.lower() not in ENDINGS:
        return False
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").split()
    if path.suffix.lower() == ".json":  # one object is a configuration, or another reader's format
        return bool(head) and (head[0] == b"[" or head[0][:2] == b"[{")
    return True


def read(path: Path, asked: Asked) -> Source:
    records, notes = _records(path)
    rows = [row for record in records for row in _exploded(flat(record, "/"), path)]
    return table_source(pd.DataFrame.from_records(rows), asked, path, "JSON file", notes)


def _records(path: Path) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Return the objects of a file, and a note where its last line was cut off.

    Raises UserError: a line is no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} {NOT_UTF8}") from error
    require(text.strip() != "", f"{path} is empty")
    what = "record" if text.lstrip().startswith("[") else "line"
    if what == "line":
        records, notes = _lines(text, path)
    else:
        try:
            records, notes = json.loads(text, parse_constant=_constant), []
        except ValueError as error:
            raise UserError(f"{path} is no whole JSON array: {error}") from error
    for number, record in enumerate(records, 1):
        require(isinstance(record, dict), f"{path}, {what} {number}: {shown(record)} is no JSON object")
    require(len(records) > 0, f"{path} holds no record")
    return records, notes


def _lines(text: str, path: Path) -> tuple[list[Any], list[str]]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    records = []
    for number, line in lines:
        try:
            records.append(json.loads(line, parse_constant=_constant))
        except ValueError as error:
            if number == lines[-1][0] and not text.endswith("\n") and records:
                return records, [f"The last line of {path.name} was cut off: left out."]
            raise UserError(f"{path}, line {number} is no JSON object: {error}") from error
    return records, []


def _constant(word: str) -> float:
    """Return what JSON has no word for: NaN and Infinity were logged and are not finite."""
    return math.inf


def _exploded(row: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """Return a record whose lists are a curve as a row a step; other lists are text.

    A list of objects holds such rows. Lists of numbers are a curve where one of them is called as steps are;
    or, where neither a list nor a value is, where one of them is called a loss: its steps count from 1.

    Raises UserError: the lists of a curve have different lengths.
    """
    inner = [name for name, value in row.items() if _objects(value)]
    if len(inner) == 1:
        outer = {name: value for name, value in row.items() if name != inner[0]}
        return [one for record in row[inner[0]] for one in _exploded({**outer, **flat(record, "/")}, path)]
    same = {name: cell(value) for name, value in row.items()}
    lists = {name: value for name, value in row.items() if _numbers(value)}
    steps = [name for name in lists if STEP_NAMES.fullmatch(name)]
    curve = [name for name in lists if steps or "loss" in name.lower()]
    if not steps and (len(curve) != 1 or any(STEP_NAMES.fullmatch(name) for name in row)):
        return [same]
    lengths = {len(lists[name]) for name in curve}
    require(
        len(lengths) == 1,
        f"{path}: lists {shown(', '.join(curve))} of a record have different lengths: write a record a step",
    )
    count = lengths.pop()
    counted = {} if steps else {"step": list(range(1, count + 1))}
    columns = {**counted, **{name: lists[name] for name in curve}}
    return [{**same, **{name: values[n] for name, values in columns.items()}} for n in range(count)]


def _numbers(value: object) -> bool:
    """Return whether a value is a list of numbers, with null where nothing was logged."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(each is None or type(each) in (int, float) for each in value)
    )


def _objects(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(each, dict) for each in value)
