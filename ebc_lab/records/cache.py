"""What is kept for the user between studies: corpora and measurements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest
from ebc_lab.config.kinds import check_form

from .json_files import read_json, write_json


def cache_dir() -> Path:
    """Return the user's cache folder for corpora and measurements."""
    from platformdirs import user_cache_path

    return user_cache_path("ebc-lab")


class MeasurementCache:
    """One measurement, kept as JSON in `<folder>/<kind>-<digest>.json`.

    Args:
        depends_on: everything that can change the measurement: the shape, the machine, versions. As JSON.
        folder: the user's cache folder unless given.
        form: the type hint of the measurement; a file that does not fit it counts as none.
    Raises:
        TypeError: the form cannot be checked, see `check_form`.
    """

    def __init__(self, kind: str, depends_on: Any, folder: Path | None = None, *, form: Any = Any):
        check_form(form)
        self.form = form
        self.path = (folder or cache_dir()) / f"{kind}-{digest(depends_on)[:16]}.json"

    def read(self) -> Any:
        """Return the measurement, or None where there is none or its file cannot be read."""
        try:
            return read_json(self.path, self.form)
        except (OSError, UserError):
            return None

    def write(self, measurement: Any) -> None:
        """Keep it. A cache that cannot be written costs the time of measuring again, nothing else."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, measurement, durable=False)
        except OSError:
            pass

    def read_or_measure(self, measure: Callable[[], Any]) -> Any:
        """Return the measurement, made by `measure` and kept where there is none yet."""
        measured = self.read()
        if measured is None:
            measured = measure()
            self.write(measured)
        return measured
