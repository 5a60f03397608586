"""MLflow's stores: an SQLite file, `mlflow.db`, and a folder of text files, `mlruns`.

MLflow itself is not asked to open them: its client makes a folder in a store of files, which its newest
versions refuse altogether, and it refuses an older database until that is upgraded for good. What is read
here are the tables and files of runs, metrics, params and tags, opened so that they cannot change.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd

from ebc_lab.config.errors import UserError, count, listed, require
from ebc_lab.config.own.files import check_yaml

from ..asked import Asked
from .reader import Source, by_step, files_below, source_of_runs, told_apart

RUNS = """select r.run_uuid as key, r.name as name, r.status as state, r.start_time as start,
    r.lifecycle_stage as stage, e.name as experiment, e.lifecycle_stage as of_experiment
    from runs r left join experiments e
    on e.experiment_id = r.experiment_id order by r.start_time, r.run_uuid"""
POINTS = """select run_uuid as run, key as name, value, is_nan, step, timestamp as time
    from metrics order by timestamp, rowid"""
LARGEST = 1.79e308  # a database holds infinity as the largest float, 1.797e308
OF_RUN = re.compile(rb"^run_(id|uuid):", re.MULTILINE)
NAME, PARENT = "mlflow.runName", "mlflow.parentRunId"


TITLE = "MLflow's stores (mlflow.db, mlruns)"


def claims(path: Path) -> bool:
    return any(_databases(path)) or any(_folders(path))


def read(path: Path, asked: Asked) -> Source:
    """Return a row a step of each run. Deleted runs, and those that only hold others, are left out."""
    stores = [*map(_from_database, _databases(path)), _from_files(list(_folders(path)))]
    runs = [run for runs_of_store, _ in stores for run in runs_of_store]
    points = pd.concat([points for _, points in stores if len(points)] or [stores[0][1]], ignore_index=True)
    kept, notes = _kept(runs, set(points.run))
    require(bool(kept), f"{path} is a store of MLflow without a run. {' '.join(notes)}")
    number = {run["key"]: n for n, run in enumerate(kept)}
    points = points[points.run.isin(number)]
    points["run"] = points.run.map(number)
    names = told_apart([run["name"] for run in kept], [run["key"][:8] for run in kept])
    about = [
        {
            "run": name,
            "name": run["name"] or run["key"][:8],
            "experiment": run["experiment"],
            "started": pd.to_datetime(run["start"], unit="ms"),
        }
        for name, run in zip(names, kept, strict=True)
    ]
    ended = {"FINISHED", "3"}
    unfinished = [name for name, run in zip(names, kept, strict=True) if run["state"] not in ended]
    if unfinished:
        notes.append(
            f"{len(unfinished)} of {len(kept)} runs did not finish, by MLflow: {listed(unfinished)}."
        )
    roles = {"run": "run", "started": "started", "step": "step"}
    what = f"{count(len(kept), 'run')} of MLflow"
    settings = _as_numbers([run["params"] for run in kept])
    return source_of_runs(about, settings, by_step(points), what, roles, notes)


def _kept(runs: Sequence[dict[str, Any]], measured: set[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the runs that count, and what was left out."""
    there = [run for run in runs if run["stage"] != "deleted"]
    parents = {run["tags"].get(PARENT) for run in there}
    kept = [run for run in there if run["key"] in measured or run["key"] not in parents]
    notes = []
    if deleted := len(runs) - len(there):
        notes.append(f"{count(deleted, 'deleted run')} left out.")
    if holders := len(there) - len(kept):
        notes.append(f"{count(holders, 'parent run')} without a metric left out.")
    return kept, notes


