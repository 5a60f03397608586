"""S, the predicted movement of the logits, from the groups' contributions s_g = beta_g * ||dW_g|| (the ellipsotope bound).

And the guard: a factor g <= 1 on the trust radius that gives way when an audit finds that S was too small (METHOD.md 3, 6).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .options import GUARDS

RECOVERY = 200.0  # steps in which ln g halves


def _sqrtl_l2(s: Tensor) -> Tensor:
    return (s.ne(0).sum().to(s.dtype) * s.square().sum()).sqrt()


AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": lambda s: s.sum(),
    "sqrtl_l2": _sqrtl_l2,
    "l2": lambda s: s.square().sum().sqrt(),
}


def aggregate(contributions: Tensor, kind: str) -> Tensor:
    """Contributions (L,) in logits per token -> S, 0-dim, same unit.

    `l1` is the triangle inequality, `sqrtl_l2` = sqrt(L)·l2 with L the groups that move, never tighter than l1;
    `l2` is NOT a bound. Raises ValueError on another kind.
    """
    if kind not in AGGREGATES:
        raise ValueError(f"aggregate={kind!r} is unknown; it takes {', '.join(AGGREGATES)}.")
    return AGGREGATES[kind](torch.as_tensor(contributions))


class Guard:
    """g in c = min(1, g·tau/S), moved at each audit by rho, above 1 where S under-estimates what the guard has left of it.

    `shrink`: ln g recovers by half in 200 steps, and ln g <- ln g - ln rho where rho > 1. `shrink_inflate`: the betas are
    to be multiplied by rho too. `none`: g = 1, always. Raises ValueError on another kind.

    rho is g·T/(c·S), on a clipped step T/tau: the tightness alone does not depend on g, so that a guard fed with it would
    shrink again at every audit, without end, however small the step has become.
    """

    def __init__(self, kind: str = "none"):
        if kind not in GUARDS:
            raise ValueError(f"guard={kind!r} is unknown; it takes {', '.join(GUARDS)}.")
        self.kind = kind
        self.log_factor = torch.zeros((), dtype=torch.float64)
        self.last: int | None = None  # the step of the last audit
        self._count = torch.zeros((), dtype=torch.int64)

    @property
    def factor(self) -> Tensor:
        """g, 0-dim, no unit."""
        return self.log_factor.exp()

    @property
    def count(self) -> int:
        """At how many audits it shrank. Reading it waits for the device."""
        return int(self._count)

    def audit(self, rho: Tensor | float, step: int) -> Tensor:
        """One audit at `step` (0-based) -> the factor by which beta is to be inflated, 0-dim, no unit.

        The recovery since the audit before comes first. A rho that is not finite shrinks nothing; time passes all the same.
        """
        rho = torch.as_tensor(rho, dtype=torch.float64, device=self.log_factor.device)
        if self.kind == "none":
            return torch.ones_like(rho)
        excess = torch.where(rho.isfinite(), rho, 1.0).clamp(min=1)
        elapsed = 0 if self.last is None else step - self.last
        self.log_factor.mul_(0.5 ** (elapsed / RECOVERY)).sub_(excess.log())
        self._count.add_(excess > 1)
        self.last = step
        return excess if self.kind == "shrink_inflate" else torch.ones_like(excess)

    def to(self, device: torch.device | str) -> Guard:
        self.log_factor, self._count = self.log_factor.to(device), self._count.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"log_factor": self.log_factor.clone(), "count": self._count.clone(), "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.log_factor.copy_(state["log_factor"])
        self._count.copy_(state["count"])
        self.last = state["last"]
