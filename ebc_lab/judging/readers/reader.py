"""What a reader of one format is, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..asked import Asked

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Source:
    """What lay in files of one format: a row an evaluation, or a row a run where no curve was kept.

    Attributes:
        frame: the rows, in the order in which they were logged. Columns are called as the format calls them.
            A value that was logged and is not finite is `inf`; one that was not logged is NaN.
        what: what was read, in words: `3 offline runs of W&B`.
        roles: role -> column, of the roles that the format itself knows: `run`, `arm`, `seed`, `step`, `loss`,
            `planned`, `started` (when the run began).
        settings: columns that the format keeps as a run's configuration.
        better: `lower` or `higher`, where the format says it.
        notes: what was left out and why, a sentence each.
    """

    frame: pd.DataFrame
    what: str
    roles: Mapping[str, str] = field(default_factory=dict)
    settings: Sequence[str] = ()
    better: str = ""
    notes: Sequence[str] = ()


class Reader:
    """One format. A subclass is a module of this folder, and an instance of it stands in `READERS`."""

    title = ""  # in words, of several files: `CSV files`

    def claims(self, path: Path) -> bool:
        """Return whether a file or a folder is of this format. Looks at names and at first bytes only."""
        raise NotImplementedError

    def read(self, path: Path, asked: Asked) -> Source:
        """Return what lies there.

        Raises UserError: the file is damaged, or needs a library that is not installed (`needed`).
        """
        raise NotImplementedError
