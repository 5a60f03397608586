"""Readers of runs: which of them reads a path, and all that lies there."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import cast

from ebc_lab.config.errors import UserError, require, shown

from ..asked import Asked
from .logs import ADVICE, advice
from .names import columns_of_places
from .reader import Reader, Source

# the most specific first: in a folder with files of several formats the first that claims one is read
MODULES = (
    "lab_study",
    "hydra",
    "wandb_offline",
    "mlflow_store",
    "optuna_storage",
    "lightning_logs",
    "trainer_state",
    "tensorboard_events",
    "wandb_csv",
    "parquet",
    "json_lines",
    "delimited",
)
# these read one file, or one folder of a job, at a time; the others a folder with all that is in it
ONE_BY_ONE = {"lab_study", "hydra", "wandb_csv", "parquet", "json_lines", "delimited", "logs"}
MANY = 100_000  # files and folders below one that is searched
ARM_NAMES = {"arm", "optimizer", "optim", "opt", "method", "algorithm", "algo", "variant", "group"}
LEFT_OUT = {"__pycache__", "node_modules", "site-packages"}


@cache
def reader_of(module: str) -> Reader:
    """Return a reader by its module's name."""
    return cast(Reader, importlib.import_module(f"{__name__}.{module}"))


def read(paths: Sequence[str | Path], asked: Asked) -> list[Source]:
    """Return what lies at files and folders, a source for each format.

    A folder is searched through; where it has files of several formats the most specific is read, and a note
    names the others. With `--pattern`, all files of text are logs.

    Raises UserError: nothing is there, or nothing of a format that is known; what readers raise.
    """
    places = [Path(os.path.normpath(path)) for path in paths]
    require(len(places) > 0, "give the files or folders in which the runs are")
    found: dict[str, list[Path]] = {}
    notes: list[str] = []
    for place in places:
        require(place.exists(), f"there is no file or folder {place}")
        require(place.is_file() or place.is_dir(), f"{place} is no file, but a pipe or device: save it first")
        here = _found(place, asked, MODULES)
        chosen = min(here, key=_rank)
        found.setdefault(chosen, []).extend(
            path for path in here[chosen] if path not in found.get(chosen, ())
        )
        notes += _unread(place, here, chosen)
    sources = []
    for module in sorted(found, key=_rank):
        hits = found[module]
        folder = len(places) == 1 and places[0].is_dir()
        root = places[0] if folder else Path(os.path.commonpath([hit.parent for hit in hits]))
        sources.append(_read_all(reader_of(module), hits, root, asked))
    sources[0] = replace(sources[0], notes=[*sources[0].notes, *notes])
    return sources


def read_inside(folder: Path, asked: Asked) -> Source:
    """Return what lies in a folder that Hydra made, by the most specific reader of any other format."""
    here = _found(folder, asked, [module for module in MODULES if module != "hydra"])
    chosen = min(here, key=_rank)
    return _read_all(reader_of(chosen), here[chosen], folder, asked)


def _rank(module: str) -> int:
    return MODULES.index(module) if module in MODULES else len(MODULES)


def _found(place: Path, asked: Asked, modules: Sequence[str]) -> dict[str, list[Path]]:
    """Return module -> paths that its reader claims, in the order of their names. Not empty.

    Raises UserError: no reader claims anything there, or there is too much to look at.
    """
    if asked.pattern:
        modules = [module for module in (*modules, "logs") if module in ("hydra", "logs")]
    found = {m: [place] for m in modules if m not in ONE_BY_ONE and reader_of(m).claims(place)}
    for path in _candidates(place, found):
        module = next((m for m in modules if m in ONE_BY_ONE and reader_of(m).claims(path)), "")
        if module:
            found.setdefault(module, []).append(path)
    formats = ", ".join(reader_of(module).TITLE for module in MODULES)
    if not found:
        hint = next((advice(path) for path in _candidates(place, {}) if reader_of("logs").claims(path)), "")
        raise UserError(
            f"{place} holds none of the formats that ebc-lab reads ({formats}); logs of text need --pattern, "
            f"a regular expression{hint or f', such as {ADVICE}'}."
        )
    return found


