"""Mistakes of the earlier study, kept to show what each of them does: the study `forensics`, docs/suites.md.

`ForensicClip` is `EllipsotopeClip` with any of them switched on, `UncorrectedAdam` an Adam without bias
correction. Nothing here is part of the method, and `EllipsotopeClip` itself takes none of these settings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ebc_lab.ebc.budgets import Budget, Surrogate
from ebc_lab.ebc.clip import EllipsotopeClip
from ebc_lab.ebc.controller import Fixed
from ebc_lab.ebc.options import (
    BETA_INITS,
    FORENSIC_CADENCES,
    FORENSIC_CONTROLLERS,
    GUARDED,
    GUARDS,
    UNITS,
    check_option,
)
from ebc_lab.ebc.proposal import Proposal
from ebc_lab.ebc.scalars import Number
from ebc_lab.ebc.sensitivity import Sensitivities, SensitivityFilter, two_in_turn
from ebc_lab.ebc.settings import ClipSettings
from ebc_lab.ebc.step import StepStats

RECOVERY = 200.0  # steps in which ln g halves


@dataclass(frozen=True, kw_only=True)
class ForensicSettings(ClipSettings):
    """`ClipSettings` that also take the earlier study's choices.

    Args:
        controller: `pi` too, see `PI`; audits are then every 20 steps by default.
        cadence: `published` too: all groups every 200 steps and two in turn every 20, see `ForensicFilter`.
        guard: of `surrogate`: `none`, `shrink`, `shrink_inflate` or `shrink_published`, see `Guard`.
        beta_init: `first`, or `zero`: an EMA from 0, see `ForensicFilter`.
        units: of the contributions: `logits`, or `per_lr`: divided by the learning rate, so that delta has no
            unit.
    """

    guard: str = GUARDS[0]
    beta_init: str = BETA_INITS[0]
    units: str = UNITS[0]

    names: ClassVar[dict[str, tuple[str, ...]]] = {
        **ClipSettings.names,
        "controller": FORENSIC_CONTROLLERS,
        "cadence": FORENSIC_CADENCES,
        "guard": GUARDS,
        "beta_init": BETA_INITS,
        "units": UNITS,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guard != "none" and self.budget not in GUARDED:
            raise ValueError(f"guard={self.guard!r} corrects a bound: it goes with budget='surrogate' only.")

    @property
    def forensic(self) -> bool:
        """Whether anything is chosen that the method does not have."""
        return any(getattr(self, key) not in allowed for key, allowed in ClipSettings.names.items()) or (
            (self.guard, self.beta_init, self.units) != (GUARDS[0], BETA_INITS[0], UNITS[0])
        )

    @property
    def audit_every(self) -> int:
        return 20 if self.active and self.controller == "pi" else super().audit_every


class ForensicFilter(SensitivityFilter):
    """`published`: each observation after the first weighs 1-decay and is limited. `zero`: an EMA from 0.

    That EMA takes no observation in full and limits none, so it stays far too small for hundreds of steps.
    """

    def __init__(self, published: bool = False, zero: bool = False):
        super().__init__()
        self.published = published
        self.zero = zero

    def weight(self, n: int) -> tuple[float, bool]:
        if self.zero:
            return 1 - self.decay, False
        if self.published and n > 1:
            return 1 - self.decay, True
        return super().weight(n)


class PI(Fixed):
    """The published loop: error in raw nats, integral by an EMA of half-life 250 steps, delta clamped.

    Its error is in nats and its output in ln(delta), so it has hardly any authority.
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

    def _rule(self, kl: Tensor, clipped: Tensor, signals: dict[str, Tensor]) -> None:
        g = self.gain
        error = self.target - kl
        weight = 1 - 0.5 ** (g["audit_every"] / g["half_life"])
        self.ema = torch.where(self.ema.isnan(), error, self.ema + weight * (error - self.ema))
        self.delta = (self.delta * (g["kp"] * error + g["ki"] * self.ema).exp()).clamp(g["low"], g["high"])


class Guard:
    """g in c = min(1, g·tau/S), divided at each audit by rho > 1, by which S still under-estimates.

    `shrink`: ln g recovers by half in 200 steps, and ln g <- ln g - ln rho where rho > 1. `shrink_inflate`:
    the betas are to be multiplied by rho too. `none`: g = 1, always. Raises ValueError on another kind.

    rho is g·T/(c·S), on a clipped step T/tau, with T of what the budget covers. `shrink_published` is
    `shrink` fed with T/(c·S) itself, T of the whole update: that does not fall with g, so it shrinks again at
    every audit, however small the step has become.
    """

    def __init__(self, kind: str = "none"):
        check_option("guard", kind, GUARDS)
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

        The recovery since the audit before comes first. A rho that is not finite shrinks nothing; time passes
        all the same.
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
        self.log_factor = self.log_factor.to(device)
        self._count = self._count.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"log_factor": self.log_factor.clone(), "count": self._count.clone(), "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.log_factor.copy_(state["log_factor"])
        self._count.copy_(state["count"])
        self.last = state["last"]


