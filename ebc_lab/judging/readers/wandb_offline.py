"""Folders that W&B writes on the machine of the run: `wandb/offline-run-*`, and those of synced runs.

W&B's own reader (`wandb leet inspect --json`) is a program that starts once a file and is not in every
version, so the log's blocks are taken apart here, and W&B's protocol buffers read what is in them. The format
of the blocks is LevelDB's log: https://github.com/google/leveldb/blob/main/doc/log_format.md.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ebc_lab.config.errors import MISTAKEN, UserError, blamed, count, listed

from ..asked import Asked
from .reader import Source, files_below, flat, needed, number, of_run, source_of_runs, told_apart

LOG = r"run-.*\.wandb"
MAGIC = b":W&B"
BLOCK = 32 * 1024  # bytes; the first begins with a header of 7
WHOLE, LAST = 1, 4  # kinds of a record's parts; 2 and 3 are its first and those in its middle


class Torn(Exception):
    """A log ends in the middle of a record, or its checksum is wrong."""


class NotALog(Exception):
    """A file does not begin as W&B's logs do."""


@dataclass
class _Run:
    """What the logs of one run say, in the order in which they were written."""

    key: str
    name: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, str] = field(default_factory=dict)  # as JSON: W&B repeats it at every step
    rows: list[dict[str, float]] = field(default_factory=list)
    steps: set[str] = field(default_factory=set)  # what define_metric names as a step
    exit_code: int | None = None


TITLE = "offline folders of W&B"


def claims(path: Path) -> bool:
    return any(_begins_well(log) for log in files_below(path, LOG))


def read(path: Path, asked: Asked) -> Source:
    """Return a row a `log`. A run that was resumed is one run, and its logs follow each other."""
    try:
        from google.protobuf.message import DecodeError
        from wandb.proto import wandb_internal_pb2 as protocol
    except ImportError:
        raise needed("wandb", "wandb", path) from None
    runs: dict[str, _Run] = {}
    notes, unreadable, seen = [], [], set[tuple[str, int]]()
    for log in sorted(files_below(path, LOG), key=lambda log: log.parent.name.split("run-", 1)[-1]):
        content = (log.name, zlib.crc32(log.read_bytes()))
        if log.parent.name == "latest-run" and content in seen:  # it was a link, and became a copy
            continue
        seen.add(content)
        try:
            for record in _records(log):
                _take(runs, log.stem, protocol.Record.FromString(record))
        except NotALog:
            unreadable.append(log.name)
        except Torn as fault:
            notes.append(f"{log.name} ends in the middle ({fault}): what stands before that was read.")
        except (DecodeError, *MISTAKEN) as error:
            why = f"{type(error).__name__}: {error}"
            notes.append(
                f"{log.name} holds a record of another kind ({why}): what stands before it was read."
            )
    if unreadable:
        notes.append(
            f"{len(unreadable)} logs are empty or damaged from their first byte, and their runs are left "
            f"out ({listed(unreadable)}): what is known of them is "
            "in files/wandb-summary.json beside them; see whether runs that went wrong are among them."
        )
    if not runs:
        raise UserError(f"{path} holds no run of W&B that can be read. {' '.join(notes)}")
    every = sorted(runs.values(), key=lambda run: str(run.about.get("started", "")))
    rows = [row for n, run in enumerate(every) for row in of_run(n, _with_summary(run))]
    curves = pd.DataFrame(rows) if rows else pd.DataFrame({"run": []})
    names = told_apart([run.name for run in every], [run.key for run in every])
    about = [
        {"run": name, "name": run.name or run.key} | run.about for name, run in zip(names, every, strict=True)
    ]
    steps = {step for run in every for step in run.steps} & set(curves.columns)
    if unfinished := [name for name, run in zip(names, every, strict=True) if run.exit_code != 0]:
        notes.append(
            f"{len(unfinished)} of {len(every)} runs did not end well (exit code not 0, or none): "
            f"{listed(unfinished)}."
        )
    roles = {"run": "run", "started": "started", "step": steps.pop() if len(steps) == 1 else "_step"}
    what = f"{count(len(every), 'offline run')} of W&B"
    return source_of_runs(about, [flat(run.config) for run in every], curves, what, roles, notes)


