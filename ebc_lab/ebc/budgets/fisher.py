"""The budget `fisher`: c from q, the KL of the whole proposal to second order (docs/method.md).

Wu et al., arXiv:1708.05144, scale a step of K-FAC by the same rule, with K-FAC's approximation of q.
"""

from __future__ import annotations

from typing import ClassVar

from ..proposal import Proposal
from ..scalars import Number, root
from ..step import StepStats
from .budget import Budget, Need
from .surrogate import clip_coefficient


class Fisher(Budget):
    """c = min(1, sqrt(delta/q)), with one derivative along the proposal at every step."""

    need: ClassVar[Need] = Need.DERIVATIVES

    def predicts(self, stats: StepStats) -> bool:
        return True

    def find_c(self, stats: StepStats, proposal: Proposal) -> Number:
        assert stats.delta is not None
        assert stats.predicted_kl is not None
        return clip_coefficient(root(stats.delta), root(stats.predicted_kl))