class GuardedSurrogate(Surrogate):
    """`Surrogate` with the factor of a `Guard`."""

    def __init__(self, settings: ClipSettings, audit_every: int, device: torch.device, guard: Guard):
        super().__init__(settings, audit_every, device)
        self.guard = guard

    def guard_factor(self, proposal: Proposal, radius: Number) -> Number:
        return proposal.number(self.guard.factor)


class ForensicSensitivities(Sensitivities):
    """`Sensitivities` by the earlier study's cadence, filters and units; `rate` is the learning rate."""

    settings: ForensicSettings
    rate = 1.0

    def make_filter(self) -> SensitivityFilter:
        s = self.settings
        return ForensicFilter(published=s.cadence == "published", zero=s.beta_init == "zero")

    def due(self, t: int, bounded: bool) -> list[str]:
        if self.settings.cadence != "published" or not bounded:
            return super().due(t, bounded)
        return list(self.groups) if t % 200 == 0 else two_in_turn(t, list(self.groups), every=20)

    def betas(self, norms: Tensor) -> Tensor:
        betas = super().betas(norms)
        return betas / self.rate if self.settings.units == "per_lr" else betas


class ForensicClip(EllipsotopeClip):
    """`EllipsotopeClip` that takes `ForensicSettings`. Arguments and errors as there."""

    capturable = True

    settings: ForensicSettings
    settings_type: ClassVar[type[ClipSettings]] = ForensicSettings

    sensitivities: ForensicSensitivities

    def _make_sensitivities(self) -> ForensicSensitivities:
        return ForensicSensitivities(self.settings)

    def _make_budget(self, device: torch.device) -> Budget:
        self.guard = Guard(self.settings.guard).to(device)
        budget = super()._make_budget(device)
        if isinstance(budget, Surrogate):
            return GuardedSurrogate(self.settings, self.audit_every, device, self.guard)
        return budget

    def _make_controller(self) -> Fixed:
        s = self.settings
        if s.controller != "pi":
            return super()._make_controller()
        gains = {"audit_every": float(self.audit_every), **(s.gains or {})}
        return PI(s.target_kl if s.active else 1.0, **gains)

    def _own_state(self) -> dict[str, Any]:
        return super()._own_state() | {"guard": self.guard.state_dict()}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        super()._load_own_state(state)
        self.guard.load_state_dict(state["guard"])

    def kind(self, t: int) -> tuple[str, ...] | None:
        return None if self.audits(t) and self.guard.kind != "none" else super().kind(t)

    def _limit_update(self, stats: StepStats, proposal: Proposal) -> None:
        self.sensitivities.rate = self.param_groups[0]["lr"]
        super()._limit_update(stats, proposal)

    def _audited(self, stats: StepStats, proposal: Proposal) -> None:
        super()._audited(stats, proposal)
        if self.guard.kind != "none" and stats.tightness is not None and stats.guard is not None:
            rho = stats.tightness * stats.guard
            if self.guard.kind == "shrink_published":
                assert stats.movement is not None
                assert stats.surrogate is not None
                rho = stats.movement / (stats.clip_coefficient * stats.surrogate)
            inflation = self.guard.audit(rho, proposal.t)
            for group in self.sensitivities.filters.values():
                group.inflate(inflation)


class UncorrectedAdam(torch.optim.Adam):
    """Adam without bias correction: its first step is 3.2 times Adam's at the default betas.

    The state starts at step 10^6, where b^step is below half a float64 ulp of 1 for every b below 0.99996, so
    that both corrections are exactly 1 in every implementation that torch may pick.
    """

    STEP = 1e6

    def __init__(self, params: Iterable[nn.Parameter], **settings: Any):
        super().__init__(params, **settings)
        for group in self.param_groups:
            on_device = group["fused"] or group["capturable"]  # these implementations expect the step there
            for p in group["params"]:
                device = p.device if on_device else "cpu"
                self.state[p] = {
                    "step": torch.tensor(self.STEP, dtype=torch.float32, device=device),
                    "exp_avg": torch.zeros_like(p, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
                }


def overlapping_windows(tokens: Tensor, context: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """`count` windows half a context apart at the head of a split: the earlier study judged about 600
    characters.

    As (inputs, targets), (count, T) each.
    """
    rows = tokens.unfold(0, context + 1, max(1, context // 2))[:count]
    return [(rows[:, :-1], rows[:, 1:])]