def _candidates(place: Path, found: dict[str, list[Path]]) -> Iterator[Path]:
    """Yield a file; or a folder and what is in it, but not what is in a folder of a study or a job."""
    if place.is_file():
        yield place
    seen = 0
    for folder, folders, files in os.walk(place):
        yield Path(folder)
        if any(Path(folder) in found.get(module, ())[-1:] for module in ("lab_study", "hydra")):
            folders.clear()
            continue
        seen += len(folders) + len(files)
        require(seen <= MANY, f"{place} has more than {MANY:,} files: give the folder in which the runs are")
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in LEFT_OUT)
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():  # a pipe would keep the reader waiting
                yield path


def _unread(place: Path, found: dict[str, list[Path]], chosen: str) -> list[str]:
    """Return notes about files of formats that were not read. All in a study's folder is the study's."""
    if chosen == "lab_study":
        return []
    notes = []
    for module in sorted(set(found) - {chosen}, key=_rank):
        paths = [p for p in found[module] if not (chosen == "lightning_logs" and p.name == "metrics.csv")]
        if paths and not (chosen == "hydra" and module not in ONE_BY_ONE):
            example = "" if paths[0] == place else f", such as {shown(os.path.relpath(paths[0], place))}"
            notes.append(
                f"{place} holds {reader_of(chosen).TITLE}, which were read, and {reader_of(module).TITLE}"
                f"{example}, which were not: give their files to have them read."
            )
    return notes


def _read_all(reader: Reader, paths: Sequence[Path], root: Path, asked: Asked) -> Source:
    """Return what several files or folders of one format hold, as one source."""
    read_all = getattr(reader, "read_all", None)
    if read_all is not None:
        source: Source = read_all(paths, root, asked)
        return source
    if len(paths) == 1:
        return reader.read(paths[0], asked)
    return together(reader.TITLE, [reader.read(path, asked) for path in paths], paths, root, asked)


def together(
    title: str, sources: Sequence[Source], paths: Sequence[Path], root: Path, asked: Asked
) -> Source:
    """Return sources of one format as one, with columns of what their places say.

    A file with a column of steps and no column that tells runs apart is a run, named by its place.
    """
    import numpy as np
    import pandas as pd

    places = columns_of_places(paths, root)
    places["source"] = [os.path.relpath(path, root) for path in paths]
    roles = {role: name for source in sources for role, name in source.roles.items()}
    frame = pd.concat([source.frame for source in sources], ignore_index=True)
    number = np.repeat(
        np.arange(len(sources)), [len(source.frame) for source in sources]
    )  # of each row's file
    if "run" in roles:
        frame[roles["run"]] = places.run.to_numpy()[number] + " " + frame[roles["run"]].astype(str)
    elif all(_is_a_run(source, asked) for source in sources):
        roles["run"] = "run"
    said = [
        str(name) for name in places if name not in frame and (name != "run" or roles.get("run") == "run")
    ]
    for name in said:
        codes, values = pd.factorize(places[name])
        frame[name] = pd.Categorical.from_codes(codes[number], pd.Index(values, dtype=object))
    parted = [name for name in said if re.fullmatch(r"folder\d+|file", name)]
    if len(parted) == 1 and not ARM_NAMES & {str(name).lower() for name in frame}:
        roles.setdefault("arm", parted[0])
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
    from .delimited import STEP_NAMES

    names = [str(name) for name in source.frame]
    steps = {asked.step, source.roles.get("step", "")} & set(names) or [
        n for n in names if STEP_NAMES.fullmatch(n)
    ]
    telling = {asked.run, asked.seed, asked.arm, "run", "run_id", "seed", "name", *ARM_NAMES}
    return bool(steps) and not any(source.frame[name].nunique() > 1 for name in telling & set(names))
