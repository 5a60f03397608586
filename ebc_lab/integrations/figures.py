"""What trainers log of EBC's steps."""

from __future__ import annotations

from torch import Tensor

from ebc_lab.ebc import StepStats


class Figures:
    """The numbers of the last step, and of the last audit, which few steps have."""

    def __init__(self) -> None:
        self._stats: StepStats | None = None
        self._applied_kl: Tensor | None = None

    def see(self, stats: StepStats | None) -> None:
        """After every step; reads nothing on the host."""
        self._stats = stats
        if stats is not None and stats.applied_kl is not None:
            self._applied_kl = stats.applied_kl

    def values(self) -> dict[str, Tensor]:
        """0-dim tensors: `ebc/c`; `ebc/delta` (nats per token) unless the target is infinite; from the first
        audit on, `ebc/applied_kl` (nats per token); beside a radius, `ebc/ruled`, its number in
        `options.RULED`. Empty before the first step."""
        if self._stats is None:
            return {}
        figures = {
            "ebc/c": self._stats.clip_coefficient,
            "ebc/applied_kl": self._applied_kl,
            "ebc/delta": self._stats.delta,
            "ebc/ruled": self._stats.ruled,
        }
        return {name: value for name, value in figures.items() if value is not None}
