"""The pictures that parts of a run have of their own, `Part.picture`: files of this folder with a part's
name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, cast

from ebc_lab.config.parts import PARTS

from .curves import Run
from .sheet import Arms, Facts, Sheet


class PartPicture(Protocol):
    def gather(
        self, label: str, arm: Mapping[str, Any], runs: Sequence[Run], specs: Mapping[str, Mapping[str, Any]]
    ) -> Any:
        """Return what the picture shows of an arm, None for nothing."""

    def draw(self, facts: Facts, track: str, arms: Arms, drawn: Mapping[str, Any]) -> Sheet:
        """Draw the arms that show something."""


DRAWN = [part for part in PARTS if part.picture]
OF_PARTS = {part.picture: cast(PartPicture, import_module(f"{__package__}.{part.name}")) for part in DRAWN}
