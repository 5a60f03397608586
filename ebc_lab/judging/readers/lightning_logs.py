"""What Lightning's CSVLogger writes: `version_N/metrics.csv`, and `hparams.yaml` beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ebc_lab.config.errors import UserError, count, shown
from ebc_lab.config.own.files import check_yaml

from ..asked import Asked
from .delimited import read_table
from .reader import Source, about_places, files_below, flat, source_of_runs

METRICS = r"metrics\.csv"


TITLE = "metrics.csv of Lightning"


def claims(path: Path) -> bool:
    return any(_is_lightnings(file) for file in files_below(path, METRICS))


def read(path: Path, asked: Asked) -> Source:
    """Return a row a logging; a run is a folder."""
    files = [file for file in files_below(path, METRICS) if _is_lightnings(file)]
    tables, settings, notes = [], [], []
    for number, file in enumerate(files):
        table = _metrics(file).rename(columns={"run": "logged/run"})
        table.insert(0, "run", number)
        tables.append(table)
        found, unread = _hparams(file.parent / "hparams.yaml")
        settings.append(found)
        if unread:
            notes.append(
                f"{', '.join(unread)} in {file.parent / 'hparams.yaml'} "
                f"{'are objects' if len(unread) > 1 else 'is an object'} of Python and left out."
            )
    what = f"{count(len(files), 'run')} of Lightning"
    curves = pd.concat(tables, ignore_index=True)
    about = about_places([file.parent for file in files], path, [{}] * len(files), settings)
    roles = {"run": "run", "seed": "seed", "step": "step"}
    return source_of_runs(about, settings, curves, what, roles, notes)


def _is_lightnings(file: Path) -> bool:
    """Return whether a table is Lightning's: settings lie beside it, or its folder is a version."""
    with file.open("rb") as start:
        head = start.readline().decode("utf-8", "replace").strip().split(",")
    named = file.parent.name.startswith("version_") or (file.parent / "hparams.yaml").is_file()
    return named and "step" in head


def _metrics(file: Path) -> pd.DataFrame:
    """Return a table of numbers: NaN in empty cells, `inf` where a value that is not finite was logged.

    Raises UserError: the table is damaged, or a cell is a word.
    """
    table, _ = read_table(file)
    for name in table.select_dtypes(exclude="number"):
        numbers = pd.to_numeric(table[name], errors="coerce")
        words = table[name][numbers.isna() & table[name].notna()]
        if len(words):
            line = int(words.index[0]) + 2
            raise UserError(f"{file}, line {line}: {name} is {shown(words.iloc[0])}, which is no number.")
    return table


def _hparams(file: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a run, and the names of those that are objects of Python: these are not made."""
    import yaml

    if not file.is_file():
        return {}, []

    class Opaque:
        """Stands for a value whose tag is unknown."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        """A safe loader that does not stop at a tag of Python's."""

    Loader.add_multi_constructor("", lambda loader, tag, node: Opaque())
    try:
        text = file.read_text("utf-8")
        check_yaml(text)
        found = yaml.load(text, Loader)  # a safe loader: no objects are made
    except (yaml.YAMLError, ValueError):
        return {}, ["everything"]
    settings = flat(found) if isinstance(found, Mapping) else {}
    unread = [name for name, value in settings.items() if isinstance(value, Opaque)]
    return {name: value for name, value in settings.items() if name not in unread}, unread
