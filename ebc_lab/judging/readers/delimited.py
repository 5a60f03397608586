"""CSV and TSV files: a row an evaluation, a row a run, or a column a run."""

from __future__ import annotations

import codecs
import csv
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, cast

import numpy as np
import pandas as pd

from ebc_lab.config.errors import UserError, require, shown

from ..asked import Asked
from .names import STEP_NAMES, split_name, split_names
from .reader import Source

ENDING = re.compile(r"\.(csv|tsv)(\.gz)?$", re.IGNORECASE)
NOT_UTF8 = "is not text in UTF-8: save it as UTF-8 and call again"
FIRST_LOOK = 1 << 14  # bytes
WIDE = 3  # rows that are looked at however long they are
MISSING = ["", "NA", "N/A", "n/a", "#N/A", "<NA>", "null", "NULL", "None"]  # not logged
# between separators, line ends or quotation marks, or at either end of the text
NAN = re.compile(rb"(?<![^,;\t\n\"]) *-?(?:nan|NaN)(?= *(?:[\",;\t\r\n]|\Z))")
THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")
# words of columns that are a metric, a setting or a count, and so no run's name
KNOWN_WORD = re.compile(
    r"(loss|acc|accuracy|ppl|perplexity|bpb|bpc|error|err|score|metric|reward|f1|bleu|rouge|mse|rmse|mae|nll|ce|"
    r"auc|seed|lr|learning|rate|wd|decay|batch|size|steps?|iter|iteration|epoch|tokens|time|wall|runtime|timestamp|"
    r"train|training|val|valid|validation|test|eval|dev|norm|grad|mean|std|min|max|memory|gpu|planned|run)\d*",
    re.IGNORECASE,
)


TITLE = "CSV files"


def claims(path: Path) -> bool:
    return path.is_file() and ENDING.search(path.name) is not None


def read(path: Path, asked: Asked) -> Source:
    frame, notes = read_table(path)
    return table_source(frame, asked, path, "CSV file", notes)


def first_rows(path: Path) -> tuple[list[list[str]], str, str]:
    """Return the first rows of a file as text (at most 50), what separates its cells, and its decimal point.

    Raises UserError: the file is empty, is not text in UTF-8, or cannot be decompressed.
    """
    try:
        with _opened(path) as file:
            head = file.read(FIRST_LOOK)
            whole = len(head) < FIRST_LOOK
            if head.count(b"\n") < WIDE:  # a row may be longer than the first look
                head += b"".join(islice(file, WIDE))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    text = _decoded(head, path, whole=whole)
    require(text.strip() != "", f"{path} is empty")
    lines = text.splitlines()
    if not whole and not text.endswith("\n") and len(lines) > 1:  # the last is cut off
        lines.pop()
    tables = {mark: _split(lines, mark) for mark in ("\t", ";", ",")}
    mark = max(tables, key=lambda each: (_agreeing(tables[each]), max(map(len, tables[each]))))
    rows = tables[mark]
    cells = [cell for row in rows[1:] for cell in row] if mark == ";" else []  # else a comma separates them
    points = {
        number[1] for cell in cells if (number := re.fullmatch(r"-?\d+([,.])\d+(?:[eE][-+]?\d+)?", cell))
    }
    require(len(points) < 2, f"{path} writes some numbers with a decimal comma and some with a point")
    return rows, mark, "," if "," in points else "."


