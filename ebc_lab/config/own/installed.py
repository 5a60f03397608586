"""Which installed package a file belongs to, as its record says: found without importing anything."""

from __future__ import annotations

import functools
import re
import sys
from importlib.metadata import PathDistribution
from pathlib import Path


def installed_release(path: Path) -> str | None:
    """Return `name==version` of the installed package that brought this file; None for a file of one's own,
    and for one that an editable install only points at."""
    path = path.absolute()
    folder = next((place for place in path.parents if str(place) in sys.path), None)
    return None if folder is None else _release(folder, path.relative_to(folder).as_posix())


@functools.cache
def _release(folder: Path, file: str) -> str | None:
    """Return the same for a file in a folder of installed packages. A package of the file's name is asked
    first: the records of all of them have tens of thousands of lines."""
    called = re.sub(r"[-_.]+", "_", file.partition("/")[0].removesuffix(".py")).lower()
    others_last = sorted(
        folder.glob("*.dist-info"), key=lambda info: not info.name.lower().startswith(f"{called}-")
    )
    for info in others_last:
        try:
            record = (info / "RECORD").read_text(encoding="utf-8")
        except OSError:  # it was not pip that installed this one
            continue
        if f"\n{file}," in f"\n{record}":
            distribution = PathDistribution(info)
            return f"{distribution.metadata['Name']}=={distribution.version.partition('+')[0]}"
    return None
