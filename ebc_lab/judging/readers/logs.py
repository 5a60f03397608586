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


class NoMatch(UserError):
    """No line of a file matches the caller's pattern."""


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
        """Return the logs that the pattern matches; a note names files that it does not.

        Raises UserError: it matches none.
        """
        from . import together

        logs, sources, others = [], [], []
        for path in paths:
            try:
                sources.append(self.read(path, asked))
                logs.append(path)
            except NoMatch:
                if len(paths) == 1:
                    raise
                others.append(path)
        require(
            bool(logs),
            f"{root}: no line of {len(paths)} files matches --pattern {shown(asked.pattern)}; the last line of "
            f"{paths[0].name} is {shown(_last(paths[0]))}",
        )
        source = together(self, sources, logs, root, asked) if len(logs) > 1 else sources[0]
        if not others:
            return source
        note = f"--pattern matches no line of {len(others)} other files, such as {others[0].name}: not read."
        return replace(source, notes=[*source.notes, note])

    def read(self, path: Path, asked: Asked) -> Source:
        import pandas as pd

        pattern = compiled(asked)
        loss = asked.loss if asked.loss in pattern.groupindex else "loss"
        rows, missed = [], 0
        for line in _text(path).splitlines():
            matches = [match.groupdict() for match in pattern.finditer(line)]
            rows.extend(matches)
            missed += not matches and line.strip() != ""
        if not rows:
            raise NoMatch(
                f"{path}: no line matches --pattern {shown(asked.pattern)}; its last line is {shown(_last(path))}"
            )
        frame = pd.DataFrame(rows)
        for name in frame:
            frame[name] = _numbers(frame[name])
        return Source(
            frame,
            f"log {path.name}",
            roles={role: role for role in ("step", "seed", "arm", "planned", "run") if role in frame}
            | {"loss": loss},
            notes=[f"{path.name}: {len(rows):,} matches of --pattern; {missed:,} lines do not match."],
        )


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
