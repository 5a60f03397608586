"""The rows of a benchmark, the ratios they come to, and both as a table or JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

BACKEND = "backend"  # of this library
ANCHOR = "anchor"  # what others offer for the same work
CONTEXT = "context"  # other work of the same size, for comparison
COMPILED = ("c", "cpp")
MAKING = "making the codes"  # in turns with packing and unpacking, which are measured by it
TARGETS = {"codes": 1.5, "values": 1.3}  # how much quicker than all others the compiled backends are to be
AGAINST = {  # operation -> another candidate, and how much quicker than that one
    "packed to values": {"numpy lookup": 1.5},
    "k-means": {"scikit-learn float64": 2.0, "scikit-learn float32": 1.0},
}
MOST_OF_MAKING = 0.35  # of the time of making the codes, for packing and unpacking


@dataclass(frozen=True)
class Row:
    """One candidate at one operation. Times are None where it did not run; `note` says why, or what it does.

    `size` counts values (points of a k-means). `peak_mb` is the peak of the process's memory above what it
    had before the call, in 2^20 bytes; None where it cannot be measured. `throughput` is in million values
    (of a k-means, points times passes) a second, `speedup` the best anchor's minimum over this one's.
    """

    operation: str
    levels: str | None
    size: int
    candidate: str
    kind: str
    threads: int
    minimum_ms: float | None = None
    median_ms: float | None = None
    peak_mb: float | None = None
    throughput: float | None = None
    speedup: float | None = None
    note: str = ""

    @property
    def group(self) -> tuple[str, str | None, int]:
        """Rows of one group did the same work in turns."""
        return self.operation, self.levels, self.size


@dataclass(frozen=True)
class Report:
    """`rows`; `ratios`, a line each; `machine` and `config`, what was measured and where."""

    rows: list[Row]
    dispatch: list[str]
    machine: dict[str, Any]
    config: dict[str, Any]

    @property
    def ratios(self) -> list[str]:
        """Compare the best of C and C++ on one thread with the best other, in each operation and size."""
        lines = []
        for group, rows in grouped(self.rows).items():
            timed = [row for row in rows if row.minimum_ms is not None and row.kind != CONTEXT]
            compiled = [row for row in timed if row.candidate in COMPILED]
            others = [row for row in timed if row.candidate.split(",")[0] not in COMPILED]
            if not compiled:
                continue
            ours = _quickest(compiled)
            if others and not _target_of(group, _quickest(others)):
                lines.append(_ratio(group, ours, _quickest(others)))
            lines += _against(group, ours, [row for row in rows if row.minimum_ms is not None])
        return lines + self.dispatch

    def to_json(self) -> str:
        rows = [dataclasses.asdict(row) for row in self.rows]
        whole = {"machine": self.machine, "config": self.config, "rows": rows, "ratios": self.ratios}
        return json.dumps(whole, indent=2)

    def __str__(self) -> str:
        lines = [", ".join(f"{name} {value}" for name, value in self.machine.items())]
        for group, rows in grouped(self.rows).items():
            lines += ["", title(group)]
            lines += _table(rows)
        lines += ["", "Ratios of minima:", *self.ratios]
        return "\n".join(lines)


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str | None, int], list[Row]]:
    groups: dict[tuple[str, str | None, int], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return groups


def with_speedups(rows: list[Row]) -> list[Row]:
    """Return the rows, each with its speed-up over the best anchor of its group."""
    finished = []
    groups = grouped(rows)
    for row in rows:
        anchors = [r for r in groups[row.group] if r.kind == ANCHOR and r.minimum_ms is not None]
        if anchors and row.minimum_ms and row.kind != CONTEXT:
            best = _milliseconds(_quickest(anchors))
            row = dataclasses.replace(row, speedup=best / row.minimum_ms)
        finished.append(row)
    return finished


def _milliseconds(row: Row) -> float:
    assert row.minimum_ms is not None
    return row.minimum_ms


def _quickest(rows: list[Row]) -> Row:
    return min(rows, key=_milliseconds)


def _ratio(group: tuple[str, str | None, int], ours: Row, other: Row) -> str:
    ratio = _milliseconds(other) / _milliseconds(ours)
    target = TARGETS.get(group[0])
    wanted = f" (target {target:g})" if target else ""
    return f"{title(group)}: {ours.candidate} over {other.candidate}: {ratio:.2f}{wanted}"


def _target_of(group: tuple[str, str | None, int], row: Row) -> float | None:
    """Return how much quicker than this candidate the compiled backends are to be, if that is set."""
    for operation, targets in AGAINST.items():
        if group[0].startswith(operation):
            return targets.get(row.candidate)
    return None


def _against(group: tuple[str, str | None, int], ours: Row, rows: list[Row]) -> list[str]:
    """Compare the compiled backends with single candidates that have a target of their own."""
    lines = []
    for row in rows:
        target = _target_of(group, row)
        if target:
            ratio = _milliseconds(row) / _milliseconds(ours)
            wanted = f"(target {target:g})"
            lines.append(f"{title(group)}: {ours.candidate} over {row.candidate}: {ratio:.2f} {wanted}")
    making = [row for row in rows if row.candidate.startswith(MAKING)]
    if making:
        share = _milliseconds(ours) / _milliseconds(_quickest(making))
        wanted = f"(at most {MOST_OF_MAKING:g})"
        lines.append(f"{title(group)}: {ours.candidate} takes {share:.2f} of {MAKING} {wanted}")
    return lines


def title(group: tuple[str, str | None, int]) -> str:
    operation, levels, size = group
    return f"{operation}{f' {levels}' if levels else ''}, {size:,}"


def _table(rows: list[Row]) -> list[str]:
    cells = [("", "kind", "min ms", "median", "peak MB", "million/s", "speed-up", "")]
    for row in rows:
        memory = _number(row.peak_mb, "not measured" if row.minimum_ms is not None else "")
        times = _number(row.minimum_ms), _number(row.median_ms), memory, _number(row.throughput)
        cells.append((row.candidate, row.kind, *times, _number(row.speedup), row.note))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        parts = [line[0].ljust(widths[0]), line[1].ljust(widths[1])]
        parts += [cell.rjust(width) for cell, width in zip(line[2:-1], widths[2:-1], strict=True)]
        lines.append("  ".join(["", *parts, line[-1]]).rstrip())
    return lines


def _number(value: float | None, otherwise: str = "") -> str:
    if value is None:
        return otherwise
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
