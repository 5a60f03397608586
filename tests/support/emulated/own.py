"""Parts of a user's own, written as anybody would who does not think of CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ebc_lab.ebc import Proposal, StabilizedOptimizer, StepStats


def model(vocabulary: int, context: int) -> nn.Module:
    return nn.Sequential(
        nn.Embedding(vocabulary, 16), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, vocabulary)
    )


def optimizer(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def schedule(step: int, steps: int) -> float:
    return 1 - step / steps


class HalfAfterTen(StabilizedOptimizer):
    """Halves updates after ten steps, by a number that it counts in Python."""

    keeps_old = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.steps = 0

    def _limit_update(self, stats: StepStats, proposal: Proposal) -> None:
        self.steps += 1
        self._apply(stats, proposal, self._share(stats.clip_coefficient))

    def _share(self, like: Tensor) -> Tensor:
        return torch.tensor(1.0 if self.steps <= 10 else 0.5)

    def _own_state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
