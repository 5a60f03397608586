"""What is kept for the user from one study to the next: corpora and measurements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest

from .json_files import read_json, write_json


def cache_dir() -> Path:
    """Return the user's cache folder for corpora and measurements."""
    from platformdirs import user_cache_path

    return user_cache_path("ebc-lab")


class MeasurementCache:
    """A measurement that is kept as JSON in the user's cache folder, in `<kind>-<digest>.json`.

    Args:
        depends_on: everything that can change the measurement, as JSON: the shape, the machine, versions.
        form: the type hint of the measurement; a file that does not fit it is taken for none.
    """

    def __init__(self, kind: str, depends_on: Any, *, form: Any):
        self.form = form
        self.path = cache_dir() / f"{kind}-{digest(depends_on)[:16]}.json"

    def read(self) -> Any:
        """Return the measurement, or None where there is none or its file cannot be read."""
        try:
            return read_json(self.path, self.form)
        except (OSError, UserError):
            return None

    def write(self, measurement: Any) -> None:
        """Keep the measurement. Where it cannot be written, the next process measures again."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, measurement, durable=False)
        except OSError:
            pass

    def read_or_measure(self, measure: Callable[[], Any]) -> Any:
        """Return the measurement; where none is kept yet, `measure` makes it."""
        measured = self.read()
        if measured is None:
            measured = measure()
            self.write(measured)
        return measured
