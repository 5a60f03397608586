"""The budget `surrogate`: c from the trust radius and the ellipsotope bound S (docs/method.md).

Since KL <= ||centre(dz)||^2 / 4, the trust radius in rms units is 2·sqrt(delta). Ellipsotopes: Kousik,
Dai & Gao, arXiv:2108.01750.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ..proposal import Proposal
from ..step import StepStats
from .budget import Budget, Need


def trust_radius(delta: Tensor | float, sqrt: Callable[[Tensor], Tensor] = torch.sqrt) -> Tensor:
    """Return tau = 2·sqrt(delta), logits per token in rms units (independent of the number of tokens)."""
    return 2 * sqrt(torch.as_tensor(delta))


def clip_coefficient(radius: Tensor | float, surrogate: Tensor | float) -> Tensor:
    """Return c = min(1, radius/S), 0-dim; S = 0 gives 1, a non-finite S NaN (the caller skips the step)."""
    surrogate = torch.as_tensor(surrogate)
    c = torch.where(surrogate == 0, 1.0, (torch.as_tensor(radius).to(surrogate) / surrogate).clamp(max=1.0))
    return torch.where(torch.isfinite(surrogate), c, math.nan)


class Surrogate(Budget):
    """c = min(1, g·tau/S), from the sensitivities of the groups; g is 1 in the method itself."""

    need: ClassVar[Need] = Need.DERIVATIVES
    bounded: ClassVar[bool] = True

    def guard_factor(self, radius: Tensor) -> Tensor:
        """Return g, the factor on the trust radius. A subclass may lower it."""
        return torch.ones_like(radius)

    def find_c(self, stats: StepStats, proposal: Proposal) -> Tensor:
        assert stats.radius is not None
        assert stats.surrogate is not None
        stats.guard = self.guard_factor(stats.radius)
        return clip_coefficient(stats.guard * stats.radius, stats.surrogate)
