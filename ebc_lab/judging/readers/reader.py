"""What a reader of one format is, what it returns, and what readers of trackers have in common."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ebc_lab.config.errors import UserError

from ..asked import Asked
from .names import columns_of_places

if TYPE_CHECKING:
    import pandas as pd

DEEPEST = 8  # levels of folders that are searched


@dataclass(frozen=True)
class Source:
    """What lay in files of one format: a row an evaluation, or a row a run where no curve was kept.

    Attributes:
        frame: the rows, in the order in which they were logged. Columns are called as the format calls them.
            A value that was logged and is not finite is `inf`; one that was not logged is NaN.
        what: what was read, in words: `3 offline runs of W&B`.
        roles: role -> column, of the roles that the format itself knows: `run`, `arm`, `seed`, `step`,
            `loss`, `planned`, `started` (when the run began).
        settings: columns that the format keeps as a run's configuration.
        better: `lower` or `higher`, where the format says it.
        notes: what was left out and why, a sentence each.
    """

    frame: pd.DataFrame
    what: str
    roles: Mapping[str, str] = field(default_factory=dict)
    settings: Sequence[str] = ()
    better: str = ""
    notes: Sequence[str] = ()


class Reader(Protocol):
    """One format: a module of this folder with these three. Its name stands in `MODULES`."""

    TITLE: str  # in words, of several files: `CSV files`

    def claims(self, path: Path) -> bool:
        """Return whether a file or a folder is of this format. Looks at names and at first bytes only."""

    def read(self, path: Path, asked: Asked) -> Source:
        """Return what lies there.

        Raises UserError: the file is damaged, or needs a library that is not installed (`needed`).
        """


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


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested settings as one mapping, `model.width`; lists become text."""
    leaves: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{name}.")
        else:
            leaves[name] = value if isinstance(value, str | int | float) else _text(value)
    return leaves


def _text(value: object) -> str | None:
    return None if value is None else json.dumps(value, default=str)


def by_step(points: pd.DataFrame) -> pd.DataFrame:
    """Return a row a step from a row a value, in the order in which the values were logged.

    Args:
        points: columns `run` (number of the run), `step`, `name`, `value`, and `time`, which orders them. A
            step that was logged again, as by a run that was resumed, stays a row of its own.

    Returns: columns `run`, `step`, and one for each name: NaN where it was not logged, `inf` where what was
    logged is not finite.
    """
    import numpy as np

    points = points.sort_values(["run", "time"], kind="stable", ignore_index=True)
    points["value"] = np.where(np.isfinite(points.value), points.value, np.inf)
    points["again"] = points.groupby(["run", "name", "step"], observed=True).cumcount()
    key = ["run", "step", "again"]
    points["place"] = points.groupby(key).ngroup()
    first = points.drop_duplicates("place")
    wide = points.pivot(index="place", columns="name", values="value").loc[first.place]
    wide.columns = wide.columns.astype(str)
    wide = wide.rename_axis(columns=None).reset_index(drop=True)
    rename = {name: f"logged/{name}" for name in wide.columns if name in ("run", "step")}
    wide = wide.rename(columns=rename)
    wide.insert(0, "run", first.run.to_numpy())
    wide.insert(1, "step", first.step.to_numpy())
    return wide


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
    import numpy as np
    import pandas as pd

    known, configs = pd.DataFrame(list(about)), pd.DataFrame(list(settings), index=range(len(about)))
    codes = curves["run"].to_numpy(dtype=np.int64)
    logged = curves.drop(columns="run")
    logged = logged.rename(columns={name: f"logged/{name}" for name in logged if name in known})
    configs = configs.rename(columns={n: f"config/{n}" for n in configs if n in known or n in logged})
    without = np.setdiff1d(np.arange(len(about)), codes)
    codes = np.concatenate([codes, without])
    order = np.argsort(codes, kind="stable")
    if len(without):
        logged = logged.reindex(range(len(codes)))
    if not (np.diff(order) == 1).all():
        logged, codes = logged.take(order), codes[order]
    parts = [known.take(codes), configs.take(codes), logged]
    frame = pd.concat([part.reset_index(drop=True) for part in parts], axis=1)
    there = {role: column for role, column in roles.items() if column in frame}
    return Source(frame, what, there, tuple(configs.columns), better, tuple(notes))


def about_places(
    folders: Sequence[Path],
    path: Path,
    about: Sequence[Mapping[str, Any]],
    settings: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Return what `source_of_runs` wants to know about runs that are folders in `path`, or `path` itself:
    what their places say, apart from what every run's settings say better."""
    root = path if path.is_dir() and path not in folders else path.parent
    root = folders[0].parent if len(folders) == 1 else root
    places = columns_of_places(folders, root)
    better = [name for name in places if name != "run" and all(name in of_run for of_run in settings)]
    rows = places.drop(columns=better).to_dict("records")
    return [
        {**{str(name): told for name, told in row.items()}, **more}
        for row, more in zip(rows, about, strict=True)
    ]


def told_apart(names: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Return a name for each run that is its own: `NAME`, or `NAME (KEY)` where several have that name."""
    shared = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    return [f"{n} ({k})" if n in shared or not n else n for n, k in zip(names, keys, strict=True)]
