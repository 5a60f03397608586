"""S, the ellipsotope bound on the movement of the logits, from the contributions s_g = beta_g * ||dW_g||.

docs/method.md, "The surrogate bound".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .options import check_option


def _sqrtl_l2(s: Tensor) -> Tensor:
    return (s.ne(0).sum().to(s.dtype) * s.square().sum()).sqrt()


_AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": lambda s: s.sum(),
    "sqrtl_l2": _sqrtl_l2,
    "l2": lambda s: s.square().sum().sqrt(),
}


def aggregate(contributions: Tensor, kind: str) -> Tensor:
    """Contributions (L,) in logits per token -> S, 0-dim, same unit.

    `l1` is the triangle inequality, `sqrtl_l2` = sqrt(L)·l2 with L the groups that move, never tighter than
    l1; `l2` is NOT a bound. Raises ValueError on another kind.
    """
    check_option("aggregate", kind, _AGGREGATES)
    return _AGGREGATES[kind](torch.as_tensor(contributions))
