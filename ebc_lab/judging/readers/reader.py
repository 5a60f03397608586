"""What a reader of one format is, what it returns, and what readers of trackers have in common."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from ebc_lab.config.errors import UserError, visible

from ..asked import Asked
from .names import ARM_NAMES, STEP_NAMES, columns_of_places

DEEPEST = 8  # levels of folders that are searched
FIRST_LOOK = 1000  # rows of a frame that are looked at before all


@dataclass(frozen=True)
class Source:
    """What lay in files of one format: a row an evaluation, or a row a run where no curve was kept.

    Attributes:
        frame: the rows, in the order in which they were logged. Columns are called as the format calls them.
            A value that was logged and is not finite is `inf`; one that was not logged is NaN.
        what: what was read, in words: `3 offline runs of W&B`.
        roles: role -> column, of the roles that the format itself knows: `run`, `arm`, `seed`, `lr`, `step`
            (training done before the row's value: 0 is before any), `loss`, `planned`, `started` (when the
            run began). The others are found by the names of columns, as `columns.choose_columns` knows them.
        settings: columns that the format keeps as a run's configuration.
        better: `lower` or `higher`, where the format says it.
        notes: what was left out and why, a sentence each; every one is shown as a caution.
    """

    frame: pd.DataFrame
    what: str
    roles: Mapping[str, str] = field(default_factory=dict)
    settings: Sequence[str] = ()
    better: str = ""
    notes: Sequence[str] = ()


def printable(source: Source) -> Source:
    """Return a source in whose names and sentences there are escapes for what a terminal would obey."""
    frame = source.frame.set_axis([visible(str(name)) for name in source.frame.columns], axis=1)
    roles = {role: visible(column) for role, column in source.roles.items()}
    settings, notes = (list(map(visible, texts)) for texts in (source.settings, source.notes))
    return Source(frame, visible(source.what), roles, settings, source.better, notes)


def plain_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """Return somebody's frame with its rows numbered from 0 and columns that have text for names: named
    levels of the index become columns, and names of several levels are joined, `val_loss/last`. Cells that
    hold lists or mappings become text. Floats of fewer than 64 bits become those that are written alike: 0.1
    of 32 bits is 0.1, and not 0.10000000149.

    Raises UserError: two columns have one name."""
    levels = [name for name in frame.index.names if name is not None and name not in frame.columns]
    others = [name for name in frame.index.names if name not in levels]
    made = frame.reset_index(level=levels) if levels and others else frame
    made = made.reset_index(drop=bool(others) or not levels)
    names = ["/".join(map(str, n)).strip("/") if isinstance(n, tuple) else str(n) for n in made.columns]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two columns are called {twice[0]}: rename one, or leave it out.")
    made.columns = names
    for name in names:
        cells = made[name]
        size = getattr(cells.dtype, "itemsize", 8)  # bytes
        if cells.dtype.kind == "f" and size < 8:
            short = cells.to_numpy(f"f{size}", na_value=np.nan)
            made[name] = np.fromiter(map(float, map(str, short)), float, len(short))
        elif cells.dtype == object and cells.iloc[:FIRST_LOOK].map(_holds_others).any():
            made[name] = cells.map(lambda value: str(value) if _holds_others(value) else value)
    return made


def _holds_others(value: object) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str | bytes)


class NothingKnown(UserError):
    """A place holds no file of a format that is known."""


class Reader(Protocol):
    """One format: a module of this folder with these three. Its name stands in `READERS`."""

    TITLE: str  # in words, of several files: `CSV files`

    def claims(self, path: Path) -> bool:
        """Return whether a file or a folder is of this format. Looks at names and at first bytes only."""

    def read(self, path: Path, asked: Asked) -> Source:
        """Return what lies there.

        Raises UserError: the file is damaged, or needs a library that is not installed (`needed`).
        """


def together(
    sources: Sequence[Source], title: str, paths: Sequence[Path], root: Path, asked: Asked
) -> Source:
    """Return sources of one format as one, with columns of what their places say; a single one as it is.

    A file with a column of steps and no column that tells runs apart is a run, named by its place.
    """
    if len(sources) == 1:
        return sources[0]
    places = columns_of_places(paths, root)
    places["source"] = [os.path.relpath(path, root) for path in paths]
    roles = {role: name for source in sources for role, name in source.roles.items()}
    frame = pd.concat([source.frame for source in sources], ignore_index=True)
    source_of_row = np.repeat(np.arange(len(sources)), [len(source.frame) for source in sources])
    if "run" in roles:
        frame[roles["run"]] = places.run.to_numpy()[source_of_row] + " " + frame[roles["run"]].astype(str)
        places = places.drop(columns="run")
    elif all(_is_a_run(source, asked) for source in sources):
        roles["run"] = "run"
    else:
        places = places.drop(columns="run")
    added = [str(name) for name in places if name not in frame]
    for name in added:
        codes, values = pd.factorize(places[name])
        frame[name] = pd.Categorical.from_codes(codes[source_of_row], pd.Index(values, dtype=object))
    parts = [name for name in added if re.fullmatch(r"folder\d+|file", name)]
    if len(parts) == 1 and not ARM_NAMES & {str(name).lower() for name in frame}:
        roles.setdefault("arm", parts[0])
    settings = dict.fromkeys(name for source in sources for name in source.settings)
    notes = list(dict.fromkeys(note for source in sources for note in source.notes))
    return replace(
        sources[0],
        frame=frame,
        what=f"{len(sources):,} {title}",
        roles=roles,
        settings=list(settings),
        notes=notes if len(notes) < 5 else [*notes[:3], f"{len(notes) - 3} more notes of this kind."],
    )


def _is_a_run(source: Source, asked: Asked) -> bool:
    """Return whether a file's rows are the evaluations of one run."""
    names = [str(name) for name in source.frame]
    steps = {asked.step, source.roles.get("step", "")} & set(names) or [
        n for n in names if STEP_NAMES.fullmatch(n)
    ]
    telling = {asked.run, asked.seed, asked.arm, "run", "run_id", "seed", "name", *ARM_NAMES}
    return bool(steps) and not any(source.frame[name].nunique() > 1 for name in telling & set(names))


