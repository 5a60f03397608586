"""`Probe`: a stabilizer that limits nothing and asks, at some steps, how long the step could have been.

For docs/evidence/rate.yaml. At W + s·ΔW the loss of the rows that `budget.probe_sequences` names is measured
for s = 1, 2, 4 … (or 1, 1/2, 1/4 …) until it passes the loss at W: that s, interpolated in its logarithm, is
the critical share η_c/η, and 2/η_c the critical sharpness of Kalra et al., arXiv:2601.16979. The rows belong
to the batch of the step, so that its gradient points downhill on them.
"""

from __future__ import annotations

import math

import torch

from ebc_lab.components.stabilizers.rates import RateRival, loss_at
from ebc_lab.ebc import Proposal, StepStats

LAST = 49  # the last step of the first sixth of 300, from 0
FIRST = 22
EVERY = 3
OCTAVES = 8  # how far up or down s is followed


class Probe(RateRival):
    """Plain training. Of a measured step it records `trial`, the critical share s; `trial_kl`, the KL of the
    whole step on those rows, nats per token; `slope`, <gradient, ΔW>; and `agreement`, what the loss fell by
    over `slope`."""

    default = 1.0

    def _measures(self, t: int) -> bool:
        return FIRST <= t <= LAST and (LAST - t) % EVERY == 0

    def _limit_update(self, stats: StepStats, proposal: Proposal) -> None:
        if self._measures(proposal.t):
            here = float(proposal.batch.probe_loss(proposal.batch.probe.z))
            rise = loss_at(proposal, 1.0) - here
            stats.trial = torch.tensor(critical_share(proposal, here, rise), dtype=torch.float64)
            stats.trial_kl = proposal.kl(1.0, proposal.batch.probe)
            stats.slope = self._slope(proposal)
            stats.agreement = torch.tensor(rise, dtype=torch.float64) / stats.slope
        self._take(stats, proposal, 1.0)


def critical_share(proposal: Proposal, here: float, rise: float) -> float:
    """The s at which the loss at W + s·ΔW passes that at W; 2^±OCTAVES where it does not up to there."""
    up = rise <= 0  # also false where it is not finite
    s = 1.0
    for _ in range(OCTAVES):
        following = 2 * s if up else s / 2
        then = loss_at(proposal, following) - here
        if (then <= 0) != up:
            below, above = (rise, then) if up else (then, rise)
            part = -below / (above - below) if math.isfinite(above - below) and above > below else 0.5
            return min(s, following) * 2**part
        s, rise = following, then
    return s
