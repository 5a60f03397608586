"""The budget `tracked`: predict the KL from step to step, and correct that by what is measured.

ln(KL of the whole proposal / P), P being what the KL is roughly proportional to, drifts slowly and flickers
about that from step to step; a Kalman filter (Kalman 1960) follows its slow part x (docs/method.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..flat import joint_norm
from ..options import (
    DITHER,
    DRIFT,
    EARLY_DRIFT,
    FLICKER,
    FLICKER_RATE,
    LEAST_COSINE,
    REACH,
    SETTLING,
    SURPRISE,
    TOKEN_NOISE,
)
from ..proposal import Proposal
from ..scalars import Flag, Number, exp, is_finite, least, log, most, over, root, where
from ..step import StepStats
from .measured import Measured

TRACKED = ("log_ratio", "variance", "flicker")  # what is carried from step to step


def proposal_scale(fall: Number, grad_norm: Number, norm: Number) -> Number:
    """Return P = max(u, 0.05·||g||·n)·n of a proposal, which its KL is roughly proportional to.

    Args:
        fall: u = -<g, dW>, the promised fall of the loss, nats per token; g is the batch's gradient at W.
        grad_norm: ||g||, and `norm` n = ||dW||, both over the weights that c scales.
    """
    return most(fall, LEAST_COSINE * grad_norm * norm) * norm  # NaN if any of them is


@dataclass(frozen=True)
class Track:
    """What is known of x: the filter's mean and variance, and the variance of the flicker.

    With a variance of NaN, `log_ratio` is no measurement but an upper bound, or NaN, and the next measurement
    is believed in full. `here` is by how much this step's own ln(KL/P) is taken to lie above x.
    """

    log_ratio: Number
    variance: Number
    flicker: Number
    here: Number = 0.0

    @property
    def known(self) -> Flag:
        """Whether x was measured."""
        return self.variance > 0

    def later(self, drift: float) -> Track:
        """Return the track one step on: x may have drifted."""
        return Track(self.log_ratio, self.variance + drift, self.flicker)

    def innovation(self, seen: Number) -> Number:
        """Return by how much a measurement exceeds x; NaN where there is no x to compare with."""
        return where(self.known, seen - self.log_ratio, math.nan)

    def measured(self, seen: Number, noise: Number) -> Track:
        """Return the track after a measurement of this step's ln(KL/P), `seen`, whose variance is `noise`.

        One that lies too far off for drift, flicker and noise shows a jump of x, and is believed nearly in
        full. Where x was not known it starts from it.
        """
        known = self.known
        off = where(known, seen - self.log_ratio, 0.0)
        square = off * off
        expected = self.variance + self.flicker + noise  # of off²
        highest = SURPRISE**2 * expected
        jump = where(square > highest, square - expected, 0.0)
        gain = where(known, over(self.variance + jump, expected + jump), 1.0)
        share = where(known, over(self.flicker, expected + jump), 0.0)
        surplus = where(known, least(square, highest) - expected, 0.0)
        return Track(
            where(known, self.log_ratio + gain * off, seen),
            gain * (self.flicker + noise),
            most(self.flicker + FLICKER_RATE * surplus, 0.0),
            share * off,
        )


class Tracked(Measured):
    """c = min(1, sqrt(delta/(P·e^x))), with x predicted at every step and measured where that is due."""

    reads_gradients = True
    initial: ClassVar[dict[str, float]] = {
        **Measured.initial,
        "log_ratio": math.nan,
        "variance": math.nan,
        "flicker": FLICKER,
    }
    log_ratio: Tensor  # x
    variance: Tensor  # and its variance
    flicker: Tensor  # the variance of ln(KL/P) about x

    def measures_kl(self, t: int) -> bool:
        """Whether a KL is measured at step `t`; `when_needed` asks how sure the prediction is, on the host.

        One measurement after each audit, each time a step later, keeps audits from meeting the same step
        after a measurement again and again.
        """
        s = self.settings
        if s.measure == "every" or t < s.settling:
            return super().measures_kl(t)
        every = self.audit_every
        if every and t % every == 1 + (t // every) % min(DITHER, max(1, every - 1)):
            return True
        sure = float(self.variance + self.flicker) + DRIFT <= s.measure_above**2  # NaN: not at all
        return not sure

    def find_c(self, stats: StepStats, proposal: Proposal) -> Number:
        assert stats.delta is not None
        scale = self._scale(stats, proposal)
        usable = (scale > 0) & (scale < math.inf)
        # predict: x may have drifted since the last step
        drift = EARLY_DRIFT if proposal.t < SETTLING else DRIFT
        prior = self._track(proposal).later(drift)
        known = usable & prior.known
        highest = 1.0 if stats.ceiling is None else stats.ceiling
        # NaN without an x
        expected = least(root(over(stats.delta, scale * exp(prior.log_ratio))), highest)
        trial = self.known("trial", proposal)
        if self.measures_kl(proposal.t) and self._may_rule(stats, proposal, prior, scale):
            # measure at the c that is expected, and correct the prediction
            trial = where(known & (expected > 0), expected, trial)
            after, c = self._corrected(stats, proposal, prior, where(usable, scale, 0.0), trial)
        else:
            after = prior
            allowed = least(trial, highest)
            c = where(known | (usable & (expected < allowed)), expected, allowed)
            self.carry("trial", c, proposal, c > 0)
        self._keep(after, proposal, usable, usable & is_finite(after.flicker))
        stats.tracked_scale = scale
        track = self._track(proposal)
        stats.tracked_log_ratio = track.log_ratio
        stats.tracked_variance = track.variance
        stats.tracked_flicker = track.flicker
        return c

    def _track(self, proposal: Proposal) -> Track:
        return Track(*(self.known(name, proposal) for name in TRACKED))

    def _keep(self, track: Track, proposal: Proposal, usable: Flag, flicker_usable: Flag) -> None:
        for name, may in zip(TRACKED, (usable, usable, flicker_usable), strict=True):
            self.carry(name, getattr(track, name), proposal, may)

    def _may_rule(self, stats: StepStats, proposal: Proposal, prior: Track, scale: Number) -> bool:
        """Whether the KL may be what limits this step, and not the radius, as far as the track can tell; with
        measure="when_needed" alone, which may read on the host."""
        s = self.settings
        if stats.ceiling is None or s.measure == "every" or proposal.t < s.settling:
            return True
        assert stats.delta is not None
        kl_there = log(scale * stats.ceiling * stats.ceiling) + prior.log_ratio  # ln, where the radius ends
        unsure = root(prior.variance + prior.flicker)  # NaN where x is not known
        return not bool(kl_there + REACH * unsure < log(stats.delta))

    def audited(self, stats: StepStats, proposal: Proposal) -> None:
        """Beside a radius: take the audit's KL for a measurement of a step that has none. Those tokens had no
        part in c, and the step is over; it keeps the track alive while the KL need not be measured."""
        made = stats.ceiling is None or self.settings.measure == "every" or stats.measurements > 0
        if made or len(proposal.scaled) < len(proposal.weights):  # an audit sees what moves freely, too
            return
        assert stats.applied_kl is not None
        assert stats.tracked_scale is not None
        kl, c = stats.applied_kl, stats.clip_coefficient
        noise = TOKEN_NOISE / max(1, stats.audit_tokens)
        seen = log(over(over(kl, c * c), stats.tracked_scale)) + noise / 2
        after = self._track(proposal).measured(seen, noise)
        usable = (kl >= self.floor) & is_finite(seen) & is_finite(after.log_ratio + after.variance)
        self._keep(after, proposal, usable, usable & is_finite(after.flicker))

    def _scale(self, stats: StepStats, proposal: Proposal) -> Number:
        """Return P of what c scales."""
        fall, norm = proposal.fall_and_norm()
        grad_norm = stats.grad_norm
        if len(proposal.scaled) < len(proposal.weights):
            scaled = [g for i in proposal.scaled if (g := proposal.gradients[i]) is not None]
            grad_norm = proposal.workers.joined_norm(joint_norm(scaled))
        return proposal_scale(fall, proposal.number(grad_norm), norm)

    def _corrected(
        self, stats: StepStats, proposal: Proposal, prior: Track, scale: Number, trial: Number
    ) -> tuple[Track, Number]:
        """Measure at `trial` -> what is known then, and c; repeated measurements all start from `prior`."""
        delta = stats.delta
        assert delta is not None
        tokens = proposal.batch.probe_tokens(proposal.workers)
        noise = TOKEN_NOISE / (proposal.number(tokens) if isinstance(tokens, Tensor) else tokens)
        seen: list[Number] = []  # x, by each measurement
        believed: list[Track] = []

        def believe(kl: Number, trial: Number) -> Number:
            whole = over(kl, trial * trial)
            seen.append(log(over(whole, scale)) + noise / 2)  # a noisy mean's log lies low by that
            believed.append(prior.measured(seen[-1], noise))
            tracked = scale * exp(believed[-1].log_ratio + believed[-1].here)
            return root(over(delta, where(tracked > 0, tracked, whole)))

        result = self.search(stats, proposal, trial, believe)
        low = result.kl < self.floor
        unknown = low | result.skipped
        highest = seen[-1] - noise / 2  # what was seen of a KL below the floor is the floor
        log_ratio = where(low, highest, believed[-1].log_ratio)
        log_ratio = where(result.skipped, prior.log_ratio, log_ratio)
        stats.innovation = where(unknown, math.nan, prior.innovation(seen[-1]))
        variance = where(unknown, math.nan, believed[-1].variance)
        after = Track(log_ratio, variance, where(unknown, prior.flicker, believed[-1].flicker))
        return after, result.c
