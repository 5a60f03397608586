"""The budget `surrogate`: c from the trust radius and the ellipsotope bound S (docs/method.md).

Since KL <= ||centre(dz)||^2 / 4, the trust radius in rms units is 2·sqrt(delta). Ellipsotopes: Kousik,
Dai & Gao, arXiv:2108.01750.
"""

from __future__ import annotations

import math
from typing import ClassVar

from ..proposal import Proposal
from ..scalars import Number, constant, is_finite, least, over, root, where
from ..step import StepStats
from .budget import Budget, Need


def trust_radius(delta: Number) -> Number:
    """Return tau = 2·sqrt(delta), logits per token in rms units (independent of the number of tokens)."""
    return 2 * root(delta)


def clip_coefficient(radius: Number, surrogate: Number) -> Number:
    """Return c = min(1, radius/S); S = 0 gives 1, a non-finite S NaN (the caller skips the step)."""
    c = where(surrogate == 0, 1.0, least(over(radius, surrogate), 1.0))
    return where(is_finite(surrogate), c, math.nan)


class Surrogate(Budget):
    """c = min(1, g·tau/S), from the sensitivities of the groups; g is 1 in the method itself."""

    need: ClassVar[Need] = Need.DERIVATIVES
    bounded: ClassVar[bool] = True

    def guard_factor(self, proposal: Proposal, radius: Number) -> Number:
        """Return g, the factor on the trust radius. A subclass may lower it."""
        return constant(1.0, radius)

    def find_c(self, stats: StepStats, proposal: Proposal) -> Number:
        assert stats.radius is not None
        assert stats.surrogate is not None
        stats.guard = self.guard_factor(proposal, stats.radius)
        return clip_coefficient(stats.guard * stats.radius, stats.surrogate)
