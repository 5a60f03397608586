"""The files that a run writes while it trains: progress.json, and the streams steps.csv and evals.csv."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ebc_lab.config.errors import UserError

if TYPE_CHECKING:
    import numpy as np
from .files import atomic_writer, read_regular
from .json_files import write_json

MOST_BYTES = 1 << 30  # largest stream that is read
REPORT_S = 0.5  # seconds between two heartbeats of a run


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, int) else f"{value:.9g}"  # a bool is an int


class Heartbeat:
    """A writer of progress.json. Call it after each step; it writes at most once every REPORT_S seconds."""

    def __init__(self, path: Path, steps: int):
        self.path = path
        self.steps = steps
        self.step: int | None = None  # step of the last write; at first, the one where this attempt began
        self._write(0, 0.0)

    def __call__(self, step: int) -> None:
        self.step = step if self.step is None else self.step
        passed = time.monotonic() - self.written
        if passed >= REPORT_S:
            self._write(step, (step - self.step) / passed)
            self.step = step

    def _write(self, step: int, steps_per_s: float) -> None:
        self.written = time.monotonic()
        about = {"step": step, "steps": self.steps, "steps_per_s": steps_per_s, "at": self.written}
        write_json(self.path, about, durable=False)


class Mark(NamedTuple):
    """The state of a stream at one moment: the number of bytes written, and the sha256 of these bytes."""

    size: int
    sha256: str


class Stream:
    """A CSV file to which rows are appended.

    Args:
        after: the mark from which to continue an existing file; `holds` must be true of it. Rows that a
            killed run wrote after its checkpoint are dropped. None starts a new file.
    """

    def __init__(self, path: Path, columns: Sequence[str], after: Mark | None = None):
        self.path = path
        self.columns = tuple(columns)
        header = f"{','.join(self.columns)}\n".encode()
        content = read_regular(path, MOST_BYTES)[: after.size] if after else header
        if not content.startswith(header):
            raise UserError(f"{path} has other columns than this version writes: delete its run folder.")
        with atomic_writer(path) as f:
            f.write(content)
            # opened under its temporary name: later, its path may lead to another attempt's file
            self.file = open(f.name, "ab", buffering=1 << 16)  # noqa: SIM115 - open as long as the run
        self.size = len(content)
        self.sha256 = hashlib.sha256(content)

    def append(self, row: Mapping[str, Any]) -> None:
        line = f"{','.join(_cell(row.get(c)) for c in self.columns)}\n".encode()
        self.file.write(line)
        self.size += len(line)
        self.sha256.update(line)

    def mark(self) -> Mark:
        """Return the current mark of the stream."""
        return Mark(self.size, self.sha256.hexdigest())

    def sync(self) -> None:
        """Flush all rows appended so far to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.sync()
        self.file.close()


def holds(path: Path, mark: Mark, *, to_the_end: bool = False) -> bool:
    """Return whether a stream begins with the bytes of a mark or, with `to_the_end`, consists of them."""
    with suppress(FileNotFoundError, UserError):
        content = read_regular(path, MOST_BYTES)
        kept = content if to_the_end else content[: mark.size]
        return len(kept) == mark.size and hashlib.sha256(kept).hexdigest() == mark.sha256
    return False


def rows_in(path: Path) -> int:
    """Return the number of complete rows in a stream (in steps.csv, the number of steps taken); 0 if the
    stream cannot be read."""
    with suppress(OSError, UserError):
        return max(0, read_regular(path, MOST_BYTES).count(b"\n") - 1)
    return 0


def read_columns(path: Path, needed: Iterable[str] = (), *, alone: bool = False) -> dict[str, np.ndarray]:
    """Return column -> values, float64 of shape (rows,). An empty cell is NaN; an incomplete last row is left
    out. `alone`: return only the `needed` columns, in a quarter of the time. Raises FileNotFoundError, and
    UserError if the file is no such stream or lacks a `needed` column."""
    import numpy as np

    remedy = "delete its run folder, and the study's command trains the run again"
    content = read_regular(path, MOST_BYTES)
    try:
        rows = list(csv.reader(io.StringIO(content.decode(), newline="")))
        header = rows[0]
        if missing := set(needed) - set(header):
            raise ValueError(f"it has no column {min(missing)}")
        whole = [row for row in rows[1:] if len(row) == len(header)]
        if alone:
            places = [header.index(name) for name in needed]
            header = list(needed)
            whole = [[row[i] for i in places] for row in whole]
        body = np.array([[float(x) if x else math.nan for x in row] for row in whole])
    except (ValueError, IndexError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}.") from None
    body = body.reshape(-1, len(header))
    return {name: np.ascontiguousarray(body[:, i]) for i, name in enumerate(header)}


class NewRows:
    """The rows of a stream that grows, as they come: column -> value, NaN where a cell is empty.

    A row that is still being written waits for its end. A stream that is replaced, as another attempt
    replaces it, is read from its beginning.
    """

    def __init__(self, path: Path):
        self.path = path
        self.inode = -1
        self.size = 0  # bytes that have been read
        self.columns: Sequence[str] = ()

    def read(self) -> list[dict[str, float]]:
        """Return the rows that were written since the last call; none where there is no file."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return []
        if status.st_ino != self.inode:
            self.inode, self.size = status.st_ino, 0
        if status.st_size <= self.size:
            return []
        with open(self.path, "rb") as file:
            file.seek(self.size)
            whole, end, _ = file.read().rpartition(b"\n")
        lines = whole.decode().split("\n") if end else []
        if not self.size and lines:
            self.columns = lines.pop(0).split(",")
        self.size += len(whole) + len(end)
        rows = []
        for line in lines:
            values = [float(cell) if cell else math.nan for cell in line.split(",")]
            rows.append(dict(zip(self.columns, values, strict=True)))
        return rows
