"""Runs that somebody left, as two tables: a row a run, and the curve of each.

Everything that is said of them is a view of these tables. Whatever is left out or put in order on the way is
named in `Runs.cautions`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from ebc_lab.config.errors import UserError, count, listed, require, shown

from .columns import RATES, Columns, as_text, direction_of, plain
from .readers.reader import Source
from .record import Caution
from .repeats import repeated_steps

ROLES = ("run", "arm", "seed", "source", "planned", "length", "rows", "started", "outcome", "chosen_by")
PERCENT = "%"
FEWEST_ROWS = 5  # of every run: a curve, whose steps are missing
LARGEST = 1e100  # an outcome beyond it counts as not finite: its square would not be
MOST_STEPS = 2**53  # beyond it steps that differ by one are the same float
SMALLEST = 1e-8  # where no outcome is larger, differences vanish in rounding, and in what a page can show


@dataclass(frozen=True)
class Curves:
    """All curves end to end: run `run[i]` has the rows from `start[i]` to `end[i]` of `step` and `loss`."""

    run: np.ndarray[Any, Any]
    start: np.ndarray[Any, Any]
    end: np.ndarray[Any, Any]
    step: np.ndarray[Any, Any]
    loss: np.ndarray[Any, Any]

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Curves:
        """Return the curves of a frame with columns run, step and loss, sorted by run and step."""
        number = frame["run"].to_numpy()
        start = np.flatnonzero(np.r_[True, number[1:] != number[:-1]][: len(number)])
        step, loss = (frame[name].to_numpy(dtype=float) for name in ("step", "loss"))
        return cls(number[start], start, np.r_[start[1:], len(number)][: len(start)], step, loss)


@dataclass(frozen=True)
class Runs:
    """Runs and their curves.

    Attributes:
        table: one row a run; its index is the run's number. Columns: `run` (its name), `arm`, `seed` (text,
            None where there is none), `source`, `planned` (steps it was to have, NaN: unknown), `length` (its
            last step), `rows` (of its curve), `started` (datetime or NaT), `outcome`, `chosen_by` (what its
            configuration is chosen by), and a column for each of `settings`.
        curves: `run`, `step`, `loss`, by run and step; inf (or -inf where higher is better) where a value was
            logged and is not finite. Empty where the source has one row a run.
        settings: the columns that make a run's configuration, apart from arm and seed.
        loss: the judged column.
        better: `lower` or `higher`.
        step_name: the unit of steps; empty where there are no curves.
        choose: the column of `chosen_by`, where it is not the judged one.
        cautions: what was met while the tables were made.
    """

    table: pd.DataFrame
    curves: pd.DataFrame
    settings: tuple[str, ...]
    loss: str
    better: str
    step_name: str
    choose: str = ""
    cautions: tuple[Caution, ...] = ()

    @cached_property
    def by_run(self) -> Curves:
        """Return where in `curves` the rows of each run are."""
        return Curves.of(self.curves)

    def names(self, which: Any = slice(None)) -> list[str]:
        """Return the names of the runs that a mask or a list of numbers means; without one, of all."""
        return [str(name) for name in self.table.loc[which, "run"]]

    @property
    def worst(self) -> float:
        """Return the outcome that is behind every other."""
        return math.inf if self.better == "lower" else -math.inf


def runs_of(source: Source, columns: Columns) -> Runs:
    """Return the runs of a source. Raises UserError where its columns do not hold what they are taken for."""
    frame = source.frame
    require(len(frame) > 0, f"{source.what} holds no row.")
    loss = _numbers(frame, columns.loss, "loss")
    loss = np.where(np.abs(loss) > LARGEST, math.inf, loss)
    worst = math.inf if columns.better == "lower" else -math.inf
    codes, keys = _runs_in(frame, columns)
    table = _table(frame, columns, codes, keys)
    settings, cautions = _constant(frame, columns, codes, table)
    unit = plain(columns.step) if columns.step else ""
    if columns.step:
        step = _steps(frame, columns.step, "step")
        curves, repeats = _curves(columns, codes, step, loss, list(table["run"]))
        cautions += repeats
        curves["loss"] = curves["loss"].where(np.isfinite(curves["loss"]), worst)
        table = _with_curves(table, curves)
        if columns.choose:
            table["chosen_by"] = _at_the_end(_choosing(frame, columns), codes, step)
    else:
        _refuse_rows_of_curves(table, settings, columns)
        curves = pd.DataFrame({"run": codes[:0], "step": loss[:0], "loss": loss[:0]})
        table["outcome"] = loss
        table["chosen_by"] = _choosing(frame, columns) if columns.choose else loss
    for name in ("outcome", "chosen_by"):
        table[name] = table[name].where(table[name].abs() < LARGEST, worst)
    size = table["outcome"].abs()
    require(
        not 0 < size[size < LARGEST].max() < SMALLEST,
        f"no {columns.loss} is larger than {SMALLEST:g}: multiply the column by a power of ten, so that "
        "differences can be shown.",
    )
    return Runs(table, curves, settings, columns.loss, columns.better, unit, columns.choose, tuple(cautions))


def _refuse_rows_of_curves(table: pd.DataFrame, settings: Sequence[str], columns: Columns) -> None:
    """Raise UserError where rows without a step are those of curves: every run has several."""
    if not columns.seed or columns.run or table["seed"].nunique() < 2:
        return
    rows = table.groupby(["arm", "seed", *settings], dropna=False, sort=False).size()
    require(
        rows.min() < FEWEST_ROWS,
        f"every {columns.arm} and {columns.seed} has {FEWEST_ROWS} rows or more, and no column is known to "
        "count steps: say which with --step, or with --run what tells runs apart.",
    )


# -- columns as numbers --------------------------------------------------------------------------------------


def _numbers(frame: pd.DataFrame, column: str, role: str) -> np.ndarray[Any, Any]:
    """Return a column as floats; percentages as their numbers. Raises UserError at the first word."""
    values = frame[column]
    if values.dtype.kind in "fiu" and not isinstance(values.dtype, pd.CategoricalDtype):
        return values.to_numpy(dtype=np.float64, na_value=np.nan)
    text = values.astype("string").str.strip()
    text = text.mask(text == "")
    percent = text.str.endswith(PERCENT).fillna(False)
    if percent.any():
        others = ~percent & text.notna()
        if others.any():
            raise UserError(
                f"column {column} has percentages in some rows and plain numbers in others (row "
                f"{_first_row(others)}): write them alike."
            )
        text = text.str.rstrip(PERCENT)
    numbers = pd.to_numeric(text, errors="coerce")
    words = numbers.isna() & text.notna() & ~text.str.lower().isin(("nan", "inf", "-inf", "infinity"))
    if words.any():
        row = _first_row(words)
        cell = str(text.iloc[row - 1])
        mend = "mend that row"
        if re.fullmatch(r"[-+]?[\d.]*\d,[\d,.]*", cell):
            mend = "write numbers with a decimal point and without commas"
        raise UserError(
            f"column {column} is taken as the {role} and holds {shown(cell)} in row {row}: {mend}, or say "
            f"with --{role} which column it is."
        )
    logged = text.notna() & numbers.isna()
    return numbers.mask(logged, math.inf).to_numpy(dtype=np.float64, na_value=np.nan)


def _steps(frame: pd.DataFrame, column: str, role: str) -> np.ndarray[Any, Any]:
    """Return a column of steps as floats. Raises UserError: one is no number, or more than a run can have."""
    steps = _numbers(frame, column, role)
    far = np.flatnonzero(np.isfinite(steps) & (np.abs(steps) > MOST_STEPS))
    if len(far):
        raise UserError(
            f"column {column} is taken as the {role} and holds {steps[far[0]]:g} in row {far[0] + 1}, more "
            f"than any run has: mend that row, or say with --{role} which column it is."
        )
    return steps


def _first_row(where: pd.Series) -> int:
    return int(where.to_numpy().argmax()) + 1


def _refuse_blank_steps(step: Any, logged: Any, columns: Columns) -> None:
    blank = np.flatnonzero(logged & ~np.isfinite(step))
    if len(blank):
        raise UserError(
            f"{count(len(blank), 'row')} with a {columns.loss} lack the {columns.step} (the first is row "
            f"{blank[0] + 1}): give each its step, or leave the rows out."
        )


# -- runs ----------------------------------------------------------------------------------------------------


def _runs_in(frame: pd.DataFrame, columns: Columns) -> tuple[Any, list[str]]:
    """Return the number of each row's run, in the order of their first rows, and the columns that tell runs
    apart. Where no step is there, every row is a run."""
    if not columns.step:
        return np.arange(len(frame)), []
    if columns.run:
        keys = list(dict.fromkeys([columns.run, columns.arm]))
        codes = _numbered(frame, keys)
        seeds = frame[columns.seed] if columns.seed else None
        if seeds is None or seeds.hasnans or not _varies_within(seeds, codes):
            return codes, keys
        keys.append(columns.seed)  # the column of runs counts them afresh for each seed
        return _numbered(frame, keys), keys
    keys = [name for name in (columns.arm, columns.seed) if name]
    keys += [name for name in columns.settings if not _follows_steps(frame, name, keys, columns)]
    length = columns.planned
    if length and _varies_within(frame[length], _numbered(frame, keys)):
        keys.append(length)  # a run has one plan
    return _numbered(frame, keys), keys


def _numbered(frame: pd.DataFrame, keys: Sequence[str]) -> Any:
    """Return a number for each row: equal where the keys are, from 0 in the order of first rows. Of equal
    rows that stand together only the first is looked up."""
    changed = np.zeros(len(frame), dtype=bool)
    changed[0] = True
    for key in keys:
        changed[1:] |= _changes(frame[key])
    starts = np.flatnonzero(changed)
    combined: Any = np.zeros(len(starts), dtype=np.int64)
    for key in keys:
        codes = pd.factorize(frame[key].iloc[starts])[0].astype(np.int64)
        combined = pd.factorize(combined * (int(codes.max()) + 2) + codes + 1)[0].astype(np.int64)
    return np.repeat(combined, np.diff(starts, append=len(frame)))


def _changes(values: pd.Series) -> Any:
    """Return for each row but the first whether its value is another than that of the row before."""
    codes = values.to_numpy() if values.dtype.kind in "iub" else pd.factorize(values)[0]
    return codes[1:] != codes[:-1]


def _follows_steps(frame: pd.DataFrame, name: str, keys: Sequence[str], columns: Columns) -> bool:
    """Return whether a column is a course within runs, as a logged learning rate is, and no setting: without
    it no two rows of a run have the same step, though it varies there."""
    codes = _numbered(frame, keys)
    return _varies_within(frame[name], codes) and not bool(
        frame[[columns.step]].assign(run=codes).duplicated().any()
    )


def _varies_within(values: pd.Series, codes: Any) -> bool:
    """Return whether some run has two values."""
    if not (_changes(values) & (codes[1:] == codes[:-1])).any() and (np.diff(codes) >= 0).all():
        return False
    several = values.astype("category").cat.codes.groupby(codes).nunique()
    return bool((several > 1).any())


def _refuse_blank_arms(table: pd.DataFrame, first: Any, columns: Columns) -> None:
    blank = np.flatnonzero(table["arm"].isna().to_numpy())
    if len(blank):
        what = count(len(blank), "run" if columns.step else "row")
        raise UserError(
            f"{what} without a value in column {columns.arm}, which names the arm (the first in row "
            f"{first[blank[0]] + 1}): fill it in, leave those rows out, or name another column with --arm."
        )


def _table(frame: pd.DataFrame, columns: Columns, codes: Any, keys: Sequence[str]) -> pd.DataFrame:
    """Return a row a run, of what its first row says."""
    first = np.full(int(codes.max()) + 1, -1, dtype=np.int64)
    first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)
    rows = frame.iloc[first].reset_index(drop=True)
    table = pd.DataFrame(index=pd.RangeIndex(len(first)))
    table["arm"] = rows[columns.arm].map(as_text).astype(object)
    _refuse_blank_arms(table, first, columns)
    table["seed"] = rows[columns.seed].map(as_text).astype(object) if columns.seed else None
    table["run"] = _names(rows, columns, keys, table)
    place = next((name for name in ("source", "file") if name in rows), "")
    table["source"] = rows[place].map(as_text).astype(object) if place else ""
    table["planned"] = _steps(rows, columns.planned, "planned") if columns.planned else math.nan
    table["length"], table["rows"] = math.nan, 0
    started = rows[columns.started] if columns.started else pd.Series(pd.NaT, index=rows.index)
    table["started"] = _times(started)
    settings = {
        _setting_name(name): rows[name].map(_setting).astype(object).where(rows[name].notna(), None)
        for name in columns.settings
    }
    return pd.concat([table, pd.DataFrame(settings, index=table.index)], axis=1) if settings else table


def _setting_name(column: str) -> str:
    """Return a setting's column in the table of runs, which must not be one of its own columns."""
    return f"setting {column}" if column in ROLES else column


