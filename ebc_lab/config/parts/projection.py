"""A constraint on weight matrices, restored after each step."""

from __future__ import annotations

from dataclasses import dataclass

from ..fields import setting
from ..part import Mode, Part, Unfit


@dataclass
class ProjectionConfig:
    """A constraint on weight matrices, restored after each step."""

    name: str = setting("none", "which constraint", group="projection")
    bound: float = setting(
        2.0, "of spectral", "× the largest initial singular value", above=0, high=1e6, only=("spectral",)
    )


def _unfit(projection: ProjectionConfig, mode: Mode) -> Unfit | None:
    if mode is Mode.EXACT and projection.name != "none":
        return Unfit(f"projection={projection.name}", "choose projection=none")
    return None


WORDS = {"spectral": "spectral projection", "stiefel": "stiefel projection", "sphere": "sphere projection"}
PROJECTION = Part("projection", ProjectionConfig, unfit=_unfit, words=WORDS)
