"""Optuna's storages: SQLite files, and journals of JournalFileBackend.

Optuna opens a copy: it writes into a database that it opens, and upgrades an older one on request only.
"""

from __future__ import annotations

import math
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ebc_lab.config.errors import UserError, count, require

from ..asked import Asked
from .mlflow_store import read_only, tables_of
from .reader import Source, cell, files_below, flat, needed, number, of_run, source_of_runs

DATABASE, JOURNAL = r".*\.(db|sqlite3?)", r".*\.(log|journal|jsonl?)"
BETTER = {"MINIMIZE": "lower", "MAXIMIZE": "higher"}


TITLE = "Optuna's storages"


def claims(path: Path) -> bool:
    return any(_storages(path))


def read(path: Path, asked: Asked) -> Source:
    """Return a row an intermediate value of each trial, and of each at least one. A trial that was pruned
    or failed has no value, which counts as the worst; one that has not ended is left out."""
    every = [trial for file in _storages(path) for trial in _trials(file, path)]
    ended = [trial for trial in every if trial.frozen.state.is_finished()]
    require(bool(ended), f"{path} holds no trial of Optuna that has ended.")
    notes = [f"{n} trials that have not ended were left out."] if (n := len(every) - len(ended)) else []
    columns, better = _objectives(ended, path)
    curved = len(columns) == 1 and all(_ends_its_curve(trial.frozen) for trial in ended)
    if not curved and any(trial.frozen.intermediate_values for trial in ended):
        notes.append(
            "Values of trials are not their last intermediate ones, which are a column of their own."
        )
    rows = [row for n, one in enumerate(ended) for row in of_run(n, _rows(one.frozen, columns, curved))]
    for state, words in (("PRUNED", "pruned"), ("FAIL", "failed")):
        if many := sum(trial.frozen.state.name == state for trial in ended):
            notes.append(f"{many} of {len(ended)} trials {words}: they count as worse than every other.")
    planned = _planned(ended)
    about = [
        {"run": f"{trial.study}/{trial.frozen.number}", "study": trial.study, "started": _naive(trial.frozen)}
        | ({"planned": planned[n]} if any(planned) else {})
        | {f"user_attrs.{name}": cell(value) for name, value in flat(trial.frozen.user_attrs).items()}
        for n, trial in enumerate(ended)
    ]
    seed = "seed" if any("seed" in trial.frozen.params for trial in ended) else "user_attrs.seed"
    roles = {"run": "run", "arm": "study", "seed": seed} | {n: n for n in ("step", "started", "planned")}
    roles |= {"loss": columns[0]} if len(columns) == 1 else {}
    what = f"{count(len(ended), 'trial')} of Optuna"
    params = [dict(trial.frozen.params) for trial in ended]
    return source_of_runs(about, params, pd.DataFrame(rows), what, roles, notes, better)


@dataclass(frozen=True)
class _Trial:
    """A trial, and what its study says of it: directions as Optuna writes them, names of the objectives."""

    study: str
    directions: tuple[str, ...]
    objectives: tuple[str, ...]
    frozen: Any  # Optuna's FrozenTrial


def _objectives(trials: Sequence[_Trial], path: Path) -> tuple[list[str], str]:
    """Return the columns of the objectives, and which direction is better, where there is one objective."""
    directions = {trial.study: trial.directions for trial in trials}
    if len(set(directions.values())) > 1:
        named = "; ".join(f"{study}: {', '.join(which).lower()}" for study, which in directions.items())
        raise UserError(
            f"the studies in {path} have different objectives ({named}): they cannot be compared."
        )
    [which] = set(directions.values())
    names = trials[0].objectives or tuple(f"values_{n}" for n in range(len(which)))
    return (["value"], BETTER[which[0]]) if len(which) == 1 else (list(names), "")


def _ends_its_curve(trial: Any) -> bool:
    """Return whether a trial's value is the last of its intermediate ones, or has none."""
    curve = trial.intermediate_values
    return trial.state.name != "COMPLETE" or (bool(curve) and curve[max(curve)] == trial.value)


def _rows(trial: Any, columns: Sequence[str], curved: bool) -> list[dict[str, Any]]:
    """Return a row an intermediate value, in the column of the objective if these are its curve (`curved`);
    the last row holds what the trial ended with."""
    name = columns[0] if curved else "intermediate_value"
    rows: list[dict[str, Any]] = [
        {"step": step, name: number(value)} for step, value in sorted(trial.intermediate_values.items())
    ] or [{}]
    completed = trial.state.name == "COMPLETE"
    values = trial.values if completed else [math.inf] * len(columns)
    rows[-1] |= {column: number(value) for column, value in zip(columns, values, strict=True)}
    return rows


def _planned(trials: Sequence[_Trial]) -> list[float | None]:
    """Return how long trials were to be: one that was pruned or failed as its study's longest, the others as
    they are; None without a curve."""
    lengths = [max(trial.frozen.intermediate_values, default=None) for trial in trials]
    longest: dict[str, float] = {}
    for trial, length in zip(trials, lengths, strict=True):
        longest[trial.study] = max(longest.get(trial.study, 0), length or 0)
    return [
        length if trial.frozen.state.name == "COMPLETE" else longest[trial.study] or None
        for trial, length in zip(trials, lengths, strict=True)
    ]


def _naive(trial: Any) -> Any:
    return trial.datetime_start and trial.datetime_start.replace(tzinfo=None)


def _storages(path: Path) -> Iterator[Path]:
    for file in files_below(path, DATABASE):
        if {"studies", "trials", "trial_values"} <= tables_of(file):
            yield file
    for file in files_below(path, JOURNAL):
        with file.open("rb") as start:
            first = start.read(400)
        if first.startswith(b"{") and b'"op_code"' in first and b'"worker_id"' in first:
            yield file


def _trials(file: Path, path: Path) -> list[_Trial]:
    """Return the trials of every study of a storage, in the order of their numbers."""
    try:
        from optuna import get_all_study_names, load_study, logging
    except ImportError:
        raise needed("Optuna", "optuna", path) from None
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder:
            storage = _opened(file, Path(folder) / "copy")
            trials = []
            for name in get_all_study_names(storage):
                study = load_study(study_name=name, storage=storage)
                about = (name, tuple(d.name for d in study.directions), tuple(study.metric_names or ()))
                trials += [_Trial(*about, trial) for trial in study.get_trials(deepcopy=False)]
            return trials
    except Exception as error:  # SQLAlchemy's, sqlite3's and Optuna's own have no base in common
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file} is a damaged storage of Optuna, or of an unknown version: {reason}."
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _opened(file: Path, copy: Path) -> Any:
    """Return Optuna's storage of a copy of this file."""
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if not tables_of(file):
        shutil.copyfile(file, copy)
        return JournalStorage(JournalFileBackend(str(copy)))
    with closing(read_only(file)) as database, closing(sqlite3.connect(copy)) as other:
        database.backup(other)
    storage = RDBStorage(f"sqlite:///{copy}", skip_compatibility_check=True)
    if storage.get_current_version() != storage.get_head_version():
        storage.upgrade()
    return storage