def needed(package: str, extra: str, path: Path) -> UserError:
    """Return the error that says which extra of ours brings the package that a format needs."""
    return UserError(f"reading {path} needs {package}: pip install 'ebc-lab[{extra}]'.")


def files_below(path: Path, pattern: str) -> Iterator[Path]:
    """Yield the files whose name is as the regular expression says, in order of their places: `path` itself,
    or those in and below it. Hidden folders are left out, what lies deeper than `DEEPEST` levels, and what is
    no file, such as a pipe."""
    if path.is_file():
        yield from [path] if re.fullmatch(pattern, path.name) else []
        return
    for folder, folders, names in os.walk(path):
        deep = len(Path(folder).relative_to(path).parts) >= DEEPEST
        folders[:] = [] if deep else sorted(name for name in folders if not name.startswith("."))
        files = (Path(folder, name) for name in sorted(names) if re.fullmatch(pattern, name))
        yield from (file for file in files if file.is_file())


def number(value: object) -> float | None:
    """Return a logged value as a number, `inf` where it is not finite, and None where it is no number."""
    if isinstance(value, str) and value not in ("NaN", "Infinity", "-Infinity"):
        return None
    try:
        logged = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return logged if math.isfinite(logged) else math.inf


def flat(nested: Mapping[str, Any], mark: str = ".") -> dict[str, Any]:
    """Return nested mappings as one, with the mark between names: `model.width`. Empty ones are left out."""
    leaves: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            leaves |= {f"{name}{mark}{inner}": leaf for inner, leaf in flat(value, mark).items()}
        else:
            leaves[str(name)] = value
    return leaves


def cell(value: object) -> str | float | None:
    """Return a value as a table can hold it: what is neither text nor a number, such as a list, as JSON."""
    return value if isinstance(value, str | int | float | None) else json.dumps(value, default=str)


def of_run(number: int, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a run's rows with its number as `run`; what was logged under that name is `logged/run`."""
    return [{"run": number} | {"logged/run" if n == "run" else n: row[n] for n in row} for row in rows]


def by_step(points: pd.DataFrame) -> pd.DataFrame:
    """Return a row a step from a row a value, in the order in which the values were logged.

    Args:
        points: columns `run` (number of the run), `step`, `name`, `value`, and `time`, which orders them. A
            step that was logged again, as by a run that was resumed, stays a row of its own.

    Returns: columns `run`, `step`, and one for each name: NaN where it was not logged, `inf` where what was
    logged is not finite.
    """
    points = points.sort_values(["run", "time"], kind="stable")
    points["value"] = np.where(np.isfinite(points.value), points.value, np.inf)
    points["again"] = points.groupby(["run", "name", "step"], observed=True).cumcount()
    row = ["run", "step", "again"]
    as_logged = pd.MultiIndex.from_frame(points[row].drop_duplicates())
    wide = points.pivot(index=row, columns="name", values="value").reindex(as_logged).droplevel("again")
    wide.columns = pd.Index([f"logged/{name}" if name in ("run", "step") else str(name) for name in wide])
    return wide.reset_index()


def source_of_runs(
    about: Sequence[Mapping[str, Any]],
    settings: Sequence[Mapping[str, Any]],
    curves: pd.DataFrame,
    what: str,
    roles: Mapping[str, str],
    notes: Iterable[str] = (),
    better: str = "",
) -> Source:
    """Return what a tracker kept of runs. A run without a curve has one row, and so is not lost.

    Args:
        about: of each run its `run` (the name that is its own) and what else is known about it.
        settings: of each run. One that is called like a logged column is called `config/NAME`.
        curves: the logged rows, run after run; column `run` is the position of the run in `about`.
    """
    cells = [{name: cell(value) for name, value in of_run.items()} for of_run in settings]
    runs, configs = pd.DataFrame(list(about)), pd.DataFrame(cells, index=range(len(about)))
    logged = curves.set_index("run").rename(columns={name: f"logged/{name}" for name in runs})
    configs = configs.rename(columns={n: f"config/{n}" for n in configs if n in runs or n in logged})
    frame = pd.concat([runs, configs], axis=1).join(logged).reset_index(drop=True)
    roles = {role: column for role, column in roles.items() if column in frame}
    return Source(frame, what, roles, tuple(map(str, configs)), better, tuple(notes))


def about_places(
    folders: Sequence[Path],
    path: Path,
    about: Sequence[Mapping[str, Any]],
    settings: Sequence[Mapping[str, Any]],
) -> list[dict[Any, Any]]:
    """Return what `source_of_runs` wants to know about runs that are folders in `path`, or `path` itself:
    what their places say, apart from what every run's settings say better."""
    root = path if path.is_dir() and path not in folders else path.parent
    places = columns_of_places(folders, folders[0].parent if len(folders) == 1 else root)
    known = [name for name in places if name != "run" and all(name in of_run for of_run in settings)]
    rows = places.drop(columns=known).to_dict("records")
    return [{**place, **more} for place, more in zip(rows, about, strict=True)]


def told_apart(names: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Return a name for each run that is its own: `NAME`, or `NAME (KEY)` where several have that name."""
    times = Counter(names)
    return [n if n and times[n] == 1 else f"{n} ({key})" for n, key in zip(names, keys, strict=True)]
