"""The budget `tracked`: predict the KL from step to step, and correct that by what is measured.

ln(KL of the whole proposal / P), P being what the KL is roughly proportional to, drifts slowly and flickers
about that from step to step; a Kalman filter (Kalman 1960) follows its slow part x (docs/method.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
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
from ..step import StepStats
from .measured import Measured


def proposal_scale(fall: Tensor, grad_norm: Tensor, norm: Tensor) -> Tensor:
    """Return P = max(u, 0.05·||g||·n)·n of a proposal, which its KL is roughly proportional to.

    Args:
        fall: u = -<g, dW>, the promised fall of the loss, nats per token; g is the batch's gradient at W.
        grad_norm: ||g||, and `norm` n = ||dW||, both over the weights that c scales.
    """
    least = LEAST_COSINE * grad_norm * norm
    return torch.maximum(least, fall) * norm  # NaN if any of them is


@dataclass(frozen=True)
class Track:
    """What is known of x: the filter's mean and variance, and the variance of the flicker; float64 all.

    With a variance of NaN, `log_ratio` is no measurement but an upper bound, or NaN, and the next measurement
    is believed in full. `here` is by how much this step's own ln(KL/P) is taken to lie above x.
    """

    log_ratio: Tensor
    variance: Tensor
    flicker: Tensor
    here: Tensor | float = 0.0

    @cached_property
    def known(self) -> Tensor:
        """Whether x was measured, bool."""
        return self.variance > 0

    def later(self, drift: float) -> Track:
        """Return the track one step on: x may have drifted."""
        return Track(self.log_ratio, self.variance + drift, self.flicker)

    def innovation(self, seen: Tensor) -> Tensor:
        """Return by how much a measurement exceeds x; NaN where there is no x to compare with."""
        return torch.where(self.known, seen - self.log_ratio, math.nan)

    def measured(self, seen: Tensor, noise: Tensor | float) -> Track:
        """Return the track after a measurement of this step's ln(KL/P), `seen`, whose variance is `noise`.

        One that lies too far off for drift, flicker and noise shows a jump of x, and is believed nearly in
        full. Where x was not known it starts from it.
        """
        off = torch.where(self.known, seen - self.log_ratio, 0.0)
        expected = self.variance + self.flicker + noise  # of off²
        most = SURPRISE**2 * expected
        jump = torch.where(off.square() > most, off.square() - expected, 0.0)
        gain = torch.where(self.known, (self.variance + jump) / (expected + jump), 1.0)
        share = torch.where(self.known, self.flicker / (expected + jump), 0.0)
        surplus = torch.where(self.known, off.square().minimum(most) - expected, 0.0)
        return Track(
            torch.where(self.known, self.log_ratio + gain * off, seen),
            gain * (self.flicker + noise),
            (self.flicker + FLICKER_RATE * surplus).clamp(min=0.0),
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

    def find_c(self, stats: StepStats, proposal: Proposal) -> Tensor:
        assert stats.delta is not None
        scale = self._scale(stats, proposal)
        usable = (scale > 0) & (scale < math.inf)
        # predict: x may have drifted since the last step
        drift = EARLY_DRIFT if proposal.t < SETTLING else DRIFT
        prior = Track(self.log_ratio, self.variance, self.flicker).later(drift)
        known = usable & prior.known
        most = 1.0 if stats.ceiling is None else stats.ceiling
        expected = (stats.delta / (scale * prior.log_ratio.exp())).sqrt().clamp(max=most)  # NaN without an x
        if self.measures_kl(proposal.t) and self._may_rule(stats, proposal, prior, scale):
            # measure at the c that is expected, and correct the prediction
            trial = torch.where(known & (expected > 0), expected, self.trial)
            after, c = self._corrected(stats, proposal, prior, torch.where(usable, scale, 0.0), trial)
        else:
            after = prior
            allowed = self.trial if stats.ceiling is None else self.trial.clamp(max=most)
            c = torch.where(known | (usable & (expected < allowed)), expected, allowed)
            self.carry("trial", c, proposal, c > 0)
        self.carry("log_ratio", after.log_ratio, proposal, usable)
        self.carry("variance", after.variance, proposal, usable)
        self.carry("flicker", after.flicker, proposal, usable & after.flicker.isfinite())
        stats.tracked_scale = scale
        stats.tracked_log_ratio = self.log_ratio.clone()
        stats.tracked_variance = self.variance.clone()
        stats.tracked_flicker = self.flicker.clone()
        return c

    def _may_rule(self, stats: StepStats, proposal: Proposal, prior: Track, scale: Tensor) -> bool:
        """Whether the KL may be what limits this step, and not the radius, as far as the track can tell; with
        measure="when_needed" alone, which may read on the host."""
        s = self.settings
        if stats.ceiling is None or s.measure == "every" or proposal.t < s.settling:
            return True
        assert stats.delta is not None
        kl_there = (scale * stats.ceiling.square()).log() + prior.log_ratio  # ln, where the radius ends
        unsure = (prior.variance + prior.flicker).sqrt()  # NaN where x is not known
        return not bool(kl_there + REACH * unsure < stats.delta.log())

    def audited(self, stats: StepStats, proposal: Proposal) -> None:
        """Beside a radius: take the audit's KL for a measurement of a step that has none. Those tokens had no
        part in c, and the step is over; it keeps the track alive while the KL need not be measured."""
        made = stats.ceiling is None or self.settings.measure == "every" or stats.measurements > 0
        if made or len(proposal.scaled) < len(proposal.weights):  # an audit sees what moves freely, too
            return
        assert stats.applied_kl is not None
        assert stats.tracked_scale is not None
        kl = stats.applied_kl.double()
        noise = TOKEN_NOISE / max(1, stats.audit_tokens)
        whole = kl / stats.clip_coefficient.double().square()
        seen = (whole / stats.tracked_scale).log() + noise / 2
        after = Track(self.log_ratio, self.variance, self.flicker).measured(seen, noise)
        usable = (kl >= self.floor) & seen.isfinite()
        for name in ("log_ratio", "variance", "flicker"):
            value: Tensor = getattr(after, name)
            self.carry(name, value, proposal, usable & value.isfinite())

    def _scale(self, stats: StepStats, proposal: Proposal) -> Tensor:
        """Return P of what c scales."""
        fall, norm = proposal.fall_and_norm()
        grad_norm = stats.grad_norm
        if len(proposal.scaled) < len(proposal.weights):
            scaled = [g for i in proposal.scaled if (g := proposal.gradients[i]) is not None]
            grad_norm = proposal.workers.joined_norm(joint_norm(scaled))
        return proposal_scale(fall, grad_norm.double(), norm)

    def _corrected(
        self, stats: StepStats, proposal: Proposal, prior: Track, scale: Tensor, trial: Tensor
    ) -> tuple[Track, Tensor]:
        """Measure at `trial` -> what is known then, and c; repeated measurements all start from `prior`."""
        delta = stats.delta
        assert delta is not None
        noise = TOKEN_NOISE / proposal.batch.probe_tokens(proposal.workers)
        seen: list[Tensor] = []  # x, by each measurement
        believed: list[Track] = []

        def believe(kl: Tensor, trial: Tensor) -> Tensor:
            whole = kl / (trial * trial)
            seen.append((whole / scale).log() + noise / 2)  # a noisy mean's log lies low by that
            believed.append(prior.measured(seen[-1], noise))
            tracked = scale * (believed[-1].log_ratio + believed[-1].here).exp()
            return (delta / torch.where(tracked > 0, tracked, whole)).sqrt()

        result = self.search(stats, proposal, trial, believe)
        low = result.kl < self.floor
        unknown = low | result.skipped
        most = seen[-1] - noise / 2  # what was seen of a KL below the floor is the floor
        log_ratio = torch.where(low, most, believed[-1].log_ratio)
        log_ratio = torch.where(result.skipped, prior.log_ratio, log_ratio)
        stats.innovation = prior.innovation(seen[-1]).masked_fill(unknown, math.nan)
        variance = torch.where(unknown, math.nan, believed[-1].variance)
        after = Track(log_ratio, variance, torch.where(unknown, prior.flicker, believed[-1].flicker))
        return after, result.c
