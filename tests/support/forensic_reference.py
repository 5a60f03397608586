"""The mistakes of the earlier study as a slow plain transcription, on top of `support.ebc_reference`."""

import math
from dataclasses import dataclass

from support.ebc_reference import ReferenceClip


@dataclass
class ForensicReference(ReferenceClip):
    guard: str = "none"
    units: str = "logits"

    def __post_init__(self):
        super().__post_init__()
        self.ema = None
        self.log_g = 0.0
        self.last_audit = 0

    def _guard_factor(self):
        return math.exp(self.log_g)

    def _contribution(self, beta, norm):
        return beta * norm / (self._lr() if self.units == "per_lr" else 1.0)

    def _weight(self, n):
        return (0.05, n >= 2) if self.cadence == "published" else super()._weight(n)

    def _due(self, t):
        if self.cadence != "published":
            return super()._due(t)
        count = len(self.groups)
        if t % 200 == 0:
            return set(range(count))
        first = 2 * (t // 20 - 1)
        return {first % count, (first + 1) % count} if t % 20 == 0 else set()

    def _control(self, done, proposal, t):
        if self.guard != "none":
            self.log_g *= 0.5 ** ((t - self.last_audit) / 200)
            self.last_audit = t
            rho = done.guard * done.tightness  # by how much S still under-estimates: T/tau on a clipped step
            if self.guard == "shrink_published":
                rho = done.T / (done.c * done.S) if done.c * done.S else math.nan
            if 1 < rho < math.inf:
                self.log_g -= math.log(rho)
                if self.guard == "shrink_inflate":
                    self.beta = [None if beta is None else rho * beta for beta in self.beta]
        if self.controller != "pi":
            super()._control(done, proposal, t)
            return
        error = done.target - done.applied_kl
        weight = 1 - 0.5 ** (self.audit_every / 250)
        self.ema = error if self.ema is None else self.ema + weight * (error - self.ema)
        self.delta = min(0.30, max(0.01, self.delta * math.exp(0.15 * error + 0.02 * self.ema)))
