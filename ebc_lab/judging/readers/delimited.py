"""CSV and TSV files: a row an evaluation, a row a run, or a column a run."""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from ebc_lab.config.errors import UserError, require, shown

from ..asked import Asked
from .names import split_name, split_names
from .reader import Reader, Source

if TYPE_CHECKING:
    import pandas as pd

ENDING = re.compile(r"\.(csv|tsv)(\.gz)?$", re.IGNORECASE)
FIRST_LOOK = 1 << 14  # bytes
WIDE = 3  # rows that are looked at however long they are
MISSING = ["", "NA", "N/A", "n/a", "#N/A", "<NA>", "null", "NULL", "None"]  # not logged
NAN = re.compile(rb"(?<=[,;\t\n\"])[ ]*-?(?:nan|NaN)(?=[ ]*[\",;\t\r\n])")
STEP_NAMES = re.compile(
    r"(.*[/._])?(global_?)?(_?step|steps|iter|iters|iteration|iterations|epoch|tokens|batch_idx|update|updates|index)",
    re.IGNORECASE,
)
# words of columns that are a metric, a setting or a count, and so no run's name
KNOWN_WORD = re.compile(
    r"(loss|acc|accuracy|ppl|perplexity|bpb|bpc|error|err|score|metric|reward|f1|bleu|rouge|mse|rmse|mae|nll|ce|"
    r"auc|seed|lr|learning|rate|wd|decay|batch|size|steps?|iter|iteration|epoch|tokens|time|wall|runtime|timestamp|"
    r"train|training|val|valid|validation|test|eval|dev|norm|grad|mean|std|min|max|memory|gpu|planned|run)\d*",
    re.IGNORECASE,
)


class Delimited(Reader):
    """CSV, TSV and files of semicolons, also compressed by gzip."""

    title = "CSV files"

    def claims(self, path: Path) -> bool:
        return path.is_file() and ENDING.search(path.name) is not None

    def read(self, path: Path, asked: Asked) -> Source:
        frame, notes = read_table(path)
        return table_source(frame, asked, path, "CSV file", notes)


READER = Delimited()


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
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    text = _decoded(head, path, whole=whole)
    require(text.strip() != "", f"{path} is empty")
    lines = text.splitlines()
    if not whole and not text.endswith("\n") and len(lines) > 1:  # the last is cut off
        lines.pop()
    tables = {mark: _split(lines, mark) for mark in ("\t", ";", ",")}
    mark = max(tables, key=lambda each: (_agreeing(tables[each]), max(map(len, tables[each]))))
    rows = tables[mark]
    cells = [cell for row in rows[1:] for cell in row]
    comma = mark == ";" and any(re.fullmatch(r"-?\d+,\d+", cell) for cell in cells)
    point = any(re.fullmatch(r"-?\d+\.\d+", cell) for cell in cells)
    require(not (comma and point), f"{path} writes some numbers with a decimal comma and some with a point")
    return rows, mark, "," if comma else "."


