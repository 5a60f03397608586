"""`shadow_search`: c from the measured KL of trial steps, as `shadow` and `tracked` do (docs/method.md).

All numbers are 0-dim float64 tensors, so that one measurement reads nothing on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..proposal import Proposal
from ..step import StepStats
from .budget import Budget, Need

Scale = Callable[[Tensor, Tensor], Tensor]  # (a KL, the trial scale of it) -> c, before its limit 1


@dataclass(frozen=True)
class ShadowResult:
    """What a shadow search has settled on.

    `c` is NaN where `skipped`; `trial` and `kl` are the last trial scale and the KL measured there.
    """

    c: Tensor
    next_trial: Tensor
    skipped: Tensor  # bool
    trial: Tensor
    kl: Tensor
    measurements: int


def shadow_search(
    measure: Callable[[Tensor], Tensor],
    delta: Tensor,
    trial: Tensor,
    *,
    measurements: int,
    floor: float,
    ratio: float = 1.5,
    stretch: float = math.inf,
    most: Tensor | float = 1.0,
    scale: Scale | None = None,
    root: Callable[[Tensor], Tensor] = torch.sqrt,
) -> ShadowResult:
    """Find c such that the measured KL of c·dW is delta.

    A KL below the floor shows nothing: accept the trial and try ten times as much next. Not finite: give up a
    factor of ten.

    Args:
        measure: trial scale -> KL of that part of the update, nats per token; both 0-dim.
        delta: the budget, nats per token.
        trial: the first scale to try, in (0, 1].
        measurements: how many are allowed; with one, the search itself reads no value on the host.
        floor: the smallest KL that means anything in the arithmetic at hand.
        ratio: measure again while c/trial lies outside [1/ratio, ratio] and a measurement is left.
        stretch: c is at most this many times the trial: KL grows as c² near it, and as anything far beyond.
        most: the largest c, and the largest scale to try; a radius may make it smaller than 1.
        scale: what c a measurement stands for. Default: KL grows as c², so a KL of `kl` at `trial` puts delta
            at trial·sqrt(delta/kl).
        root: computes that root.
    """
    scale = scale or (lambda kl, trial: trial * root(delta / kl))
    used = 0
    while True:
        kl = measure(trial).double()
        used += 1
        sound = torch.isfinite(kl)
        kl = kl.clamp(min=0.0)  # a float32 forward cannot resolve KLs below ~1e-7: rounding may make them < 0
        low = sound & (kl < floor)
        scaled = scale(kl.clamp(min=floor), trial).clamp(max=most)
        skipped = ~sound
        c = torch.where(low & (delta > 0), trial, scaled.masked_fill(skipped, math.nan))
        # after a budget of 0, start from the last positive one
        positive = torch.where(scaled > 0, scaled, trial)
        following = torch.where(low, (10 * trial).clamp(max=most), torch.where(sound, positive, trial / 10))
        if used < measurements:
            off = (c > ratio * trial) | (c * ratio < trial)
            if skipped | (low & (trial < most)) | off:
                trial = following
                continue
        c = torch.minimum(c, stretch * trial)
        return ShadowResult(c, following, skipped, trial, kl, used)


class Measured(Budget):
    """A budget that measures the KL of trial steps, at every step or at one in `measure_every`."""

    need: ClassVar[Need] = Need.MEASUREMENT
    initial: ClassVar[dict[str, float]] = {"trial": 0.1}
    trial: Tensor  # the scale to try first

    def measures_kl(self, t: int) -> bool:
        """Whether a KL is measured at step `t`: one in `measure_every`, and audits see both kinds alike."""
        s = self.settings
        shifted = t // math.lcm(s.measure_every, self.audit_every or 1)
        return t < s.settling or (t + shifted) % s.measure_every == 0

    def search(
        self, stats: StepStats, proposal: Proposal, trial: Tensor, scale: Scale | None = None
    ) -> ShadowResult:
        """Measure the KL of trial steps, `trial` first, and record it; for the rest see `shadow_search`."""
        assert stats.delta is not None
        most = 1.0 if stats.ceiling is None else stats.ceiling
        result = shadow_search(
            lambda trial: proposal.kl(trial, proposal.batch.probe),
            stats.delta,
            trial if stats.ceiling is None else trial.clamp(max=most),
            measurements=self.settings.measurements if self.settings.refines(proposal.t) else 1,
            floor=self.floor,
            stretch=self.settings.stretch or math.inf,
            most=most,
            scale=scale,
            root=proposal.arithmetic.sqrt,
        )
        stats.trial = result.trial
        stats.trial_kl = result.kl
        stats.measurements = result.measurements
        self.carry("trial", result.next_trial, proposal, result.next_trial > 0)
        return result
