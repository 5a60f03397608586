"""A constraint on weight matrices, restored after each step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..fields import setting
from ..part import Mode, Part, Unfit


@dataclass
class ProjectionConfig:
    """A constraint on weight matrices, restored after each step."""

    name: str = setting("none", "which constraint", group="projection")
    bound: float = setting(
        2.0, "of spectral", "× the largest initial singular value", above=0, high=1e6, only=("spectral",)
    )


def _clashes(projection: ProjectionConfig, run: Any) -> Iterator[str]:
    if projection.name == "spectral" and run.param_dtype != "float32":
        yield (
            "param_dtype=bfloat16 does not go with projection=spectral: there is no singular value "
            "decomposition in bfloat16."
        )
    if projection.name == "sphere" and run.workload.name != "ebm":
        yield (
            "projection=sphere keeps the directions of workload=ebm on the sphere, and "
            f"workload={run.workload.name} has none."
        )


def _unfit(projection: ProjectionConfig, mode: Mode) -> Unfit | None:
    if mode is Mode.EXACT and projection.name != "none":
        return Unfit(f"projection={projection.name}", "choose projection=none")
    return None


WORDS = {"spectral": "spectral projection", "stiefel": "stiefel projection", "sphere": "sphere projection"}
PROJECTION = Part("projection", ProjectionConfig, place=30, clashes=_clashes, unfit=_unfit, words=WORDS)
