"""`ClipSettings`: everything that can be chosen about `EllipsotopeClip`, in one frozen value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from . import options
from .options import check_number, check_option


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """What an `EllipsotopeClip` does; its keyword arguments of the same names build one.

    Args:
        target_kl: delta*, nats per token; `math.inf` applies every update in full, bit-equal to the plain
            optimizer.
        budget: `shadow` measures the KL of a trial step; `tracked` predicts it from step to step as well, so
            that fewer tokens or measurements do; `surrogate` bounds the movement by the groups'
            sensitivities; `fisher` predicts the KL from one derivative of the whole proposal; `calibrated` is
            k·S², k now and then fitted to that prediction; `lagged`, of `LaggedClip` alone, takes c from the
            KL of earlier steps.
        aggregate: of the groups' contributions: `l1`, `sqrtl_l2` (bounds) or `l2` (not a bound).
        grouping: which parameters are one group: `block`, `tensor`, `type`, `global`; `matrices` budgets and
            scales the hidden matrices alone, the rest moves freely. Or a mapping {group: parameter names}
            that holds every trained parameter once.
        controller: `fixed`, `log_pi`, `rsl`, `agreement`, `energy`, `confidence`; `gains` overrides its own.
        schedule: of delta*: `constant`; `linear`, `cosine` or `hold_decay` over `total_steps`; `lr_squared`.
        radius: the most that ||c·dW|| may be, beside the KL; with a loose delta* the radius rules, and the KL
            the first steps. `radius_unit`: `absolute`, a weight norm, or `initial`, the share of ||W|| before
            the first step. It follows the square root of `schedule`, and rises linearly over the first `ramp`
            steps. With an infinite `target_kl` it is the only bound.
        steers: what the controller moves: `kl`, delta; or `radius`, which is multiplied by the square root of
            what it makes of delta/delta*, while delta stays at delta*.
        until: the share of `total_steps` after which every update is applied in full.
        probe, cadence: how beta is measured (`jvp`, `fd`), and how often (`warm`, `dense`, `sweep`).
        sensitivity_every: under `shadow`, `tracked` and `fisher`, steps between recordings of S and the
            contributions; 0 never.
        measure_every: `shadow` and `tracked` measure at one step in this many. In between, `tracked` predicts
            the KL, and `shadow` takes it to be what the last measurement found for each unit of ||dW||².
        measure: `tracked` alone can do with fewer: `when_needed` measures where the predicted standard
            deviation of ln KL exceeds `measure_above`. It is read on the host, so no CUDA graph holds such a
            step.
        refine_steps, measurements: `shadow` and `tracked` measure again, up to `measurements` times in a
            step, while c and the trial c differ by more than a factor of 1.5: at every step, or in the first
            `refine_steps` steps only, so that later ones need no value on the host (CUDA graphs).
        stretch: `shadow` and `tracked` let c be at most this many times the scale at which the KL was
            measured: what a short trial shows need not hold far beyond it. None: any c.
        exponent: of `shadow`: how KL grows with c. `square` as c²; `auto` as c^p, p being measured at audits,
            for a model that quantizes its weights.
        floor: the smallest KL that means anything, nats per token. Default: by the logits' dtype, so a
            forward that casts low-precision logits up needs to be told (1e-5).
    Raises:
        ValueError: an unknown name, or a number out of its range.
    """

    target_kl: float
    budget: str = "shadow"
    aggregate: str = "l1"
    grouping: str | Mapping[str, Sequence[str]] = field(default="block", hash=False)
    controller: str = "fixed"
    gains: Mapping[str, float] | None = field(default=None, hash=False)
    schedule: str = "constant"
    total_steps: int | None = None
    radius: float | None = None
    radius_unit: str = "absolute"
    ramp: int = 0
    steers: str = "kl"
    until: float = 1.0
    probe: str = "jvp"
    cadence: str = "warm"
    sensitivity_every: int = 0
    measure_every: int = 1
    measure: str = "every"
    measure_above: float = 0.25
    refine_steps: int | None = None
    measurements: int = 3
    stretch: float | None = 1.5
    exponent: str = "square"
    floor: float | None = None

    names: ClassVar[dict[str, tuple[str, ...]]] = {
        "budget": (*options.BUDGETS, options.LAGGED),
        "aggregate": options.AGGREGATES,
        "controller": options.CONTROLLERS,
        "schedule": options.SCHEDULES,
        "probe": options.PROBES,
        "cadence": options.CADENCES,
        "exponent": options.EXPONENTS,
        "measure": options.CADENCES_OF_KL,
        "radius_unit": options.RADIUS_UNITS,
        "steers": options.STEERED,
    }

    def __post_init__(self) -> None:
        check_number("target_kl", self.target_kl, 0.005)
        if not self.target_kl > 0:
            raise ValueError(f"target_kl must be > 0 nats per token, not {self.target_kl}.")
        for key, allowed in self.names.items():
            check_option(key, getattr(self, key), allowed)
        if not isinstance(self.grouping, Mapping):
            check_option("grouping", self.grouping, options.GROUPINGS)
        if self.exponent == "auto" and self.budget != "shadow":
            raise ValueError(
                f"exponent='auto' goes with budget='shadow': {self.budget!r} takes KL to grow as c²."
            )
        if self.exponent == "auto" and self.measure_every > 1:
            raise ValueError(
                "exponent='auto' needs measure_every=1: between measurements KL is taken to grow as ||dW||²."
            )
        if self.measure != "every" and (self.budget != "tracked" or self.measure_every > 1):
            raise ValueError(
                f"measure={self.measure!r} goes with budget='tracked', which knows how sure it is, and "
                "measure_every=1."
            )
        if not self.measure_above > 0:
            raise ValueError(f"measure_above must be > 0, not {self.measure_above}.")
        if self.stretch is not None and not self.stretch >= 1:
            raise ValueError(f"stretch must be at least 1, or None, not {self.stretch}.")
        if self.measure_every < 1:
            raise ValueError(f"measure_every must be at least 1, not {self.measure_every}.")
        if self.radius is None and (self.ramp or self.radius_unit != "absolute"):
            raise ValueError("ramp and radius_unit are of a radius: give radius, too.")
        if self.steers == "radius" and (self.radius is None or not self.active):
            raise ValueError("steers='radius' moves a radius beside a finite target_kl: give both.")
        if self.radius is not None and self.budget == options.LAGGED:
            raise ValueError("budget='lagged' chooses c before the step is known: it takes no radius.")
        if not 0 < self.until <= 1:
            raise ValueError(f"until must be a share of the run in (0, 1], not {self.until}.")
        if self.until < 1 and not self.total_steps:
            raise ValueError("until is a share of the run: it needs total_steps, the length of the run.")

    @property
    def active(self) -> bool:
        """Whether there is a budget at all."""
        return math.isfinite(self.target_kl)

    def limits(self, t: int) -> bool:
        """Whether the KL of step `t` (0-based) is limited."""
        return self.active and self.in_force(t)

    def in_force(self, t: int) -> bool:
        """Whether step `t` (0-based) comes before `until`."""
        return self.until == 1 or t < self.until * (self.total_steps or 0)

    @property
    def settling(self) -> int:
        """The first steps, in which a KL is measured at every one."""
        return options.SETTLING if self.refine_steps is None else self.refine_steps

    def refines(self, t: int) -> bool:
        """Whether step `t` (0-based) may measure more than once."""
        return self.refine_steps is None or t < self.refine_steps

    @property
    def audit_every(self) -> int:
        """Steps between audits, where nothing else is asked for."""
        return 20 if self.active else 0

    def check_arithmetic(self) -> None:
        """Raises ValueError if something would be computed beside the optimizer's `arithmetic`."""
        for key, allowed in options.WITH_ARITHMETIC.items():
            value = getattr(self, key)
            if self.active and value not in allowed:
                listed = " or ".join(f"{key}={a!r}" for a in allowed)
                raise ValueError(
                    f"{key}={value!r} computes with torch's own operations: with `arithmetic` take {listed}."
                )

    def check_floor(self, floor: float) -> None:
        """Raises ValueError if the budget measures KLs and the target is too small for that at some step."""
        least = self.target_kl * options.LEAST_MULTIPLIER.get(self.schedule, 1.0)
        if not self.active or self.budget not in options.MEASURING or least >= 10 * floor * (1 - 1e-9):
            return
        falling = f", falling to {least:g} on schedule={self.schedule!r}," if least < self.target_kl else ""
        raise ValueError(
            f"target_kl={self.target_kl:g}{falling} is below ten times {floor:g}, the smallest KL that this "
            "precision can see: raise target_kl, or use budget='surrogate'."
        )
