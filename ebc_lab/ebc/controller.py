"""How the budget delta evolves from audit to audit, and how its target delta* is scheduled over a run.

A controller holds delta, a 0-dim float64 tensor on the model's device, and moves it in `update(kl, clipped)` at each audit.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor


def schedule_multiplier(kind: str, step: int, total_steps: int | None) -> float:
    """m(t), the factor on delta* at `step` (0-based) of `total_steps`: `constant` 1; `linear` max(0.05, 1 - t/n)."""
    if kind == "constant":
        return 1.0
    if kind == "linear":
        if not total_steps or total_steps < 1:
            raise ValueError("schedule='linear' needs total_steps, the length of the run.")
        return max(0.05, 1 - step / total_steps)
    raise ValueError(f"schedule={kind!r} is unknown; it takes constant or linear.")


class Fixed:
    """delta = delta*."""

    gains: ClassVar[dict[str, float]] = {}

    def __init__(self, target: float, initial: float | None = None, **gains: float):
        unknown = set(gains) - set(self.gains)
        if unknown:
            raise ValueError(f"{type(self).__name__} has no gain {', '.join(sorted(unknown))}.")
        self.gain = {**self.gains, **gains}
        self.target = torch.tensor(target, dtype=torch.float64)
        self.delta = torch.tensor(target if initial is None else initial, dtype=torch.float64)

    def to(self, device: torch.device | str) -> Fixed:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def rescale(self, target: float) -> None:
        """Move delta* along its schedule; delta moves by the same factor."""
        self.delta = self.delta * (target / self.target)
        self.target = torch.full_like(self.target, target)

    def update(self, kl: Tensor | float, clipped: Tensor | bool, **signals: Tensor | float) -> Tensor:
        """One audit: the applied KL (nats per token) and whether the step was clipped -> delta, nats per token.

        A KL that is not finite says nothing about delta: it changes nothing.
        """
        kl = torch.as_tensor(kl, dtype=torch.float64, device=self.delta.device)
        usable = torch.isfinite(kl)
        before = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        self._rule(kl, torch.as_tensor(clipped, device=self.delta.device))
        for name, value in before.items():
            setattr(self, name, torch.where(usable, getattr(self, name), value))
        return self.delta

    def _rule(self, kl: Tensor, clipped: Tensor) -> None:
        return

    def state_dict(self) -> dict[str, Any]:
        return {k: v.clone() for k, v in vars(self).items() if isinstance(v, Tensor)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(self.delta.device))


class PI(Fixed):
    """The published loop: error in raw nats, integral through an EMA of half-life 250 steps, delta in [0.01, 0.30].

    Its error is in nats and its output in ln(delta), so it has hardly any authority; kept as it was published.
    """

    gains: ClassVar[dict[str, float]] = {
        "kp": 0.15,
        "ki": 0.02,
        "half_life": 250.0,  # steps
        "audit_every": 20.0,  # steps
        "low": 0.01,  # nats per token
        "high": 0.30,
    }

    def __init__(self, target: float, initial: float | None = None, **gains: float):
        super().__init__(target, initial, **gains)
        self.ema = torch.tensor(math.nan, dtype=torch.float64)

    def _rule(self, kl: Tensor, clipped: Tensor) -> None:
        g = self.gain
        error = self.target - kl
        weight = 1 - 0.5 ** (g["audit_every"] / g["half_life"])
        self.ema = torch.where(self.ema.isnan(), error, self.ema + weight * (error - self.ema))
        self.delta = (self.delta * (g["kp"] * error + g["ki"] * self.ema).exp()).clamp(g["low"], g["high"])


class LogPI(Fixed):
    """PI on e = ln(delta*/KL), unit-free: it pauses while nothing is clipped and the KL is below its target."""

    gains: ClassVar[dict[str, float]] = {"kp": 0.2, "ki": 0.3}

    def __init__(self, target: float, initial: float | None = None, **gains: float):
        super().__init__(target, initial, **gains)
        self.previous = torch.tensor(math.nan, dtype=torch.float64)

    def _rule(self, kl: Tensor, clipped: Tensor) -> None:
        error = (self.target / kl.clamp(min=1e-12)).log()
        previous = torch.where(self.previous.isnan(), error, self.previous)
        move = self.gain["kp"] * (error - previous) + self.gain["ki"] * error
        moved = (self.delta / self.target).log() + move
        active = clipped | (error <= 0)
        self.delta = torch.where(active, self.target * moved.clamp(-12, 12).exp(), self.delta)
        self.previous = error


CONTROLLERS: dict[str, type[Fixed]] = {"fixed": Fixed, "pi": PI, "log_pi": LogPI}


def make_controller(kind: str, target: float, initial: float | None = None, **gains: float) -> Fixed:
    """A controller of delta around `target`, starting from `initial` (default: the target), both nats per token.

    Kinds: `fixed`, `pi` (as published), `log_pi`. Gains left out take the kind's own. Raises ValueError.
    """
    if kind not in CONTROLLERS:
        raise ValueError(f"controller={kind!r} is unknown; it takes {', '.join(CONTROLLERS)}.")
    return CONTROLLERS[kind](target, initial, **gains)