def read_table(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return a file's rows, and notes on what was left out.

    What was logged and is not finite is `inf`: a cell `nan` is one, an empty cell is not.

    Raises UserError: no row of names, a name twice, or rows with more cells than names.
    """
    rows, mark, point = first_rows(path)
    names = [name.strip().removeprefix("\ufeff") for name in rows[0]]
    _check_names(names, path)
    _check_cells(rows, path)
    format_of_cells: Any = {
        "sep": mark,
        "decimal": point,
        "header": 0,
        "names": [name or "index" for name in names],
        "index_col": False,
        "keep_default_na": False,
        "encoding": "utf-8",
        "skipinitialspace": any(cell.startswith(" ") for row in rows for cell in row),  # slower by a third
        "na_values": MISSING,
    }
    try:
        frame = pd.read_csv(path, **{**format_of_cells, "na_values": [*MISSING, "nan", "NaN"]})
        blank = any(frame[name].hasnans for name in frame)
        if blank and any(map(_mentions_nan, _blocks(path))):  # which of these are empty cells?
            del frame
            with TemporaryFile() as copy:
                for block in _blocks(path):
                    copy.write(NAN.sub(b"inf", block) if _mentions_nan(block) else block)
                copy.seek(0)
                frame = pd.read_csv(copy, **format_of_cells)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} {NOT_UTF8}") from error
    except (pd.errors.ParserError, OSError, EOFError, zlib.error) as error:
        why = str(error).removeprefix("Error tokenizing data. C error: ").strip()
        raise UserError(f"{path} is damaged: {why}") from error
    notes = []
    has_steps = any(STEP_NAMES.fullmatch(name) for name in names if name)
    if "" in names and has_steps and (frame["index"].to_numpy() == range(len(frame))).all():
        frame = frame.drop(columns="index")
        notes.append(f"The first column of {path.name} has no name and counts its rows: left out.")
    return logged(frame), notes


def table_source(
    frame: pd.DataFrame, asked: Asked, path: Path, what: str, notes: Sequence[str] = ()
) -> Source:
    """Return what a table's rows are, long or wide."""
    require(len(frame) > 0, f"{path} has names of columns and no rows")
    long, roles, note = made_long(logged(frame), asked, str(path))
    return Source(long, f"{what} {path.name}", roles=roles, notes=[*notes, *([note] if note else [])])


def logged(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame, altered where it holds `-inf`: what was logged and is not finite is `inf`."""
    for name in frame:
        if frame[name].dtype.kind == "f" and frame[name].min() == float("-inf"):
            frame[name] = frame[name].replace(float("-inf"), float("inf"))
    return frame


def made_long(frame: pd.DataFrame, asked: Asked, where: str) -> tuple[pd.DataFrame, dict[str, str], str]:
    """Return a table with a row an evaluation. Where it was made so from one with a column a run: also its
    columns by role, and a note.

    A table has a column for each run where it has a column of steps, all others are numbers, and their names,
    without a metric's name that all of them share, are no names of metrics or settings. With `--loss`, the
    columns whose names begin or end with it are the runs.

    Raises UserError: nothing but numbers under names that nobody knows, and no column of steps.
    """
    from pandas.api.types import is_numeric_dtype

    names = list(frame.columns)
    if asked.loss in names:
        return frame, {}, ""
    steps = [asked.step] if asked.step in names else [name for name in names if STEP_NAMES.fullmatch(name)]
    others = [name for name in names if name not in steps]
    if asked.loss:
        ends = [name for name in others if _without(name, asked.loss) is not None]
        runs, metric = {name: str(_without(name, asked.loss)) for name in ends}, asked.loss
    else:
        runs, metric = _runs_of_columns(others)
    numeric = all(is_numeric_dtype(frame[name]) for name in (runs if asked.loss else others))
    if len(runs) < 2 or not numeric:
        return frame, {}, ""
    require(
        len(steps) > 0,
        f"{where}: is each column a run, or a metric? Name the column of steps by --step, or that of the "
        f"loss by --loss; its columns are {shown(', '.join(names))}",
    )
    step = asked.step or steps[0]
    long = long_table(frame, step, [(run, {metric: column}) for column, run in runs.items()])
    roles = {"run": "run", "arm": "arm", "step": step, "loss": metric}
    roles |= {"seed": "seed"} if "seed" in long else {}
    return long, roles, f"{where} has a column for each of {len(runs)} runs: {metric} by {step}."


def long_table(frame: pd.DataFrame, step: str, runs: Sequence[tuple[str, Mapping[str, str]]]) -> pd.DataFrame:
    """Return a row an evaluation of a table that has columns for each run.

    Args:
        runs: the name of each, and its columns by metric. A row in which a run has no metric is left out;
            `_step` is none where there are others.

    Returns: `run`, what the names of runs say (`arm`, `seed`, settings), the steps and the metrics.
    """
    metrics = list(dict.fromkeys(metric for _, columns in runs for metric in columns))
    blank = np.full(len(frame), np.nan)
    values = pd.DataFrame({step: np.tile(frame[step], len(runs))})
    for metric in metrics:
        each = [frame[columns[metric]] if metric in columns else blank for _, columns in runs]
        values[metric] = np.concatenate(each)
    kept = values[list(set(metrics) - {"_step"}) or metrics].notna().any(axis=1).to_numpy()
    names = [run for run, _ in runs]
    split = split_names(names)
    about = pd.DataFrame({"run": names, "arm": [arm or "all runs" for arm, _ in split]}, dtype=object)
    for key in dict.fromkeys(key for _, settings in split for key in settings if key != "run"):
        about[key] = [settings.get(key) for _, settings in split]
    rows = np.repeat(range(len(runs)), len(frame))[kept]
    return pd.concat([part.reset_index(drop=True) for part in (about.iloc[rows], values[kept])], axis=1)


def _runs_of_columns(names: Sequence[str]) -> tuple[dict[str, str], str]:
    """Return column -> run, and the metric that they share. No runs where one is a metric or a setting."""
    # words, with what separates them between
    words = [re.split(r"(\s-\s|[_/.:\s-])", name) for name in names]
    shared = 0
    while (
        len(names) > 1
        and all(len(each) >= 2 * shared + 3 for each in words)
        and len({each[-1 - 2 * shared] for each in words}) == 1
        and KNOWN_WORD.fullmatch(words[0][-1 - 2 * shared])
    ):
        shared += 1
    metric = "".join(words[0][-(2 * shared - 1) :]) if shared else "loss"
    runs = {name: "".join(each[: len(each) - 2 * shared]) for name, each in zip(names, words, strict=True)}
    for run in runs.values():
        rest = split_name(run)[0]
        if any(KNOWN_WORD.fullmatch(word) for word in re.split(r"[^A-Za-z0-9]+", rest)):
            return {}, metric
    return runs, metric


def _without(name: str, metric: str) -> str | None:
    """Return a column's name without the metric at its end or beginning, or None where it is not there."""
    if name.endswith(metric) and name[: -len(metric)].rstrip() and not name[: -len(metric)][-1].isalnum():
        return name[: -len(metric)].rstrip(" _-/.:")
    if name.startswith(metric) and len(name) > len(metric) and not name[len(metric)].isalnum():
        return name[len(metric) :].lstrip(" _-/.:")
    return None


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield the content of a file in parts of whole lines."""
    with _opened(path) as file:
        while block := file.read(1 << 20):
            yield block + file.readline()


def _mentions_nan(block: bytes) -> bool:
    return b"nan" in block or b"NaN" in block


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _decoded(head: bytes, path: Path, *, whole: bool) -> str:
    """Return the beginning of a file as text. A character that its end cuts in two is left out."""
    require(b"\0" not in head, f"{path} {NOT_UTF8}")
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(head, final=whole)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} {NOT_UTF8}") from error


def _split(lines: Sequence[str], mark: str) -> list[list[str]]:
    """Return the first rows of cells, at most 50."""
    try:
        rows = csv.reader((f"{line}\n" for line in lines), delimiter=mark)
        return [row for row in islice(rows, 50) if row] or [[]]
    except csv.Error:
        return [[]]


def _agreeing(rows: Sequence[Sequence[str]]) -> bool:
    """Return whether rows have as many cells as the first, which has several."""
    return len(rows[0]) > 1 and all(len(row) == len(rows[0]) for row in rows)


def _check_names(names: Sequence[str], path: Path) -> None:
    """Raise UserError unless the first row names the columns, each once."""
    numbers = [name for name in names if re.fullmatch(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?", name)]
    require(
        2 * len(numbers) <= len(names),
        f"{path}: its first row, {shown(', '.join(names))}, is of numbers: write the columns' names above it",
    )
    for name, times in Counter(names).items():
        require(times == 1, f"{path} has two columns called {shown(name)}: rename one of them")


def _check_cells(rows: Sequence[Sequence[str]], path: Path) -> None:
    """Raise UserError unless the first rows have no more cells than the first, and plain numbers."""
    names = rows[0]
    if len(names) == 1 and max(map(len, rows)) == 1:
        raise UserError(
            f"{path} has one column, {shown(names[0])}: separate its cells by commas, semicolons or tabs"
        )
    if len(names) == 1:
        raise UserError(
            f"{path}: its first row, {shown(names[0])}, has one cell and others have more: remove what "
            "stands above the columns' names"
        )
    for number, row in enumerate(rows[1:], 2):
        require(
            len(row) <= len(names),
            f"{path}: row {number} has {len(row)} cells, the first row {len(names)} names: name all columns",
        )
        for name, cell in zip(names, row, strict=False):
            if THOUSANDS.fullmatch(cell):
                raise UserError(
                    f"{path}: row {number} has {cell} in column {name}: write it without separators of "
                    "thousands"
                )
