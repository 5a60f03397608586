"""How c is found, with a budget of delta nats per token.

`shadow` measures the KL of a trial step, and `tracked` predicts it from step to step as well. `surrogate`
uses the bound S, `fisher` the second-order prediction q (c = min(1, sqrt(delta/q))), and `calibrated` k·S²
with k fitted to q at every probe. Since KL <= ||centre(dz)||^2 / 4, the trust radius in rms units is
2·sqrt(delta). Where weights are quantized, KL grows as c^p with p below 2, and `shadow` can measure p at
audits (docs/method.md, "On a quantized model").
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .options import DRIFT, EXPONENT_RANGE, EXPONENT_SPAN, EXPONENTS_KEPT, LEAST_COSINE, SURPRISE

# What a formula computes with: 0-dim tensors, and nothing is read on the host; or floats, and no kernel is
# launched, which on a CPU would take a hundred times longer. Both give the same bits.
Number = Tensor | float
Flag = Tensor | bool


def where(condition: Flag, a: Number, b: Number) -> Any:
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def opposite(condition: Flag) -> Any:
    return ~condition if isinstance(condition, Tensor) else not condition


def finite(x: Number) -> Any:
    return torch.isfinite(x) if isinstance(x, Tensor) else math.isfinite(x)


def at_least(x: Number, low: float) -> Any:
    if isinstance(x, Tensor):
        return x.clamp(min=low)
    return low if x < low else x  # NaN stays NaN, here and below


def at_most(x: Number, high: float) -> Any:
    if isinstance(x, Tensor):
        return x.clamp(max=high)
    return high if x > high else x


def divided(a: Number, b: Number) -> Any:
    """a/b; a float divided by zero is infinite or NaN, as a tensor is."""
    if isinstance(b, Tensor) or isinstance(a, Tensor) or b:
        return a / b
    return a * math.copysign(math.inf, b)


def elementwise(function: Callable[[Tensor], Tensor]) -> Callable[[Number], Any]:
    """A function of 0-dim tensors as one of numbers, which computes floats too, with the same last bit."""
    return functools.partial(_computed, function)


def _computed(function: Callable[[Tensor], Tensor], x: Number) -> Any:
    if isinstance(x, Tensor):
        return function(x)
    return function(torch.tensor(x, dtype=torch.float64)).item()


root = elementwise(torch.sqrt)
log = elementwise(torch.log)
exp = elementwise(torch.exp)


# -- c from a bound or a prediction --------------------------------------------------------------------------


def trust_radius(delta: Tensor | float, sqrt: Callable[[Tensor], Tensor] = torch.sqrt) -> Tensor:
    """tau = 2·sqrt(delta), logits per token in rms units (independent of the number of tokens)."""
    return 2 * sqrt(torch.as_tensor(delta))


def clip_coefficient(radius: Tensor | float, surrogate: Tensor | float) -> Tensor:
    """c = min(1, radius/S), 0-dim; S = 0 gives 1, a non-finite S gives NaN (the caller skips such a step)."""
    surrogate = torch.as_tensor(surrogate)
    c: Tensor = scale_within(torch.as_tensor(radius).to(surrogate), surrogate)
    return c


def scale_within(radius: Number, surrogate: Number) -> Any:
    """`clip_coefficient` of numbers."""
    c = where(surrogate == 0, 1.0, at_most(divided(radius, surrogate), 1.0))
    return where(finite(surrogate), c, math.nan)


def fitted_log_k(log_k: Tensor, predicted_kl: Tensor, surrogate: Tensor) -> Tensor:
    """ln k of `calibrated`: ln(q/S²) at the first probe (`log_k` NaN), half-way to it at later ones. 0-dim.

    A probe without a finite, positive q and S changes nothing.
    """
    seen = (predicted_kl / surrogate.square()).log()
    moved = torch.where(log_k.isnan(), seen, log_k + 0.5 * (seen - log_k))
    return torch.where(seen.isfinite(), moved, log_k)


@dataclass(frozen=True)
class ShadowResult:
    """What a shadow search found. All 0-dim tensors, or floats if `measure` gave one.

    `c` is 0 where `skipped`; `trial` and `kl` are the last trial scale and the KL measured there.
    """

    c: Number
    next_trial: Number
    skipped: Flag
    trial: Number
    kl: Number
    measurements: int


Scale = Callable[[Any, Any], Number]  # (a KL, the trial scale it was measured at) -> c, before its limit 1


def power_scale(delta: Number, exponent: Number) -> Scale:
    """Of a search where KL grows as c^p: trial·(delta/KL)^(1/p); if p is 2, the bits of the square root."""

    def scale(kl: Any, trial: Any) -> Any:
        ratio = divided(delta, kl)
        return trial * where(exponent == 2, root(ratio), exp(log(ratio) / exponent))

    return scale


def shadow_step(
    kl: Number, trial: Number, delta: Number, floor: float, scale: Scale
) -> tuple[Number, Number, Flag]:
    """One measurement -> (c, next trial, skipped), without a branch.

    A KL below the floor shows nothing: accept the trial and try ten times as much next. Not finite: give up a
    factor of ten.
    """
    sound = finite(kl)
    low = sound & (kl < floor)
    scaled = at_most(scale(at_least(kl, floor), trial), 1.0)
    c = where(low & (delta > 0), trial, where(sound, scaled, 0.0))
    positive = where(scaled > 0, scaled, trial)  # after a budget of 0, start from the last positive scale
    following = where(low, at_most(10 * trial, 1.0), where(sound, positive, trial / 10))
    return c, following, opposite(sound)


def shadow_search(
    measure: Callable[[Any], Any],
    delta: Number,
    trial: Number,
    *,
    measurements: int,
    floor: float,
    ratio: float = 1.5,
    scale: Scale | None = None,
    root: Callable[[Number], Any] = root,
) -> ShadowResult:
    """Find c such that the measured KL of c·dW is delta.

    Args:
        measure: trial scale -> KL of that part of the update, nats per token; both 0-dim tensors, or both
            floats, as `delta` and `trial` are then.
        delta: the budget, nats per token.
        trial: the first scale to try, in (0, 1].
        measurements: how many are allowed; with one, the search itself reads no value on the host.
        floor: the smallest KL that means anything in the arithmetic at hand.
        ratio: measure again while c/trial lies outside [1/ratio, ratio] and a measurement is left.
        scale: what c a measurement stands for. Default: KL grows as c², so a KL of `kl` at `trial` puts delta
            at trial·sqrt(delta/kl).
        root: computes that root.
    """

    def alone(kl: Any, trial: Any) -> Any:
        return trial * root(divided(delta, kl))

    used = 0
    while True:
        # a float32 forward cannot resolve KLs below ~1e-7: rounding may even make them negative
        kl = measure(trial)
        kl = kl.double() if isinstance(kl, Tensor) else kl
        kl = where(finite(kl), at_least(kl, 0.0), kl)
        used += 1
        c, following, skipped = shadow_step(kl, trial, delta, floor, scale or alone)
        if used < measurements:
            low = (kl < floor) & (trial < 1)
            off = (c > ratio * trial) | (c * ratio < trial)
            if bool(skipped | low | off):
                trial = following
                continue
        return ShadowResult(c, following, skipped, trial, kl, used)


# -- how KL grows with c -------------------------------------------------------------------------------------


def exponent_between(kl: Tensor, kl_below: Tensor, floor: float) -> Tensor:
    """p between c and c/4, within [1, 2], from the KL at both in nats per token; 0-dim float64, no unit.

    2 where either KL is below the floor and so shows nothing; NaN where either is not finite.
    """
    kl = kl.double()
    kl_below = kl_below.double()
    p = ((kl / kl_below).log() / math.log(EXPONENT_SPAN)).clamp(*EXPONENT_RANGE)
    p = torch.where((kl < floor) | (kl_below < floor), EXPONENT_RANGE[1], p)
    return torch.where(kl.isfinite() & kl_below.isfinite(), p, torch.nan)


def exponent_at(c: Number, measure: Callable[[Number], Tensor], floor: float) -> Tensor:
    """`exponent_between` from two measurements, at c and at c/4; `measure`: scale -> KL, 0-dim."""
    return exponent_between(measure(c), measure(c / EXPONENT_SPAN), floor)


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


# -- the KL measured and predicted ---------------------------------------------------------------------------


def proposal_scale(fall: Number, grad_norm: Number, norm: Number) -> Any:
    """P = max(u, 0.05·||g||·n)·n of a proposal, which its KL is roughly proportional to.

    Args:
        fall: u = -<g, dW>, the promised fall of the loss, nats per token; g is the batch's gradient at W.
        grad_norm: ||g||, and `norm` n = ||dW||, both over the weights that c scales.
    """
    least = LEAST_COSINE * grad_norm * norm
    return where((fall > least) | (fall != fall), fall, least) * norm  # NaN if any of them is


@dataclass(frozen=True)
class Track:
    """What `tracked` knows of x = ln(KL of the whole proposal / P): a Kalman filter's mean and variance.

    Float64 both. With a variance of NaN, `log_ratio` is no measurement but an upper bound, or NaN,
    and the next measurement is believed in full.
    """

    log_ratio: Number
    variance: Number

    @property
    def known(self) -> Flag:
        """Whether x was measured, bool."""
        return self.variance > 0

    def later(self) -> Track:
        """One step on: x may have drifted."""
        return Track(self.log_ratio, self.variance + DRIFT)

    def innovation(self, seen: Number) -> Any:
        """By how much a measured x exceeds this one; NaN where there is none to compare with."""
        return where(self.known, seen - self.log_ratio, math.nan)

    def measured(self, seen: Number, noise: Number) -> Track:
        """After a measurement of x, `seen`, whose variance is `noise`.

        One that contradicts a factor of ten or more is believed in full: the filter starts again from it.
        """
        innovation = self.innovation(seen)
        starts = opposite(abs(innovation) < SURPRISE)  # nothing known, too
        gain = where(starts, 1.0, divided(self.variance, self.variance + noise))
        return Track(where(starts, seen, self.log_ratio + gain * innovation), gain * noise)
