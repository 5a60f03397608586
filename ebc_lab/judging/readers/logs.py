"""Text logs, by a regular expression with named groups: a row a line that matches, a run a file."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from ebc_lab.config.errors import UserError, require, shown

from ..asked import Asked
from .reader import Source, together

ADVICE = r"--pattern 'step:(?P<step>\d+)/(?P<planned>\d+) val_loss:(?P<val_loss>\S+)'"
# a name, what separates, a number
FIGURE = re.compile(r"((?:[A-Za-z]+ )?[A-Za-z_][\w./-]*?)([\s:=]+)([-+]?\d[\d.,eE+-]*)")
COUNTERS = {"step", "steps", "iter", "iteration", "epoch", "it", "global_step"}


TITLE = "text logs"


def claims(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(4096)
    return path.suffix == ".gz" or b"\0" not in head


def read_logs(paths: Sequence[Path], root: Path, asked: Asked) -> Source:
    """Return the logs that the pattern matches; a note counts the lines and files that it does not.

    Raises UserError: it matches none.
    """
    pattern = compiled(asked)
    matches = {path: _matches(path, pattern) for path in paths}
    logs = {path: (frame, missed) for path, (frame, missed) in matches.items() if len(frame)}
    others = [path for path in paths if path not in logs]
    if not logs:
        more = f" and in {len(paths) - 1} more files" if len(paths) > 1 else ""
        raise UserError(
            f"no line of {paths[0]}{more} matches --pattern {shown(asked.pattern)}{advice(paths[0])}."
        )
    sources = [_source(path, frame) for path, (frame, _) in logs.items()]
    source = together(sources, TITLE, list(logs), root, asked)
    missed = sum(missed for _, missed in logs.values())
    notes = [f"{len(source.frame):,} matches of --pattern; {missed:,} lines do not match."]
    if others:
        notes.append(f"--pattern matches no line of {len(others)} more files, such as {others[0].name}.")
    return replace(source, notes=notes)


def read(path: Path, asked: Asked) -> Source:
    return read_logs([path], path.parent, asked)


def _matches(path: Path, pattern: re.Pattern[str]) -> tuple[pd.DataFrame, int]:
    """Return a row a match, with a column a group, and how many lines of a log do not match."""
    rows, missed = [], 0
    for line in _text(path).splitlines():
        matches = [match.groupdict() for match in pattern.finditer(line)]
        rows.extend(matches)
        missed += not matches and line.strip() != ""
    return pd.DataFrame(rows).apply(_numbers), missed


def _source(path: Path, frame: pd.DataFrame) -> Source:
    roles = {role: role for role in ("step", "loss", "seed", "arm", "planned", "run") if role in frame}
    return Source(frame, f"log {path.name}", roles)


def compiled(asked: Asked) -> re.Pattern[str]:
    """Return the caller's pattern.

    Raises UserError: it is no regular expression, or has no named group.
    """
    try:
        pattern = re.compile(asked.pattern)
    except re.error as error:
        raise UserError(f"--pattern {shown(asked.pattern)} is no regular expression: {error}") from error
    require(
        bool(pattern.groupindex),
        f"--pattern {shown(asked.pattern)} has no named group, which becomes a column; such as {ADVICE}.",
    )
    return pattern


def advice(path: Path) -> str:
    """Return the line of a log that looks most like an evaluation, and a pattern that would match it."""
    lines = [line.strip() for line in _text(path).splitlines() if line.strip()]
    best = max(lines, key=lambda line: len(FIGURE.findall(line)), default="")
    parts: list[str] = []
    for name, between, figure in FIGURE.findall(best):
        group = "step" if name.lower() in COUNTERS else re.sub(r"\W+", "_", name)
        literal = re.escape(name).replace(r"\ ", " ")
        digits = r"\d+" if figure.isdecimal() else r"\S+"
        gap = re.escape(between) if between.strip() else r"\s+"
        if f"(?P<{group}>" not in "".join(parts):
            parts.append(f"{literal}{gap}(?P<{group}>{digits})")
    if not parts:
        return f"; its last line is {shown(lines[-1])}" if lines else "; it is empty"
    return f"; of its line {shown(best)} --pattern '{'.*?'.join(parts)}' would match each figure"


def _numbers(texts: pd.Series) -> pd.Series:
    """Return a group's texts as numbers where all are; `nan` was logged, a group that is absent was not."""
    words = texts.str.strip().str.rstrip(",;")
    values = pd.to_numeric(words, errors="coerce").astype(float)
    unfinished = words.str.fullmatch(r"[-+]?(nan|inf|infinity)", case=False).fillna(False).astype(bool)
    if not (values.notna() | unfinished | texts.isna()).all():
        return texts
    return values.mask(unfinished, math.inf)


def _text(path: Path) -> str:
    """Return a log's text. Bytes that are no UTF-8 (a cut character, a progress bar) are replaced."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return content.decode("utf-8-sig", errors="replace")
