"""Does a value read from a file fit the type hint by which our code takes it?"""

from __future__ import annotations

from typing import Any

import msgspec


def misfit(value: Any, kind: Any) -> str | None:
    """Return what is wrong with a value as JSON holds it, `steps: expected …, got …`; None if it fits.

    `kind`: a type hint; keys that its TypedDicts do not name may be there, of any kind. Raises TypeError for
    a hint that msgspec cannot check.
    """
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at ")  # `$.steps`
        what = what[0].lower() + what[1:]
        return f"{place.strip('`$.')}: {what}" if place else what
    return None
