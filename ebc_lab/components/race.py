"""A run that ends where its loss is above its bound: what it would still become has no chance to win.

Races: Maron & Moore 1993. Successive halving, which stops a fixed share instead: Jamieson & Talwalkar,
arXiv:1502.07943.
"""

from __future__ import annotations

from ebc_lab.config.parts.race import RaceConfig
from ebc_lab.config.schema import RunConfig

from .hook import Built, Hook


class Race(Hook):
    """Compares each evaluation with the bound for its step."""

    part = RaceConfig

    def __init__(self, run: RunConfig, built: Built):
        self.above = {int(step): loss for step, loss in RaceConfig.from_run(run).above.items()}

    def ends(self, step: int, loss: float) -> str | None:
        """Say by how much the loss after so many steps is above the bound; None where it is not."""
        bound = self.above.get(step)
        if bound is None or not loss > bound:  # NaN is for the rules of divergence
            return None
        return f"at step {step} its loss, {loss:.4f}, was above {bound:.4f}: it could not win any more"


HOOK = Race
