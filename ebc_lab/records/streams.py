"""What a run appends to while it trains: steps.csv, evals.csv, and its progress."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebc_lab.config.errors import UserError

if TYPE_CHECKING:
    import numpy as np
from .files import write_atomic
from .json_files import write_json

REPORT_S = 0.5  # seconds between two heartbeats of a run


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int):
        return str(value)
    return f"{value:.9g}"


class Heartbeat:
    """A run's progress.json, written at most every REPORT_S seconds however often this is called."""

    def __init__(self, path: Path, steps: int):
        self.path = path
        self.steps = steps
        self.at = time.monotonic()
        self.step: int | None = None  # where this attempt began, or what was written last
        self._write(0, 0.0)

    def __call__(self, step: int) -> None:
        now = time.monotonic()
        self.step = step if self.step is None else self.step
        if now - self.at >= REPORT_S:
            self._write(step, (step - self.step) / (now - self.at))
            self.at = now
            self.step = step

    def _write(self, step: int, steps_per_s: float) -> None:
        now = {"step": step, "steps": self.steps, "steps_per_s": steps_per_s, "at": time.monotonic()}
        write_json(self.path, now, durable=False)


class Stream:
    """An append-only CSV.

    Args:
        keep_below: rows from this step on are dropped: a killed run wrote them after its checkpoint.
    """

    def __init__(self, path: Path, columns: Sequence[str], keep_below: int):
        self.path = path
        self.columns = tuple(columns)
        kept: list[str] = []
        if keep_below and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            if not lines or lines[0] != ",".join(self.columns):
                raise UserError(f"{path} has other columns than this version writes: delete its run folder.")
            kept = [
                line
                for line in lines[1:]
                if line.count(",") == len(columns) - 1 and int(line.split(",")[0]) < keep_below
            ]
        write_atomic(path, "".join(f"{line}\n" for line in [",".join(self.columns), *kept]))
        self.file = open(path, "a", encoding="utf-8", buffering=1 << 16)  # noqa: SIM115 - open as long as the run

    def append(self, row: Mapping[str, Any]) -> None:
        self.file.write(",".join(_cell(row.get(c)) for c in self.columns) + "\n")

    def sync(self) -> None:
        """Everything appended so far is on disk when this returns."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.sync()
        self.file.close()


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """A stream as float arrays by column, NaN where empty. An incomplete last line is left out."""
    import numpy as np

    with open(path, encoding="utf-8", newline="") as f:
        rows = list(csv.reader(f))
    header = rows[0]
    body = [r for r in rows[1:] if len(r) == len(header)]
    return {
        name: np.array([float(r[i]) if r[i] else math.nan for r in body], dtype=np.float64)
        for i, name in enumerate(header)
    }
