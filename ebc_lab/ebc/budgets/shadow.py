"""The budget `shadow`: measure the KL of a trial step instead of bounding it (docs/method.md).

The line search of Schulman et al., arXiv:1502.05477, measures it too, and shortens a step until it fits.

Where weights are quantized, KL grows as c^p with p below 2, and p can be measured at audits ("On a quantized
model").
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..options import EXPONENT_RANGE, EXPONENT_SPAN, EXPONENTS_KEPT
from ..proposal import Proposal
from ..scalars import Flag, Number, exp, is_finite, least, log, most, negated, over, root, where
from ..settings import ClipSettings
from ..step import StepStats
from .measured import Measured, Scale, ShadowResult
from .surrogate import clip_coefficient


def power_scale(delta: Number, exponent: Number) -> Scale:
    """Return the scale of a search where KL grows as c^p: trial·(delta/KL)^(1/p); if p is 2, the bits of the
    square root."""

    def scale(kl: Number, trial: Number) -> Number:
        ratio = over(delta, kl)
        return trial * where(exponent == 2, root(ratio), exp(log(ratio) / exponent))

    return scale


def exponent_between(kl: Number, kl_below: Number, floor: float) -> Number:
    """Return p between c and c/4, within [1, 2], from the KL at both in nats per token.

    2 where either KL is below the floor and so shows nothing; NaN where either is not finite.
    """
    low, high = EXPONENT_RANGE
    p = least(most(log(over(kl, kl_below)) / math.log(EXPONENT_SPAN), low), high)
    p = where((kl < floor) | (kl_below < floor), high, p)
    return where(is_finite(kl) & is_finite(kl_below), p, math.nan)


class ExponentEstimate:
    """The median of the last five observations of p, of as many as there are; 2 before the first."""

    def __init__(self, device: torch.device | str):
        # the latest first; NaN: not observed yet
        self.seen = torch.full((EXPONENTS_KEPT,), torch.nan, dtype=torch.float64, device=device)

    @property
    def value(self) -> Tensor:
        """p, 0-dim float64. Nothing is read on the host."""
        count = self.seen.isfinite().sum()
        ordered = self.seen.sort().values  # NaN last
        middle = torch.stack([(count - 1).clamp(min=0) // 2, count // 2])
        return torch.where(count > 0, ordered[middle].mean(), EXPONENT_RANGE[1])

    def observe(self, p: Number, usable: Flag) -> None:
        """Take one observation; one that is not `usable` or NaN changes nothing."""
        seen = self.seen.roll(1)
        seen[0] = p
        taken = torch.as_tensor(usable & is_finite(p), device=seen.device)
        self.seen.copy_(torch.where(taken, seen, self.seen))


class Shadow(Measured):
    """c = min(1, trial·sqrt(delta/KL)); between measurements, KL is taken to grow with ||dW||²."""

    initial: ClassVar[dict[str, float]] = {**Measured.initial, "kl_rate": 0.0}
    kl_rate: Tensor  # KL over ||c·dW||², as last measured

    def __init__(self, settings: ClipSettings, audit_every: int, device: torch.device):
        super().__init__(settings, audit_every, device)
        self.exponent = ExponentEstimate(device) if settings.exponent == "auto" else None

    def find_c(self, stats: StepStats, proposal: Proposal) -> Number:
        assert stats.delta is not None
        if self.measures_kl(proposal.t):
            return self._measured_c(stats, proposal)
        # carried on: the last measured KL for each unit of ||dW||²
        norm = proposal.length
        c = clip_coefficient(root(stats.delta), root(self.known("kl_rate", proposal) * norm * norm))
        self.carry("trial", c, proposal, c > 0)
        return c

    def _measured_c(self, stats: StepStats, proposal: Proposal) -> Number:
        scale = None
        if self.exponent is not None:
            assert stats.delta is not None
            stats.exponent = proposal.number(self.exponent.value)
            scale = power_scale(stats.delta, stats.exponent)
        result = self.search(stats, proposal, self.known("trial", proposal), scale)
        if self.settings.measure_every > 1:
            moved = result.trial * proposal.length
            rate = over(most(result.kl, self.floor), moved * moved)
            self.carry("kl_rate", rate, proposal, is_finite(rate))
        if self.exponent is not None and proposal.audited:
            self._observe_exponent(self.exponent, proposal, result)
        return result.c

    def _observe_exponent(self, exponent: ExponentEstimate, proposal: Proposal, result: ShadowResult) -> None:
        """Measure p between c and c/4, on the tokens of the audit."""
        c = where(result.skipped, 0.0, result.c)
        kl = proposal.kl(c, proposal.audit_rows)
        below = proposal.kl(c / EXPONENT_SPAN, proposal.audit_rows)
        p = exponent_between(kl, below, self.floor)
        exponent.observe(p, proposal.sound & negated(result.skipped))

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state if self.exponent is None else {**state, "exponent": {"seen": self.exponent.seen.clone()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.exponent is not None:
            self.exponent.seen.copy_(state["exponent"]["seen"])

    def to(self, device: torch.device) -> None:
        super().to(device)
        if self.exponent is not None:
            self.exponent.seen = self.exponent.seen.to(device)
