"""The budget `lagged`: c before backward, from the KLs of earlier steps (docs/method.md)."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from ..logits import mean_kl
from ..proposal import Proposal
from ..scalars import Number
from ..step import StepStats
from .budget import Budget, Need

FIRST_C = 0.1
RISE = 3.0  # by which c rises from one step to the next, at most
FALL = 10.0  # by which it falls after a KL that is not finite
MEMORY = 0.5  # of the running mean of ln k


class Lagged(Budget):
    """The KL of c·dW is taken to grow with (c·lr)² as it did lately; it bounds nothing at the step itself.

    `choose_c` comes before backward. `find_c`, once the weights have moved, measures the KL of the step on
    the probe rows and averages ln(KL/(c·lr)²) half-way with what was known.
    """

    need: ClassVar[Need] = Need.NOTHING
    initial: ClassVar[dict[str, float]] = {"trial": FIRST_C, "log_k": math.nan}
    trial: Tensor  # the last c
    log_k: Tensor  # ln(KL/(c·lr)²)
    c = 1.0  # of the step that has begun
    rate = 0.0  # its learning rate

    def choose_c(self, t: int, delta: float, rate: float) -> float:
        """Return c of step `t`, at most three times the last one; while nothing is known, the first."""
        self.rate = rate
        log_k = float(self.log_k)
        if not self.settings.limits(t):
            self.c = 1.0
        elif not math.isfinite(log_k):
            self.c = float(self.trial)
        else:
            reach = math.sqrt(delta * math.exp(-log_k)) / rate if rate else math.inf
            self.c = min(1.0, reach, RISE * float(self.trial))
        return self.c

    def find_c(self, stats: StepStats, proposal: Proposal) -> Number:
        if not self.settings.limits(proposal.t):
            return self.c
        rows = proposal.batch.probe
        kl = float(mean_kl(rows.z, proposal.batch.logits(rows.inputs), rows.mask))
        stats.trial = self.c
        stats.trial_kl = kl
        stats.measurements = 1
        moved = self.c * self.rate
        if not math.isfinite(kl):
            self.trial.fill_(self.c / FALL / (RISE if self.log_k.isfinite() else 1))
        elif moved:
            observed = math.log(max(kl, self.floor) / moved**2)
            known = float(self.log_k)
            self.log_k.fill_(MEMORY * known + (1 - MEMORY) * observed if math.isfinite(known) else observed)
            self.trial.fill_(self.c)
        return self.c
