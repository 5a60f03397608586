"""p, where KL ~ c^p around the c of a step: 2 on a float model, less where weights are quantized.

docs/method.md, "On a quantized model".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .options import EXPONENT_RANGE, EXPONENT_SPAN, EXPONENTS_KEPT
from .proposal import Proposal


def exponent_between(kl: Tensor, kl_below: Tensor, floor: float) -> Tensor:
    """p between c and c/4, within [1, 2], from the KL at both in nats per token; 0-dim float64, no unit.

    2 where either KL is below the floor and so shows nothing; NaN where either is not finite.
    """
    kl = kl.double()
    kl_below = kl_below.double()
    p = ((kl / kl_below).log() / math.log(EXPONENT_SPAN)).clamp(*EXPONENT_RANGE)
    p = torch.where((kl < floor) | (kl_below < floor), EXPONENT_RANGE[1], p)
    return torch.where(kl.isfinite() & kl_below.isfinite(), p, torch.nan)


def exponent_at(
    c: Tensor | float, proposal: Proposal, retract: Callable[[], None] | None, floor: float
) -> Tensor:
    """`exponent_between` of the proposal at c and at c/4, measured on the rows of the audit."""
    assert proposal.batch is not None
    held = proposal.batch.held
    assert held is not None
    kl, kl_below = (proposal.kl(scale, held, retract) for scale in (c, c / EXPONENT_SPAN))
    return exponent_between(kl, kl_below, floor)


class ExponentEstimate:
    """The median of the last five observations of p, of as many as there are; 2 before the first."""

    def __init__(self, device: torch.device | str):
        # the latest first; NaN: not observed yet
        self.seen = torch.full((EXPONENTS_KEPT,), torch.nan, dtype=torch.float64, device=device)

    @property
    def value(self) -> Tensor:
        """p, 0-dim float64. Nothing is read on the host."""
        count = self.seen.isfinite().sum()
        ordered = self.seen.sort().values  # NaN last
        middle = torch.stack([(count - 1).clamp(min=0) // 2, count // 2])
        return torch.where(count > 0, ordered[middle].mean(), EXPONENT_RANGE[1])

    def observe(self, p: Tensor, usable: Tensor) -> None:
        """One observation, 0-dim; what is not `usable` (bool, 0-dim) or NaN changes nothing."""
        moved = torch.cat([p.reshape(1), self.seen[:-1]])
        self.seen.copy_(torch.where(usable & p.isfinite(), moved, self.seen))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen.copy_(state["seen"])
