"""Readers of runs: which of them reads a path, and all that lies there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ebc_lab.config.errors import UserError, require, shown

from ..asked import Asked
from . import (
    delimited,
    hydra,
    json_lines,
    lab_study,
    lightning_logs,
    logs,
    mlflow_store,
    optuna_storage,
    parquet,
    tensorboard_events,
    trainer_state,
    wandb_csv,
    wandb_offline,
)
from .reader import NothingKnown, Reader, Source, together

# the most specific first: in a folder with files of several formats the first that claims one is read; `logs`
# only with --pattern, which leaves no other but Hydra's jobs
READERS: tuple[Reader, ...] = (
    lab_study,
    hydra,
    wandb_offline,
    mlflow_store,
    optuna_storage,
    lightning_logs,
    trainer_state,
    tensorboard_events,
    wandb_csv,
    parquet,
    json_lines,
    delimited,
    logs,
)
# these read one file, or one folder of a job, at a time; the others search a folder themselves
ONE_BY_ONE: set[Reader] = {lab_study, hydra, wandb_csv, parquet, json_lines, delimited, logs}
MANY = 100_000  # files and folders below one that is searched
LEFT_OUT = {"__pycache__", "node_modules", "site-packages"}


def read(paths: Sequence[str | Path], asked: Asked) -> list[Source]:
    """Return what lies at files and folders, a source for each format.

    A folder is searched through; where it has files of several formats the most specific is read, and a note
    names the others. With `--pattern`, all files of text are logs.

    Raises UserError: nothing is there, or nothing of a format that is known; what readers raise.
    """
    places = [Path(os.path.normpath(path)) for path in paths]
    require(len(places) > 0, "give the files or folders in which the runs are")
    found: dict[Reader, list[Path]] = {}
    notes: list[str] = []
    for place in places:
        require(place.exists(), f"there is no file or folder {place}")
        require(place.is_file() or place.is_dir(), f"{place} is no file, but a pipe or device: save it first")
        here = _found(place, asked, READERS)
        chosen = min(here, key=READERS.index)
        found.setdefault(chosen, []).extend(here[chosen])
        notes += _unread(place, here, chosen)
    sources = []
    for reader in sorted(found, key=READERS.index):
        hits = list(dict.fromkeys(found[reader]))
        folder = len(places) == 1 and places[0].is_dir()
        root = places[0] if folder else Path(os.path.commonpath([hit.parent for hit in hits]))
        sources.append(_read_all(reader, hits, root, asked))
    sources[0] = replace(sources[0], notes=[*sources[0].notes, *notes])
    return sources


def read_inside(folder: Path, asked: Asked) -> Source:
    """Return what lies in a folder that Hydra made, by the most specific reader of any other format."""
    here = _found(folder, asked, [reader for reader in READERS if reader is not hydra])
    chosen = min(here, key=READERS.index)
    return _read_all(chosen, here[chosen], folder, asked)


def _found(place: Path, asked: Asked, readers: Sequence[Reader]) -> dict[Reader, list[Path]]:
    """Return reader -> paths that it claims, in the order of their names. Not empty.

    Raises NothingKnown: no reader claims anything there; UserError: there is too much to look at.
    """
    readers = [r for r in readers if (r in (hydra, logs) if asked.pattern else r is not logs)]
    found = {r: [place] for r in readers if r not in ONE_BY_ONE and r.claims(place)}
    for path in _candidates(place, found):
        reader = next((r for r in readers if r in ONE_BY_ONE and r.claims(path)), None)
        if reader:
            found.setdefault(reader, []).append(path)
    if not found:
        formats = ", ".join(reader.TITLE for reader in READERS if reader is not logs)
        hint = next((logs.advice(path) for path in _candidates(place, {}) if logs.claims(path)), "")
        raise NothingKnown(
            f"{place} holds none of the formats that ebc-lab reads ({formats}); logs of text need --pattern, "
            f"a regular expression{hint or f', such as {logs.ADVICE}'}."
        )
    return found


def _candidates(place: Path, found: dict[Reader, list[Path]]) -> Iterator[Path]:
    """Yield a file; or a folder and what is in it, but not what is in a folder of a study or a job."""
    if place.is_file():
        yield place
    seen = 0
    for folder, folders, files in os.walk(place):
        yield Path(folder)
        if any(Path(folder) in found.get(reader, ())[-1:] for reader in (lab_study, hydra)):
            folders.clear()
            continue
        seen += len(folders) + len(files)
        require(seen <= MANY, f"{place} has more than {MANY:,} files: give the folder in which the runs are")
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in LEFT_OUT)
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():  # a pipe would keep the reader waiting
                yield path


def _unread(place: Path, found: dict[Reader, list[Path]], chosen: Reader) -> list[str]:
    """Return notes about files of formats that were not read. All in a study's folder is the study's."""
    if chosen is lab_study:
        return []
    notes = []
    for reader in sorted(set(found) - {chosen}, key=READERS.index):
        paths = [p for p in found[reader] if not (chosen is lightning_logs and p.name == "metrics.csv")]
        if paths and not (chosen is hydra and reader not in ONE_BY_ONE):
            example = "" if paths[0] == place else f", such as {shown(os.path.relpath(paths[0], place))}"
            notes.append(
                f"{place} holds {chosen.TITLE}, which were read, and {reader.TITLE}"
                f"{example}, which were not: give their files to have them read."
            )
    return notes


def _read_all(reader: Reader, paths: Sequence[Path], root: Path, asked: Asked) -> Source:
    """Return what several files or folders of one format hold, as one source."""
    with _blaming(root, reader):
        if reader is hydra:
            return hydra.read_jobs(paths, root, asked)
        if reader is logs:
            return logs.read_logs(paths, root, asked)
        read_here = []
        for path in paths:
            with _blaming(path, reader):
                read_here.append(reader.read(path, asked))
        return together(read_here, reader.TITLE, paths, root, asked)


@contextmanager
def _blaming(path: Path, reader: Reader) -> Iterator[None]:
    """Turn what a format's library raises about a damaged file into one sentence that names `path`."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{path} is damaged, or of an unknown version of {reader.TITLE} ({why}): leave it out."
        ) from error
