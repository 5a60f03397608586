"""On what a run's bits may depend beside its settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..fields import setting
from ..part import Mode, Part, Tail, Unfit

VERITY = ("verity",)
WORDS = {"torch": "torch’s deterministic kernels", "verity": "exact sums"}


@dataclass
class DeterminismConfig:
    """On what a run's bits may depend beside its settings (docs/verity.md)."""

    name: str = setting(
        "none",
        "on the machine; torch: its deterministic kernels, on one machine; verity: exact sums, on none",
        group="determinism",
    )
    engine: str = setting(
        "auto",
        "what computes; changes no bit; auto: c where it can be built",
        choices=("auto", "eager", "c"),
        only=VERITY,
        in_run_id=False,
    )
    micro_batches: int = setting(
        1,
        "parts of a batch that go forward and backward one after another; changes no bit",
        "parts",
        low=1,
        high=65536,
        only=VERITY,
        in_run_id=False,
    )

    @property
    def exact(self) -> bool:
        """Whether every sum of the run is exact, or made in a written order."""
        return self.name == "verity"


def _unfit(determinism: DeterminismConfig, mode: Mode) -> Unfit | None:
    if mode is Mode.SEVERAL_PROCESSES and determinism.name != "none":
        why = "gradients are added up in another order; leave launcher.processes_per_run=1"
        return Unfit(f"determinism={determinism.name}", why)
    return None


def _tail(determinism: DeterminismConfig) -> Iterator[Tail]:
    if determinism.name != "none":
        yield Tail(f"_{determinism.name}", WORDS[determinism.name])


DETERMINISM = Part(
    "determinism",
    DeterminismConfig,
    place=210,
    measured="exact training",
    neutral=lambda determinism: determinism.name == "none",
    unfit=_unfit,
    tail=_tail,
)
