"""The user's cache of corpora and measurements, which all studies share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ebc_lab.config.identity import digest

from .json_files import try_read, write_json


def cache_dir() -> Path:
    """Return the path of the user's cache folder, which may not exist yet."""
    from platformdirs import user_cache_path

    return user_cache_path("ebc-lab")


class MeasurementCache:
    """A cached measurement, stored as JSON in `<kind>-<digest>.json` in the user's cache folder.

    Args:
        depends_on: everything that can change the measurement, such as shape, machine and versions, as JSON.
        form: the measurement's type hint. A file whose contents do not fit it is ignored.
    """

    def __init__(self, kind: str, depends_on: Any, *, form: Any):
        self.form = form
        self.path = cache_dir() / f"{kind}-{digest(depends_on)[:16]}.json"

    def read(self) -> Any:
        """Return the cached measurement; None if there is none, or if its file cannot be used."""
        return try_read(self.path, self.form)

    def write(self, measurement: Any) -> None:
        """Store the measurement. If the file cannot be written, the next process measures again."""
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, measurement, durable=False)

    def read_or_measure(self, measure: Callable[[], Any]) -> Any:
        """Return the cached measurement. If there is none, call `measure`, store the result and return it."""
        measured = self.read()
        if measured is None:
            measured = measure()
            self.write(measured)
        return measured
