from collections.abc import Iterator
from dataclasses import dataclass

from ..fields import setting
from ..part import Mode, Part, Run


@dataclass
class ProjectionConfig(Part):
    """A constraint on weight matrices, restored after each step."""

    name: str = setting("none", "which constraint", group="projection")
    bound: float = setting(
        2.0, "of spectral", "× the largest initial singular value", above=0, high=1e6, only=("spectral",)
    )

    place = 30
    words = {
        "spectral": "spectral projection",
        "stiefel": "stiefel projection",
        "sphere": "sphere projection",
    }

    def refuses(self, run: Run) -> Iterator[str]:
        if self.name == "spectral" and run.param_dtype != "float32":
            yield (
                "param_dtype=bfloat16 does not go with projection=spectral: there is no singular value "
                "decomposition in bfloat16."
            )
        if self.name == "sphere" and run.workload.name != "ebm":
            yield (
                "projection=sphere keeps the directions of workload=ebm on the sphere, and "
                f"workload={run.workload.name} has none."
            )

    def unfit(self, mode: Mode) -> Iterator[str]:
        if mode is Mode.EXACT and self.name != "none":
            yield f"projection={self.name}: choose projection=none"
