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
from ..settings import ClipSettings
from ..step import StepStats
from .measured import Measured, Scale, ShadowResult
from .surrogate import clip_coefficient


def power_scale(delta: Tensor, exponent: Tensor) -> Scale:
    """Return the scale of a search where KL grows as c^p: trial·(delta/KL)^(1/p); if p is 2, the bits of the
    square root."""

    def scale(kl: Tensor, trial: Tensor) -> Tensor:
        ratio = delta / kl
        return trial * torch.where(exponent == 2, ratio.sqrt(), (ratio.log() / exponent).exp())

    return scale


def exponent_between(kl: Tensor, kl_below: Tensor, floor: float) -> Tensor:
    """Return p between c and c/4, within [1, 2], from the KL at both in nats per token; 0-dim float64.

    2 where either KL is below the floor and so shows nothing; NaN where either is not finite.
    """
    kl = kl.double()
    kl_below = kl_below.double()
    p = ((kl / kl_below).log() / math.log(EXPONENT_SPAN)).clamp(*EXPONENT_RANGE)
    p = torch.where((kl < floor) | (kl_below < floor), EXPONENT_RANGE[1], p)
    return torch.where(kl.isfinite() & kl_below.isfinite(), p, torch.nan)


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

    def observe(self, p: Tensor, usable: Tensor) -> None:
        """Take one observation, 0-dim; one that is not `usable` (bool, 0-dim) or NaN changes nothing."""
        moved = torch.cat([p.reshape(1), self.seen[:-1]])
        self.seen.copy_(torch.where(usable & p.isfinite(), moved, self.seen))


class Shadow(Measured):
    """c = min(1, trial·sqrt(delta/KL)); between measurements, KL is taken to grow with ||dW||²."""

    initial: ClassVar[dict[str, float]] = {**Measured.initial, "kl_rate": 0.0}
    kl_rate: Tensor  # KL over ||c·dW||², as last measured

    def __init__(self, settings: ClipSettings, audit_every: int, device: torch.device):
        super().__init__(settings, audit_every, device)
        self.exponent = ExponentEstimate(device) if settings.exponent == "auto" else None

    def find_c(self, stats: StepStats, proposal: Proposal) -> Tensor:
        assert stats.delta is not None
        if self.measures_kl(proposal.t):
            return self._measured_c(stats, proposal)
        # carried on: the last measured KL for each unit of ||dW||²
        predicted = self.kl_rate * proposal.norm().square()
        c = clip_coefficient(stats.delta.sqrt(), predicted.sqrt())
        self.carry("trial", c, proposal, c > 0)
        return c

    def _measured_c(self, stats: StepStats, proposal: Proposal) -> Tensor:
        scale = None
        if self.exponent is not None:
            assert stats.delta is not None
            stats.exponent = self.exponent.value
            scale = power_scale(stats.delta, stats.exponent)
        result = self.search(stats, proposal, self.trial.clone(), scale)
        if self.settings.measure_every > 1:
            rate = result.kl.clamp(min=self.floor) / (result.trial * proposal.norm()).square()
            self.carry("kl_rate", rate, proposal, rate.isfinite())
        if self.exponent is not None and proposal.audited:
            self._observe_exponent(self.exponent, proposal, result)
        return result.c

    def _observe_exponent(self, exponent: ExponentEstimate, proposal: Proposal, result: ShadowResult) -> None:
        """Measure p between c and c/4, on the tokens of the audit."""
        c = result.c.nan_to_num()
        kl = proposal.kl(c, proposal.audit_rows)
        below = proposal.kl(c / EXPONENT_SPAN, proposal.audit_rows)
        exponent.observe(exponent_between(kl, below, self.floor), proposal.sound & ~result.skipped)

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
