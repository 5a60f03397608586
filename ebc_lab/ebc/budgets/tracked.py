"""The budget `tracked`: predict the KL from step to step, and correct that by what is measured.

x = ln(KL of the whole proposal / P) drifts slowly, P being what the KL is roughly proportional to; a Kalman
filter follows it (docs/method.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ..flat import joint_norm
from ..options import DRIFT, LEAST_COSINE, SURPRISE, TOKEN_NOISE
from ..parallel.shards import local
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
    """What is known of x: the filter's mean and variance, float64 both.

    With a variance of NaN, `log_ratio` is no measurement but an upper bound, or NaN, and the next measurement
    is believed in full.
    """

    log_ratio: Tensor
    variance: Tensor

    @cached_property
    def known(self) -> Tensor:
        """Whether x was measured, bool."""
        return self.variance > 0

    def later(self) -> Track:
        """Return the track one step on: x may have drifted."""
        return Track(self.log_ratio, self.variance + DRIFT)

    def innovation(self, seen: Tensor) -> Tensor:
        """Return by how much a measured x exceeds this one; NaN where there is none to compare with."""
        return torch.where(self.known, seen - self.log_ratio, math.nan)

    def measured(self, seen: Tensor, noise: Tensor | float) -> Track:
        """Return the track after a measurement of x, `seen`, whose variance is `noise`.

        One that contradicts a factor of ten or more is believed in full: the filter starts again from it.
        """
        innovation = seen - self.log_ratio
        starts = ~(self.known & (innovation.abs() < SURPRISE))
        gain = torch.where(starts, 1.0, self.variance / (self.variance + noise))
        return Track(torch.where(starts, seen, self.log_ratio + gain * innovation), gain * noise)


class Tracked(Measured):
    """c = min(1, sqrt(delta/(P·e^x))), with x predicted at every step and measured where that is due."""

    initial: ClassVar[dict[str, float]] = {**Measured.initial, "log_ratio": math.nan, "variance": math.nan}
    log_ratio: Tensor  # x
    variance: Tensor  # and its variance

    def find_c(self, stats: StepStats, proposal: Proposal) -> Tensor:
        assert stats.delta is not None
        scale = self._scale(stats, proposal)
        usable = (scale > 0) & (scale < math.inf)
        # predict: x may have drifted since the last step
        prior = Track(self.log_ratio, self.variance).later()
        known = usable & prior.known
        expected = (stats.delta / (scale * prior.log_ratio.exp())).sqrt().clamp(max=1.0)  # NaN without an x
        if self.measures_kl(proposal.t):
            # measure at the c that is expected, and correct the prediction
            trial = torch.where(known & (expected > 0), expected, self.trial)
            after, c = self._corrected(stats, proposal, prior, torch.where(usable, scale, 0.0), trial)
        else:
            after = prior
            c = torch.where(known | (usable & (expected < self.trial)), expected, self.trial)
            self.carry("trial", c, proposal, c > 0)
        self.carry("log_ratio", after.log_ratio, proposal, usable)
        self.carry("variance", after.variance, proposal, usable)
        stats.tracked_scale = scale
        stats.tracked_log_ratio = self.log_ratio.clone()
        stats.tracked_variance = self.variance.clone()
        return c

    def _scale(self, stats: StepStats, proposal: Proposal) -> Tensor:
        """Return P of what c scales."""
        gradients = [None if p.grad is None else local(p.grad) for p in proposal.weights]
        fall, norm = proposal.fall_and_norm(gradients)
        grad_norm = stats.grad_norm
        if len(proposal.scaled) < len(gradients):
            scaled = [g for i in proposal.scaled if (g := gradients[i]) is not None]
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
            tracked = scale * believed[-1].log_ratio.exp()
            return (delta / torch.where(tracked > 0, tracked, whole)).sqrt()

        result = self.search(stats, proposal, trial, believe)
        low = result.kl < self.floor
        unknown = low | result.skipped
        most = seen[-1] - noise / 2  # what was seen of a KL below the floor is the floor
        log_ratio = torch.where(low, most, believed[-1].log_ratio)
        log_ratio = torch.where(result.skipped, prior.log_ratio, log_ratio)
        stats.innovation = torch.where(unknown, math.nan, prior.innovation(seen[-1]))
        after = Track(log_ratio, torch.where(unknown, math.nan, believed[-1].variance))
        return after, result.c
