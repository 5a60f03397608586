"""The energy budget of `ebc_lab.ebc.energy` as a stabilizer of the lab."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ebc_lab.ebc import StepStats, energy_budget_clip, monitor_ebc_ratio
from ebc_lab.ebc.energy.record import RATIO, ActivationRecord, limit

from .rivals import Rival

__all__ = ["EnergyBudget", "energy_budget_clip", "monitor_ebc_ratio"]  # the last two: their place at first


class EnergyBudget(Rival):
    """At each step, each layer's joint gradient norm is at most `strength` times the norm of its output.

    Gradients and outputs share no unit: their ratio depends on the loss's scale. A layer whose output is
    exactly zero gets no gradient at all, so that a layer initialised to zero stays there. Layers as in
    `ActivationRecord`.

    Args:
        norm: of the output: `rms`, or `raw` as published, which grows with the square root of the number of
            tokens.
        common: `strength`, gradient norm over output norm, > 0, by default 0.1; others as in `Rival`.
    Raises:
        ValueError: strength <= 0 or an unknown norm.
    """

    default = RATIO

    def __init__(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        norm: str = "rms",
        **common: Any,
    ):
        super().__init__(model, optimizers, **common)
        self.record = ActivationRecord(model, norm, self.weights)

    def _weights_changed(self) -> None:
        raise ValueError("an energy budget watches the layers trained at its start: make a new one.")

    def _limit_gradients(self, stats: StepStats, gradients: list[Tensor]) -> None:
        reading = self.record.read()
        if reading is None:
            stats.gradient_scale = torch.ones_like(self._one)
            return
        self.record.tell_limitless(reading, reading.layers)
        factors = limit(reading, self.strength * reading.energies)
        total = torch.linalg.vector_norm(reading.norms)
        limited = torch.linalg.vector_norm(factors * reading.norms)
        stats.gradient_scale = torch.where(total > 0, limited / total, 1.0)
