"""Names of settings that are none, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def first_unknown(names: Iterable[object], known: Iterable[str]) -> tuple[object, str] | None:
    """Return the first of the names that is not known, and the nearest one that is; None if all are."""
    known = list(known)
    for name in names:
        if name not in known:
            return name, difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
    return None
