"""`Radius`: the longest step that the weights may take, beside what a step may do to predictions.

A KL bound says how far predictions move; it knows nothing of how sharp the place is that it holds a run at. A
radius says how far weights move; it knows nothing of the first steps. Together they are the double budget of
docs/method.md, c = min(c_KL, r/||dW||); alone a radius is a trust region.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..options import RADIUS_UNITS, SCHEDULES, check_option
from ..proposal import Proposal
from .schedules import schedule_multiplier


class Radius:
    """The largest ||c·dW|| at each step, a Frobenius norm over all weights that c scales.

    r_t = size·sqrt(m(t))·min(1, (t+1)/ramp), and times ||W|| at the start with unit="initial". A radius
    relative to the *current* norm would grow with what it allows; one relative to the start cannot.

    Args:
        size: in `unit`: `absolute`, a weight norm; `initial`, the share of ||W|| before the first step.
        schedule: m(t), as of delta*: `constant`; `linear`, `cosine`, `hold_decay` over `total_steps`;
            `lr_squared`.
        ramp: steps over which it rises linearly from size/ramp; 0 or 1: none.
    Raises:
        ValueError: a size that is not > 0, an unknown unit or schedule, or one that lacks `total_steps`.
    """

    def __init__(
        self,
        size: float,
        *,
        unit: str = "absolute",
        schedule: str = "constant",
        total_steps: int | None = None,
        ramp: int = 0,
    ):
        if not size > 0:
            raise ValueError(f"a radius must be > 0, not {size}.")
        if ramp < 0:
            raise ValueError(f"ramp must be at least 0 steps, not {ramp}.")
        check_option("radius_unit", unit, RADIUS_UNITS)
        check_option("schedule", schedule, SCHEDULES)
        schedule_multiplier(schedule, 0, total_steps, 1.0)  # a schedule that lacks something fails here
        self.size = size
        self.relative = unit == "initial"
        self.schedule = schedule
        self.total_steps = total_steps
        self.ramp = ramp
        self.settled = not self.relative  # whether nothing is left to be read from the first weights
        # in place, since a CUDA graph reads the memory that it was captured with
        self.start = torch.tensor(math.nan if self.relative else 1.0, dtype=torch.float64)  # ||W||, or 1
        self.share = torch.tensor(size, dtype=torch.float64)  # of it, at this step

    def move(self, t: int, lr_ratio: float) -> None:
        """On the host, before step `t` (0-based); `lr_ratio` is the learning rate over its peak."""
        multiplier = schedule_multiplier(self.schedule, t, self.total_steps, lr_ratio)
        size = self.size * math.sqrt(max(multiplier, 1e-12))
        if self.ramp > 1:
            size *= min(1.0, (t + 1) / self.ramp)
        self.share.fill_(size)

    def see(self, proposal: Proposal) -> None:
        """Keep ||W|| of the first step, if the radius is relative to it."""
        if not self.settled:
            self.start.fill_(proposal.old_norm())
            self.settled = True

    @property
    def now(self) -> Tensor:
        """r_t, 0-dim float64, a weight norm."""
        return self.start * self.share

    def state_dict(self) -> dict[str, Any]:
        """What is known of the first weights; empty where nothing needs to be."""
        return {"start": self.start.clone()} if self.relative else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take ||W|| at the start from a state; one without it leaves what is known."""
        if self.relative and "start" in state:
            self.start.copy_(state["start"])
            self.settled = bool(self.start.isfinite())

    def to(self, device: torch.device) -> None:
        self.start = self.start.to(device)
        self.share = self.share.to(device)
