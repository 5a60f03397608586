"""How c is found, with a budget of delta nats per token.

`shadow` measures the KL of a trial step, and `tracked` predicts it from step to step as well. `surrogate`
uses the bound S, `fisher` the second-order prediction q (c = min(1, sqrt(delta/q))), and `calibrated` k·S²
with k fitted to q at every probe. Since KL <= ||centre(dz)||^2 / 4, the trust radius in rms units is
2·sqrt(delta).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .options import DRIFT, LEAST_COSINE, SURPRISE


def trust_radius(delta: Tensor | float) -> Tensor:
    """tau = 2·sqrt(delta), logits per token in rms units (independent of the number of tokens)."""
    return 2 * torch.as_tensor(delta).sqrt()


def clip_coefficient(radius: Tensor | float, surrogate: Tensor | float) -> Tensor:
    """c = min(1, radius/S), 0-dim; S = 0 gives 1, a non-finite S gives NaN (the caller skips such a step)."""
    surrogate = torch.as_tensor(surrogate)
    radius = torch.as_tensor(radius).to(surrogate)
    c = (radius / surrogate).clamp(max=1)
    c = torch.where(surrogate == 0, torch.ones_like(c), c)
    return torch.where(torch.isfinite(surrogate), c, torch.full_like(c, torch.nan))


def fitted_log_k(log_k: Tensor, predicted_kl: Tensor, surrogate: Tensor) -> Tensor:
    """ln k of `calibrated`: ln(q/S²) at the first probe (`log_k` NaN), half-way to it at later ones. 0-dim.

    A probe without a finite, positive q and S changes nothing.
    """
    seen = (predicted_kl / surrogate.square()).log()
    moved = torch.where(log_k.isnan(), seen, log_k + 0.5 * (seen - log_k))
    return torch.where(seen.isfinite(), moved, log_k)


@dataclass(frozen=True)
class ShadowResult:
    """What a shadow search found. All 0-dim tensors.

    `c` is 0 where `skipped`; `trial` and `kl` are the last trial scale and the KL measured there.
    """

    c: Tensor
    next_trial: Tensor
    skipped: Tensor
    trial: Tensor
    kl: Tensor
    measurements: int


Scale = Callable[
    [Tensor, Tensor], Tensor
]  # (a KL, the trial scale it was measured at) -> c, before its limit 1


def shadow_step(
    kl: Tensor, trial: Tensor, delta: Tensor, floor: float, scale: Scale
) -> tuple[Tensor, Tensor, Tensor]:
    """One measurement -> (c, next trial, skipped), without a branch.

    A KL below the floor shows nothing: accept the trial and try ten times as much next. Not finite: give up a
    factor of ten.
    """
    finite = torch.isfinite(kl)
    low = finite & (kl < floor)
    scaled = scale(kl.clamp(min=floor), trial).clamp(max=1)
    c = torch.where(low & (delta > 0), trial, torch.where(finite, scaled, torch.zeros_like(trial)))
    positive = torch.where(
        scaled > 0, scaled, trial
    )  # after a budget of 0, start from the last positive scale
    following = torch.where(low, (10 * trial).clamp(max=1), torch.where(finite, positive, trial / 10))
    return c, following, ~finite


def shadow_search(
    measure: Callable[[Tensor], Tensor],
    delta: Tensor,
    trial: Tensor,
    *,
    measurements: int,
    floor: float,
    ratio: float = 1.5,
    scale: Scale | None = None,
) -> ShadowResult:
    """Find c such that the measured KL of c·dW is delta.

    Args:
        measure: trial scale -> KL of that part of the update, nats per token; both 0-dim.
        delta: the budget, nats per token.
        trial: the first scale to try, in (0, 1].
        measurements: how many are allowed; with one, the search itself reads no value on the host.
        floor: the smallest KL that means anything in the arithmetic at hand.
        ratio: measure again while c/trial lies outside [1/ratio, ratio] and a measurement is left.
        scale: what c a measurement stands for. Default: KL grows as c², so a KL of `kl` at `trial` puts delta
            at trial·sqrt(delta/kl).
    """

    def alone(kl: Tensor, trial: Tensor) -> Tensor:
        return trial * (delta / kl).sqrt()

    used = 0
    while True:
        # a float32 forward cannot resolve KLs below ~1e-7: rounding may even make them negative
        kl = measure(trial).to(delta.dtype)
        kl = torch.where(torch.isfinite(kl), kl.clamp(min=0), kl)
        used += 1
        c, following, skipped = shadow_step(kl, trial, delta, floor, scale or alone)
        if used < measurements:
            low = (kl < floor) & (trial < 1)
            off = (c > ratio * trial) | (c * ratio < trial)
            if bool(skipped | low | off):
                trial = following
                continue
        return ShadowResult(c, following, skipped, trial, kl, used)


# -- the KL measured and predicted ---------------------------------------------------------------------------


def proposal_scale(fall: Tensor, grad_norm: Tensor, norm: Tensor) -> Tensor:
    """P = max(u, 0.05·||g||·n)·n of a proposal, which its KL is roughly proportional to. 0-dim float64.

    Args:
        fall: u = -<g, dW>, the promised fall of the loss, nats per token; g is the batch's gradient at W.
        grad_norm: ||g||, and `norm` n = ||dW||, both over the weights that c scales.
    """
    least = LEAST_COSINE * grad_norm.double() * norm.double()
    return torch.maximum(fall.double(), least) * norm.double()


@dataclass(frozen=True)
class Track:
    """What `tracked` knows of x = ln(KL of the whole proposal / P): a Kalman filter's mean and variance.

    0-dim float64 tensors. With a variance of NaN, `log_ratio` is no measurement but an upper bound, or NaN,
    and the next measurement is believed in full.
    """

    log_ratio: Tensor
    variance: Tensor

    @property
    def known(self) -> Tensor:
        """Whether x was measured, bool."""
        return self.variance > 0

    def later(self) -> Track:
        """One step on: x may have drifted."""
        return Track(self.log_ratio, self.variance + DRIFT)

    def innovation(self, seen: Tensor) -> Tensor:
        """By how much a measured x exceeds this one; NaN where there is none to compare with."""
        return torch.where(self.known, seen - self.log_ratio, torch.nan)

    def measured(self, seen: Tensor, noise: Tensor | float) -> Track:
        """After a measurement of x, `seen`, whose variance is `noise`.

        One that contradicts a factor of ten or more is believed in full: the filter starts again from it.
        """
        innovation = self.innovation(seen)
        starts = ~(innovation.abs() < SURPRISE)  # nothing known, too
        gain = torch.where(starts, 1.0, self.variance / (self.variance + noise))
        return Track(torch.where(starts, seen, self.log_ratio + gain * innovation), gain * noise)
