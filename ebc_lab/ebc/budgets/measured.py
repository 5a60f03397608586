"""`shadow_search`: c from the measured KL of trial steps, as `shadow` and `tracked` do (docs/method.md).

Numbers are those of `scalars`; where they are tensors, one measurement reads nothing on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..proposal import Proposal
from ..scalars import Flag, Number, is_finite, least, most, negated, over, root, where
from ..step import StepStats
from .budget import Budget, Need

Scale = Callable[[Number, Number], Number]  # (a KL, the trial scale of it) -> c, before its limit 1


@dataclass(frozen=True)
class ShadowResult:
    """What a shadow search has settled on.

    `c` is NaN where `skipped`; `trial` and `kl` are the last trial scale and the KL measured there.
    """

    c: Number
    next_trial: Number
    skipped: Flag
    trial: Number
    kl: Number
    measurements: int


def shadow_search(
    measure: Callable[[Number], Number],
    delta: Number,
    trial: Number,
    *,
    measurements: int,
    floor: float,
    ratio: float = 1.5,
    stretch: float = math.inf,
    highest: Number = 1.0,
    scale: Scale | None = None,
) -> ShadowResult:
    """Find c such that the measured KL of c·dW is delta.

    A KL below the floor shows nothing: accept the trial and try ten times as much next. Not finite: give up a
    factor of ten.

    Args:
        measure: trial scale -> KL of that part of the update, nats per token.
        delta: the budget, nats per token.
        trial: the first scale to try, in (0, 1].
        measurements: how many are allowed; with one, the search itself asks for no value.
        floor: the smallest KL that means anything in the arithmetic at hand.
        ratio: measure again while c/trial lies outside [1/ratio, ratio] and a measurement is left.
        stretch: c is at most this many times the trial: KL grows as c² near it, and as anything far beyond.
        highest: the largest c, and the largest scale to try; a radius may make it smaller than 1.
        scale: what c a measurement stands for. Default: KL grows as c², so a KL of `kl` at `trial` puts delta
            at trial·sqrt(delta/kl).
    """
    scale = scale or (lambda kl, trial: trial * root(over(delta, kl)))
    used = 0
    while True:
        kl = measure(trial)
        used += 1
        sound = is_finite(kl)
        kl = most(kl, 0.0)  # a float32 forward cannot resolve KLs below ~1e-7: rounding may make them < 0
        low = sound & (kl < floor)
        scaled = least(scale(most(kl, floor), trial), highest)
        skipped = negated(sound)
        c = where(low & (delta > 0), trial, where(sound, scaled, math.nan))
        # after a budget of 0, start from the last positive one
        positive = where(scaled > 0, scaled, trial)
        following = where(low, least(10 * trial, highest), where(sound, positive, trial / 10))
        if used < measurements:
            off = (c > ratio * trial) | (c * ratio < trial)
            if skipped | (low & (trial < highest)) | off:
                trial = following
                continue
        c = least(c, stretch * trial)
        return ShadowResult(c, following, skipped, trial, kl, used)


class Measured(Budget):
    """A budget that measures the KL of trial steps, at every step or at one in `measure_every`."""

    need: ClassVar[Need] = Need.MEASUREMENT
    initial: ClassVar[dict[str, float]] = {"trial": 0.1}
    trial: Tensor  # the scale to try first

    def measures_kl(self, t: int) -> bool:
        """Whether a KL is measured at step `t`.

        It is at one step in `measure_every`, which moves on from audit to audit: these see both kinds alike.
        """
        s = self.settings
        shifted = t // math.lcm(s.measure_every, self.audit_every or 1)
        return t < s.settling or (t + shifted) % s.measure_every == 0

    def search(
        self, stats: StepStats, proposal: Proposal, trial: Number, scale: Scale | None = None
    ) -> ShadowResult:
        """Measure the KL of trial steps, `trial` first, and record it; for the rest see `shadow_search`."""
        assert stats.delta is not None
        highest = 1.0 if stats.ceiling is None else stats.ceiling
        result = shadow_search(
            lambda trial: proposal.kl(trial, proposal.batch.probe),
            stats.delta,
            least(trial, highest),
            measurements=self.settings.measurements if self.settings.refines(proposal.t) else 1,
            floor=self.floor,
            stretch=self.settings.stretch or math.inf,
            highest=highest,
            scale=scale,
        )
        stats.trial = result.trial
        stats.trial_kl = result.kl
        stats.measurements = result.measurements
        self.carry("trial", result.next_trial, proposal, result.next_trial > 0)
        return result
