"""The budget `calibrated`: KL predicted as k·S², with k fitted to q at every probe (docs/method.md)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from ..proposal import Proposal
from ..step import StepStats
from .budget import Budget, Need
from .surrogate import clip_coefficient


def fitted_log_k(log_k: Tensor, predicted_kl: Tensor, surrogate: Tensor) -> Tensor:
    """Return ln k: ln(q/S²) at the first probe (`log_k` NaN), half-way to it at later ones. 0-dim.

    A probe without a finite, positive q and S changes nothing.
    """
    observed = (predicted_kl / surrogate.square()).log()
    moved = torch.where(log_k.isnan(), observed, log_k + 0.5 * (observed - log_k))
    return torch.where(observed.isfinite(), moved, log_k)


class Calibrated(Budget):
    """c = min(1, sqrt(delta/(k·S²))); q is predicted where sensitivities have just been measured."""

    need: ClassVar[Need] = Need.DERIVATIVES
    bounded: ClassVar[bool] = True
    initial: ClassVar[dict[str, float]] = {"log_k": math.nan}
    log_k: Tensor

    def predicts(self, stats: StepStats) -> bool:
        return stats.sensitivities is not None

    def find_c(self, stats: StepStats, proposal: Proposal) -> Tensor:
        assert stats.delta is not None
        assert stats.surrogate is not None
        if self.predicts(stats):
            assert stats.predicted_kl is not None
            self.log_k.copy_(fitted_log_k(self.log_k, stats.predicted_kl, stats.surrogate))
        # before the first probe: the bound, KL <= S²/4
        stats.calibration = self.log_k.nan_to_num(math.log(0.25)).exp()
        return clip_coefficient(stats.delta.sqrt(), stats.calibration.sqrt() * stats.surrogate)