def read_table(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return a file's rows, and notes on what was left out.

    What was logged and is not finite is `inf`: a cell `nan` is one, an empty cell is not.

    Raises UserError: no row of names, a name twice, or rows with more cells than names.
    """
    import pandas as pd

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
        if any(frame[name].hasnans for name in frame) and _mentions_nan(
            path
        ):  # which of these are empty cells?
            del frame
            with _opened(path) as raw:
                frame = pd.read_csv(_Logged(raw), **format_of_cells)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: save it as UTF-8 and call again") from error
    except (pd.errors.ParserError, OSError, EOFError) as error:
        why = str(error).removeprefix("Error tokenizing data. C error: ").strip()
        raise UserError(f"{path} is damaged: {why}") from error
    require(len(frame) > 0, f"{path} has names of columns and no rows")
    notes = []
    has_steps = any(STEP_NAMES.fullmatch(name) for name in names if name)
    if "" in names and has_steps and (frame["index"].to_numpy() == range(len(frame))).all():
        frame = frame.drop(columns="index")
        notes.append(f"The first column of {path.name} has no name and counts its rows: left out.")
    return frame, notes


def table_source(
    frame: pd.DataFrame, asked: Asked, path: Path, what: str, notes: Sequence[str] = ()
) -> Source:
    """Return what a table's rows are, long or wide."""
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
    import numpy as np
    import pandas as pd
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
    split = split_names(list(runs.values()))
    kept = [frame[name].notna().to_numpy() for name in runs]
    counts = [int(mask.sum()) for mask in kept]
    table = pd.DataFrame(
        {"run": list(runs.values()), "arm": [arm or "all runs" for arm, _ in split]}, dtype=object
    )
    for key in dict.fromkeys(key for _, told in split for key in told if key != "run"):
        table[key] = [told.get(key) for _, told in split]
    long = table.loc[np.repeat(range(len(runs)), counts)].reset_index(drop=True)
    long[step] = np.concatenate([frame[step].to_numpy()[mask] for mask in kept])
    long[metric] = np.concatenate(
        [frame[name].to_numpy(float)[mask] for name, mask in zip(runs, kept, strict=True)]
    )
    roles = {"run": "run", "arm": "arm", "step": step, "loss": metric} | (
        {"seed": "seed"} if "seed" in long else {}
    )
    return long, roles, f"{where} has a column for each of {len(runs)} runs: {metric} by {step}."


def _runs_of_columns(names: Sequence[str]) -> tuple[dict[str, str], str]:
    """Return column -> run, and the metric that they share. No runs where one is a metric or a setting."""
    words = [
        re.split(r"(\s-\s|[_/.:\s-])", name) for name in names
    ]  # words, with what separates them between
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


class _Logged(io.RawIOBase):
    """A file in whose text each cell `nan` is `inf`: pandas takes both `nan` and an empty cell for missing,
    and only the second is."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.first = True

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block = self.file.read(size) if size == -1 else self.file.read(size) + self.file.readline()
        if self.first:
            self.first, block = False, block.removeprefix(b"\xef\xbb\xbf")
        return NAN.sub(b"inf", b"\n" + block + b"\n")[1:-1] if _has_nan(block) else block

    def __iter__(self) -> _Logged:
        return self

    def __next__(self) -> bytes:
        line = self.file.readline()
        if not line:
            raise StopIteration
        return line


def _has_nan(block: bytes) -> bool:
    return b"nan" in block or b"NaN" in block


def _mentions_nan(path: Path) -> bool:
    """Return whether a file may have a cell `nan`."""
    with _opened(path) as file:
        end = b""
        while block := file.read(1 << 20):
            if _has_nan(end + block):
                return True
            end = block[-2:]
    return False


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _decoded(head: bytes, path: Path, *, whole: bool) -> str:
    """Return the beginning of a file as text. A character that its end cuts in two is left out."""
    require(b"\0" not in head, f"{path} is not text in UTF-8: save it as UTF-8 and call again")
    try:
        return head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start > len(head) - 4 and not whole:
            return head[: error.start].decode("utf-8-sig")
        raise UserError(f"{path} is not text in UTF-8: save it as UTF-8 and call again") from error


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
    require(
        len(names) > 1 or max(map(len, rows)) > 1,
        f"{path} has one column, {shown(names[0])}: separate its cells by commas, semicolons or tabs",
    )
    require(
        len(names) > 1,
        f"{path}: its first row, {shown(names[0])}, has one cell and others have more: remove what stands "
        "above the columns' names",
    )
    for number, row in enumerate(rows[1:], 2):
        require(
            len(row) <= len(names),
            f"{path}: row {number} has {len(row)} cells, the first row {len(names)} names: name all columns",
        )
        for name, cell in zip(names, row, strict=False):
            require(
                not re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", cell),
                f"{path}: row {number} has {cell} in column {name}: write it without separators of thousands",
            )
