"""The budget `calibrated`: KL predicted as k·S², with k fitted to q at every probe (docs/method.md)."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from ..proposal import Proposal
from ..scalars import Number, exp, is_finite, log, over, root, where
from ..step import StepStats
from .budget import Budget, Need
from .surrogate import clip_coefficient


def fitted_log_k(log_k: Number, predicted_kl: Number, surrogate: Number) -> Number:
    """Return ln k: ln(q/S²) at the first probe (`log_k` NaN), half-way to it at later ones.

    A probe without a finite, positive q and S changes nothing.
    """
    observed = log(over(predicted_kl, surrogate * surrogate))
    moved = where(log_k != log_k, observed, log_k + 0.5 * (observed - log_k))
    return where(is_finite(observed), moved, log_k)


class Calibrated(Budget):
    """c = min(1, sqrt(delta/(k·S²))); q is predicted where sensitivities have just been measured."""

    need: ClassVar[Need] = Need.DERIVATIVES
    bounded: ClassVar[bool] = True
    initial: ClassVar[dict[str, float]] = {"log_k": math.nan}
    log_k: Tensor

    def predicts(self, stats: StepStats) -> bool:
        return stats.sensitivities is not None

    def find_c(self, stats: StepStats, proposal: Proposal) -> Number:
        assert stats.delta is not None
        assert stats.surrogate is not None
        log_k = self.known("log_k", proposal)
        if self.predicts(stats):
            assert stats.predicted_kl is not None
            log_k = fitted_log_k(log_k, stats.predicted_kl, stats.surrogate)
            self.log_k.fill_(log_k)
        # before the first probe: the bound, KL <= S²/4
        stats.calibration = where(log_k == log_k, exp(log_k), 0.25)
        return clip_coefficient(root(stats.delta), root(stats.calibration) * stats.surrogate)