def _begins_well(log: Path) -> bool:
    with log.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _records(log: Path) -> Iterator[bytes]:
    """Yield the records of a log, each put together from its parts.

    Raises Torn where the next is not whole, NotALog where the first bytes are not W&B's."""
    content = log.read_bytes()
    if content[:4] != MAGIC:
        raise NotALog
    place, parts = 7, b""
    while place < len(content):
        left = BLOCK - place % BLOCK
        if left < 7:  # no room for the head of a part: zeros fill the block
            place += left
            continue
        head = content[place : place + 7]
        if len(head) < 7:
            raise Torn("a record's head is cut off")
        checksum, size, kind = struct.unpack("<IHB", head)
        part = content[place + 7 : place + 7 + size]
        if len(part) < size:
            raise Torn("a record is cut off")
        if zlib.crc32(part, zlib.crc32(bytes([kind]))) != checksum:
            raise Torn(f"the checksum at byte {place} is wrong")
        parts += part
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""
        place += 7 + size
    if parts:
        raise Torn("the last record is cut off")


def _take(runs: dict[str, _Run], key: str, record: Any) -> None:
    """Add what a record says to the run of its log."""
    kind = record.WhichOneof("record_type")
    run = runs.setdefault(key, _Run(key.removeprefix("run-")))
    if kind == "run":
        run.name = record.run.display_name or run.name
        run.about.setdefault("started", _time(record.run.start_time))
        known = {"group": record.run.run_group, "job_type": record.run.job_type}
        run.about |= {name: value for name, value in known.items() if value}
        _configure(run.config, record.run.config)
    elif kind == "config":
        _configure(run.config, record.config)
    elif kind == "history":
        row: dict[str, float] = {"_step": record.history.step.num}
        for item in record.history.item:
            _add_numbers(row, ".".join(item.nested_key) or item.key, json.loads(item.value_json))
        for clock in ("_runtime", "_timestamp"):
            row.pop(clock, None)
        run.rows.append(row)
    elif kind == "summary":
        for item in record.summary.update:
            run.summary[".".join(item.nested_key) or item.key] = item.value_json
    elif kind == "metric":
        run.steps |= {record.metric.step_metric} - {""}
    elif kind == "exit":
        run.exit_code = record.exit.exit_code


def _time(stamp: Any) -> Any:
    return pd.Timestamp(stamp.ToNanoseconds(), unit="ns") if stamp.seconds else pd.NaT


def _configure(config: dict[str, Any], change: Any) -> None:
    for item in change.update:
        *above, last = item.nested_key or [item.key]
        if (above or [last])[0] != "_wandb":
            inner = config
            for key in above:
                inner = inner.setdefault(key, {})
            inner[last] = json.loads(item.value_json)
    for item in change.remove:
        config.pop(item.key, None)


def _add_numbers(row: dict[str, float], name: str, value: object) -> None:
    """Add a logged value, of a nested one each number; pictures, tables and text have none."""
    if isinstance(value, dict):
        if "_type" not in value:
            for key, inner in value.items():
                _add_numbers(row, f"{name}.{key}", inner)
    elif (logged := number(value)) is not None and not isinstance(value, bool):
        row[name] = logged


def _with_summary(run: _Run) -> list[dict[str, float]]:
    """Return a run's rows; what only its summary has, a test loss at the end, stands in the last."""
    logged = {name for row in run.rows for name in row}
    only: dict[str, float] = {}
    for name, value in run.summary.items():
        if name not in logged and not name.startswith("_"):
            with blamed(f"the summary of {run.name or run.key}", "see what wrote this log, or leave it out"):
                _add_numbers(only, name, json.loads(value))
    if not only:
        return run.rows
    *before, last = run.rows or [{}]
    return [*before, {**last, **only}]
