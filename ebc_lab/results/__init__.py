"""Results as data: a study as pandas tables, and arms ranked over many studies (docs/results.md).

Everything is read from a study's files. Nothing in them is executed, and torch is not imported.
"""

from .loaded import LoadedStudy, load
from .ranking import Board, board

__all__ = ["Board", "LoadedStudy", "board", "load"]