def _as_numbers(params: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Return params, which MLflow keeps as text, as numbers where all values of a name are some."""
    table = pd.DataFrame(list(params), index=range(len(params)))
    for name in table:
        numbers = pd.to_numeric(table[name], errors="coerce")
        if numbers.notna().sum() == table[name].notna().sum():
            table[name] = numbers
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


# -- a database ----------------------------------------------------------------------------------------------


def _databases(path: Path) -> Iterator[Path]:
    return (
        file for file in files_below(path, r".*\.(db|sqlite3?)") if {"metrics", "params"} <= tables_of(file)
    )


def tables_of(file: Path) -> set[str]:
    """Return the names of the tables of an SQLite file, of another file none. The file is not changed."""
    with file.open("rb") as start:
        if start.read(15) != b"SQLite format 3":
            return set()
    try:
        with closing(read_only(file)) as database:
            return {
                name for (name,) in database.execute("select name from sqlite_master where type = 'table'")
            }
    except sqlite3.Error:
        return set()


def read_only(file: Path) -> sqlite3.Connection:
    """Return a connection to a database that cannot change it."""
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)


def _from_database(file: Path) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Return the runs of a database, and their metrics as `by_step` takes them."""
    try:
        with closing(read_only(file)) as database:
            runs = pd.read_sql_query(RUNS, database).to_dict("records")
            points = pd.read_sql_query(POINTS, database)
            params, tags = (
                database.execute(f"select run_uuid, key, value from {table}").fetchall()
                for table in ("params", "tags")
            )
    except (sqlite3.Error, pd.errors.DatabaseError) as error:
        raise UserError(f"{file} is a damaged store of MLflow, or of an unknown version: {error}.") from None
    by_key: dict[str, dict[Any, Any]] = {run["key"]: {**run, "params": {}, "tags": {}} for run in runs}
    for which, rows in (("params", params), ("tags", tags)):
        for key, name, value in rows:
            by_key[key][which][name] = value
    for run in by_key.values():
        run["name"] = run["tags"].get(NAME) or run["name"] or ""
        run["stage"] = "deleted" if "deleted" in (run["stage"], run["of_experiment"]) else run["stage"]
    points["value"] = points.value.mask(points.is_nan.astype(bool) | (points.value.abs() > LARGEST))
    return list(by_key.values()), points.drop(columns="is_nan")


# -- a folder ------------------------------------------------------------------------------------------------


def _folders(path: Path) -> Iterator[Path]:
    """Yield the folders of runs: those whose `meta.yaml` is a run's, not an experiment's or a model's. The
    folders beside it say nothing: a store that went through git lacks those that are empty."""
    for file in files_below(path, r"meta\.yaml"):
        if OF_RUN.search(file.read_bytes()):
            yield file.parent


def _from_files(folders: Sequence[Path]) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Return the runs of these folders, and their metrics as `by_step` takes them."""
    runs, points = [], [pd.DataFrame(columns=["time", "value", "step", "run", "name"])]
    experiments = {above: _meta(above) for above in {folder.parent for folder in folders}}
    for folder in folders:
        meta = _meta(folder)
        params, tags = (_texts(folder / which) for which in ("params", "tags"))
        runs.append(
            {
                "key": folder.name,
                "name": tags.get(NAME) or str(meta.get("run_name") or ""),
                "state": str(meta.get("status", "")),
                "start": meta.get("start_time"),
                "stage": meta.get("lifecycle_stage", "active"),
                "experiment": experiments[folder.parent].get("name", folder.parent.name),
                "params": params,
                "tags": tags,
            }
        )
        for file in files_below(folder / "metrics", ".*"):
            name = file.relative_to(folder / "metrics").as_posix()
            points.append(_metric(file).assign(run=folder.name, name=name))
    runs.sort(key=lambda run: run["start"] or 0)
    return runs, pd.concat([p for p in points if len(p)] or points, ignore_index=True)


def _meta(folder: Path) -> dict[str, Any]:
    """Return what MLflow noted of a run or an experiment; nothing where it noted nothing."""
    import yaml

    file = folder / "meta.yaml"
    if not file.is_file():
        return {}
    try:
        text = file.read_text("utf-8")
        check_yaml(text)
        return dict(yaml.safe_load(text) or {})
    except (yaml.YAMLError, ValueError, TypeError):
        raise UserError(
            f"{file} is damaged, or is being written: call again, or leave its folder out."
        ) from None


def _metric(file: Path) -> pd.DataFrame:
    """Return a metric's file: lines of time in ms, value and step; the last may be cut off."""
    try:
        table = pd.read_csv(file, sep=" ", header=None, usecols=range(3), names=["time", "value", "step"])
        return table.dropna(subset=["time", "step"]).astype(
            {"time": "int64", "step": "int64", "value": float}
        )
    except (ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{file} is no metric of MLflow, lines of time, value and step: {error}.") from None


def _texts(folder: Path) -> dict[str, str]:
    """Return name -> content of the files in a folder."""
    if not folder.is_dir():
        return {}
    files = files_below(folder, ".*")
    return {file.relative_to(folder).as_posix(): file.read_text("utf-8", "replace") for file in files}
