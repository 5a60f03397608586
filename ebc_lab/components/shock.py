"""One disturbance at one step, to see how a stabilizer recovers: wrong labels, a rate spike, a bad gradient.

Each is a function of the run's seed alone, so that paired runs get the same one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ebc_lab.config.parts.shock import RECOVERY_WINDOW, SHOCK_WINDOW, ShockConfig
from ebc_lab.config.schema import RunConfig

from .hook import Built, Hook


class Shock(Hook):
    """The run's shock at its step, and nothing at all others."""

    part = ShockConfig

    def __init__(self, run: RunConfig, built: Built):
        shock = ShockConfig.from_run(run)
        self.kind = shock.name
        self.size = shock.size
        self.step = run.steps // 2 if shock.step is None else shock.step
        self.seed = run.seed
        self.model = built.model
        self.vocabulary = built.vocabulary

    def event_at(self, t: int) -> bool:
        return t == self.step

    def _strikes(self, t: int, kind: str) -> bool:
        return t == self.step and kind == self.kind

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 0x5EED)

    def rate(self, t: int, lr: float) -> float:
        """Return the scheduled rate, or `size` times it."""
        return lr * self.size if self._strikes(t, "lr_spike") else lr

    def targets(self, t: int, targets: Tensor) -> Tensor:
        """Return targets, or the same with a share `size` of them drawn uniformly from the vocabulary."""
        if not self._strikes(t, "label_noise"):
            return targets
        draw = self._generator()
        wrong = torch.randint(self.vocabulary, targets.shape, generator=draw).to(targets)
        chosen = (torch.rand(targets.shape, generator=draw) < self.size).to(targets.device)
        return torch.where(chosen, wrong, targets)

    def gradients(self, t: int, loss: Tensor, lr: float) -> dict[str, Tensor]:
        """Add Gaussian noise of `size` times the gradient's own norm to the gradient, in place."""
        if self._strikes(t, "corrupt_gradient"):
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            draw = self._generator()
            noise = [torch.randn(g.shape, generator=draw).to(g) for g in gradients]
            scale = self.size * get_total_norm(gradients) / get_total_norm(noise)
            torch._foreach_add_(gradients, [n * scale for n in noise])
        return {}

    def summary(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return how far the loss rose, and how long it took to recover."""
        return recovery(columns["loss"], self.step)


HOOK = Shock


def recovery(losses: np.ndarray, shock: int) -> dict[str, Any]:
    """What a disturbance at step `shock` did to the training loss, and how long that lasted.

    `shock_peak`: how far the mean of any 10 later steps rose above the mean of the 20 steps before the shock.
    `shock_recovery_steps`: steps until such a mean is back within two standard errors, None if it never is.
    """
    before = losses[max(0, shock - SHOCK_WINDOW) : shock]
    after = losses[shock + 1 :]
    if len(before) < 2 or len(after) < RECOVERY_WINDOW:
        return {"shock_peak": None, "shock_recovery_steps": None}
    means = np.convolve(after, np.full(RECOVERY_WINDOW, 1 / RECOVERY_WINDOW), mode="valid")
    level = before.mean()
    error = before.std(ddof=1) / math.sqrt(RECOVERY_WINDOW)
    back = np.flatnonzero(means <= level + 2 * error)
    return {
        "shock_peak": float(means.max() - level),
        "shock_recovery_steps": int(back[0]) if len(back) else None,
    }
