"""Parts that installed packages offer by a name: their entry points."""

from __future__ import annotations

import functools
from importlib import metadata

OFFERED = {"optimizer": "ebc_lab.optimizers", "stabilizer": "ebc_lab.stabilizers"}  # group of conf/ -> theirs


@functools.cache
def offered(group: str) -> dict[str, tuple[str, ...]]:
    """Return name -> the targets, `module:function`, that installed packages offer under it: one, unless
    packages chose the same name."""
    by_name: dict[str, set[str]] = {}
    for entry in metadata.entry_points(group=OFFERED[group]) if group in OFFERED else ():
        by_name.setdefault(entry.name, set()).add(f"{entry.module}:{entry.attr}")
    return {name: tuple(sorted(targets)) for name, targets in sorted(by_name.items())}
