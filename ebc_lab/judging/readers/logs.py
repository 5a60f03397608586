"""Text logs, by a regular expression with named groups: a row a line that matches, a run a file."""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ebc_lab.config.errors import UserError, any_of, require, shown

from ..asked import Asked
from .reader import Reader, Source

if TYPE_CHECKING:
    import pandas as pd

ADVICE = r"--pattern 'step:(?P<step>\d+)/(?P<planned>\d+) val_loss:(?P<loss>\S+)'"


class Logs(Reader):
    """Any text, where the caller gives `--pattern`."""

    title = "text logs"

    def claims(self, path: Path) -> bool:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(4096)
        return path.suffix == ".gz" or b"\0" not in head

    def read_all(self, paths: Sequence[Path], root: Path, asked: Asked) -> Source:
        """Return the logs that the pattern matches; a note counts the lines and files that it does not.

        Raises UserError: it matches none.
        """
        from . import together

        logs: list[Path] = []
        sources: list[Source] = []
        others: list[Path] = []
        missed = 0
        for path in paths:
            source, others_of_it = self._matched(path, asked)
            if source is None:
                others.append(path)
            else:
                logs.append(path)
                sources.append(source)
                missed += others_of_it
        last = _last(paths[0])
        require(
            bool(logs),
            f"{paths[0]}: no line matches --pattern {shown(asked.pattern)}; its last line is {shown(last)}"
            + (f" ({len(paths) - 1} more files, none of which it matches)" if len(paths) > 1 else ""),
        )
        source = together(self, sources, logs, root, asked) if len(logs) > 1 else sources[0]
        notes = [f"{len(source.frame):,} matches of --pattern; {missed:,} lines do not match."]
        if others:
            notes.append(f"--pattern matches no line of {len(others)} more files, such as {others[0].name}.")
        return replace(source, notes=notes)

    def read(self, path: Path, asked: Asked) -> Source:
        return self.read_all([path], path.parent, asked)

    def _matched(self, path: Path, asked: Asked) -> tuple[Source | None, int]:
        """Return what matches in a log, None if nothing does, and how many lines do not match."""
        import pandas as pd

        pattern = compiled(asked)
        loss = asked.loss if asked.loss in pattern.groupindex else "loss"
        rows, missed = [], 0
        for line in _text(path).splitlines():
            matches = [match.groupdict() for match in pattern.finditer(line)]
            rows.extend(matches)
            missed += not matches and line.strip() != ""
        if not rows:
            return None, missed
        frame = pd.DataFrame(rows)
        for name in frame:
            frame[name] = _numbers(frame[name])
        roles = {role: role for role in ("step", "seed", "arm", "planned", "run") if role in frame}
        return Source(frame, f"log {path.name}", roles=roles | {"loss": loss}), missed


READER = Logs()


def compiled(asked: Asked) -> re.Pattern[str]:
    """Return the caller's pattern.

    Raises UserError: it is no regular expression, or has no group for the loss.
    """
    try:
        pattern = re.compile(asked.pattern)
    except re.error as error:
        raise UserError(f"--pattern {shown(asked.pattern)} is no regular expression: {error}") from error
    groups = list(pattern.groupindex)
    require(
        asked.loss in groups or "loss" in groups,
        f"--pattern {shown(asked.pattern)} has no group {asked.loss or 'loss'}"
        + (f": its groups are {any_of(groups)}" if groups else "")
        + f"; such as {ADVICE}",
    )
    return pattern


def _numbers(texts: pd.Series) -> pd.Series:
    """Return a group's texts as numbers where all are; `nan` was logged, a group that is absent was not."""
    import pandas as pd

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
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return content.decode("utf-8-sig", errors="replace")


def _last(path: Path) -> str:
    lines = [line for line in _text(path).splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