def _names(rows: pd.DataFrame, columns: Columns, keys: Sequence[str], table: pd.DataFrame) -> list[str]:
    """Return a name for each run that no other has."""
    if columns.run:
        names = [as_text(value) or "" for value in rows[columns.run]]
        if len(set(names)) < len(names):
            names = [f"{arm} {name}" for arm, name in zip(table["arm"], names, strict=True)]
    else:
        names = list(table["arm"])
    if columns.seed and len(set(names)) < len(names):
        names = [f"{name}, seed {seed}" for name, seed in zip(names, table["seed"], strict=True)]
    for key in (key for key in keys if key not in (columns.run, columns.arm, columns.seed)):
        names = [f"{name}, {key} {as_text(value)}" for name, value in zip(names, rows[key], strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} (row {row + 1})" for row, name in enumerate(names)]
    return names


def _setting(value: Any) -> Any:
    return as_text(value) if isinstance(value, str) else value


def _times(values: pd.Series[Any]) -> pd.Series[Any]:
    """Return times; NaT where a value is none. Numbers are seconds since 1970, or milliseconds if large."""
    if values.dtype.kind not in "fiu":
        return pd.to_datetime(values, errors="coerce", utc=True, format="mixed")
    seconds = values.astype(float) / (1000 if values.max() > 1e11 else 1)
    return pd.to_datetime(seconds, unit="s", errors="coerce", utc=True)


def _constant(
    frame: pd.DataFrame, columns: Columns, codes: Any, table: pd.DataFrame
) -> tuple[tuple[str, ...], list[Caution]]:
    """Return the settings that do not vary within a run, and a caution about the others."""
    varying = [name for name in columns.settings if _varies_within(frame[name], codes)]
    kept = tuple(_setting_name(name) for name in columns.settings if name not in varying)
    for name in varying:
        del table[_setting_name(name)]
    varying = [name for name in varying if plain(name) not in RATES]  # a schedule that is logged
    if not varying:
        return kept, []
    verb = "varies" if len(varying) == 1 else "vary"
    sentence = f"{listed(varying)} {verb} within runs and so makes no configuration."
    return kept, [Caution(kind="varying_setting", sentence=sentence, runs=[])]


# -- curves --------------------------------------------------------------------------------------------------


def _curves(
    columns: Columns, codes: Any, step: Any, loss: Any, names: Sequence[str]
) -> tuple[pd.DataFrame, list[Caution]]:
    """Return the curves by run and step, without the rows that logged no loss, and what was met."""
    logged = ~np.isnan(loss)
    _refuse_blank_steps(step, logged, columns)
    cautions: list[Caution] = []
    if not logged.all():
        ended = _blank_ends(codes, step, logged)
        if len(ended):
            loss, logged = np.where(ended, math.inf, loss), logged | ended
            meant = [names[run] for run in np.unique(codes[ended])]
            cautions = [_blank_caution(meant, columns.loss)]
        codes, step, loss = codes[logged], step[logged], loss[logged]
    rows, repeats = repeated_steps(codes, step, loss, names, plain(columns.step))
    if rows is not None:
        codes, step, loss = codes[rows], step[rows], loss[rows]
    curves = pd.DataFrame({"run": codes, "step": step, "loss": loss}, copy=False)
    return curves, [*cautions, *repeats]


def _blank_ends(codes: Any, step: Any, logged: Any) -> Any:
    """Return a flag for each row without a loss that stands at the end of a run where one was due: other runs
    have one at this step, and the run's last is at least one of its usual distances away. Empty if there is
    none. Without this, a frame that has NaN both for diverged and for not logged would hide a divergence."""
    runs = int(codes.max()) + 1
    last, first = np.full(runs, -np.inf), np.full(runs, np.inf)
    np.maximum.at(last, codes[logged], step[logged])
    np.minimum.at(first, codes[logged], step[logged])
    gaps = np.bincount(codes[logged], minlength=runs) - 1
    usual = np.where(gaps > 0, (last - first) / np.maximum(gaps, 1), 0.0)
    with np.errstate(invalid="ignore"):
        late = ~logged & (step > last[codes]) & (step >= last[codes] + usual[codes])
    ended = late & np.isin(step, np.unique(step[logged]))
    return ended if ended.any() else ended[:0]


def _blank_caution(names: Sequence[str], loss: str) -> Caution:
    sentence = (
        f"{count(len(names), 'run')} ({listed(names)}) {'has' if len(names) == 1 else 'have'} rows without a "
        f"{loss} at the end, at steps where other runs have one: this counts as a loss that is not finite."
    )
    return Caution(kind="blank_end", sentence=sentence, runs=list(names))


def _choosing(frame: pd.DataFrame, columns: Columns) -> Any:
    """Return the column that chooses configurations, its sign turned where the judged one has the other
    direction, so that both agree in what is better."""
    values = _numbers(frame, columns.choose, "choose")
    return values if direction_of(columns.choose) in ("", columns.better) else -values


def _with_curves(table: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Return the table with lengths and last values of curves; a run that logged no loss has neither."""
    each = Curves.of(curves)
    for name, values in (("length", each.step), ("outcome", each.loss)):
        table[name] = math.nan
        table.loc[each.run, name] = values[each.end - 1]
    table["rows"] = np.bincount(curves["run"], minlength=len(table))
    table["chosen_by"] = table["outcome"]
    return table


def _at_the_end(choosing: Any, codes: Any, step: Any) -> Any:
    """Return for each run what its last row says that logged the value that chooses; NaN where none did."""
    logged = ~np.isnan(choosing)
    ended = _blank_ends(codes, step, logged)
    logged = logged | ended if len(ended) else logged
    rows = np.flatnonzero(logged)
    rows = rows[np.lexsort((step[rows], codes[rows]))]
    chosen = np.full(int(codes.max()) + 1, math.nan)
    chosen[codes[rows]] = choosing[rows]
    return chosen


def alike_arms(table: pd.DataFrame) -> list[Caution]:
    """Return a caution where the names of arms differ only in capitals or in spaces."""
    by_letters: dict[str, list[str]] = {}
    for arm in dict.fromkeys(table["arm"]):
        by_letters.setdefault("".join(arm.split()).casefold(), []).append(arm)
    alike = [" and ".join(map(repr, arms)) for arms in by_letters.values() if len(arms) > 1]
    if not alike:
        return []
    sentence = (
        f"Arms are told apart by capitals or spaces alone: {listed(alike)}. They are taken for different "
        "arms; write them alike if they are one."
    )
    return [Caution(kind="alike_arms", sentence=sentence, runs=[])]


def joined(several: Sequence[Runs]) -> Runs:
    """Return the runs of several sources as one. Raises UserError where they cannot stand in one table."""
    first = several[0]
    if len(several) == 1:
        return first
    for other in several[1:]:
        for what in ("better", "step_name"):
            mine, theirs = getattr(first, what), getattr(other, what)
            require(
                mine == theirs,
                f"the sources differ in what is the {what.removesuffix('_name')}: {mine or 'none'} and "
                f"{theirs or 'none'}; judge them one by one, or name the columns that they share.",
            )
    tables, curves, offset = [], [], 0
    named: set[str] = set()
    for number, runs in enumerate(several, 1):
        names = [name if name not in named else f"{name} (source {number})" for name in runs.table["run"]]
        named.update(names)
        tables.append(runs.table.assign(run=names))
        curves.append(runs.curves.assign(run=runs.curves["run"] + offset))
        offset += len(runs.table)
    settings = tuple(dict.fromkeys(name for runs in several for name in runs.settings))
    return replace(
        first,
        table=pd.concat(tables, ignore_index=True),
        curves=pd.concat(curves, ignore_index=True),
        settings=settings,
        cautions=tuple(caution for runs in several for caution in runs.cautions),
    )
