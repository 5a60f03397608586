from dataclasses import dataclass

from ..fields import setting
from ..part import Mode, Part

VERITY = ("verity",)


@dataclass
class DeterminismConfig(Part):
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

    off = "none"
    place = 210
    words = {"torch": "torch’s deterministic kernels", "verity": "exact sums"}
    measured = "exact training"
    unfit_for = {
        Mode.SEVERAL_PROCESSES: "gradients are added up in another order; leave launcher.processes_per_run=1"
    }

    @property
    def exact(self) -> bool:
        """Return whether every sum is exact or computed in a fixed order, which holds under verity."""
        return self.name == "verity"
