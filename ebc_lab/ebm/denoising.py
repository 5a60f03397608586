"""Noise on the sphere and the exact score targets of denoising score matching (docs/ebm.md).

A level sigma is an rms angle in radians, whatever the dimension. Two kernels: `vmf`, a von Mises-Fisher law
of raw concentration (n - 1) / sigma^2 around the clean point, and `geodesic`, a Gaussian step in the tangent
space followed by the exponential map. Each target is the gradient of the kernel's log density at the noisy
point, tangent there. The Euclidean "noise / sigma" is no such gradient: it has the wrong sign, lies in the
clean point's tangent space and lacks the volume element.

Denoising score matching: Vincent 2011; at several levels: Song & Ermon, arXiv:1907.05600; on manifolds: De
Bortoli et al., arXiv:2202.02763.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from .sphere import checkable, distance, exp, log, project, randn, widened
from .vmf import Number, check_dimension, mean_cosine, sample

LEVELS = (0.01, 0.05, 0.1, 0.2, 0.5)
KINDS = ("vmf", "geodesic")
SERIES_BELOW = 0.3  # rad: closer than this, 1/t - cot t is summed from its series
# of (1/t - cot t) / t in powers of t^2: 2^(2k) |B_2k| / (2k)!
SERIES = (1 / 3, 1 / 45, 2 / 945, 1 / 4725, 2 / 93555, 1382 / 638512875, 4 / 18243225)


def add_noise(
    y: Tensor, sigma: float | Tensor, kind: str = "vmf", *, generator: torch.Generator | None
) -> Tensor:
    """Draw a noisy point x for each row of y (..., n).

    sigma is in radians, a number or a tensor that broadcasts to y's leading shape. ValueError for an unknown
    kind and for sigma outside (0, pi/2).
    """
    check_level(sigma)
    check_kind(kind)
    y = widened(y)
    n = y.shape[-1]
    check_dimension(n)
    level = torch.as_tensor(sigma, device=y.device)
    if kind == "vmf":
        raw = ((n - 1) / level.double() ** 2).expand(y.shape[:-1])
        return sample(y.reshape(-1, n), raw.reshape(-1), generator).reshape(y.shape)
    width = (level / math.sqrt(n - 1)).to(y.dtype).unsqueeze(-1)
    return exp(y, width * project(y, randn(y, generator)))


def score_target(x: Tensor, y: Tensor, sigma: float | Tensor, kind: str = "vmf") -> Tensor:
    """Return the gradient at x, on the sphere, of the log density of noise of level sigma around y, (..., n).

    vmf: (n - 1) / sigma^2 project(x, y). geodesic: log_x(y) [(n - 1) / sigma^2 - (n - 2) (1/t - cot t) / t],
    t the angle; the second term is the volume element's (steps of more than half a turn are left out).
    ValueError for an unknown kind, sigma outside (0, pi/2), and, for geodesic, opposite points.
    """
    check_level(sigma)
    check_kind(kind)
    x, y = widened(x), widened(y)
    n = x.shape[-1]
    precision = (n - 1) / torch.as_tensor(sigma, dtype=torch.float64, device=x.device) ** 2
    if kind == "vmf":
        # y - x, whose tangent part is the same, keeps its digits where the two points are close
        return precision.to(x.dtype).unsqueeze(-1) * project(x, y - x)
    factor = precision - (n - 2) * _volume_term(distance(x, y).double())
    return factor.to(x.dtype).unsqueeze(-1) * log(x, y)


def _volume_term(t: Tensor) -> Tensor:
    """Return (1/t - cot t) / t, float64 of t's shape; 1/3 at 0."""
    square = t * t
    near = torch.zeros_like(t)
    for coefficient in reversed(SERIES):
        near = near * square + coefficient
    far = torch.where(t < SERIES_BELOW, 1.0, t)  # keeps the branch not taken, and its gradient, finite
    return torch.where(t < SERIES_BELOW, near, (1 / far - 1 / torch.tan(far)) / far)


def r_squared(score: Tensor, target: Tensor) -> Tensor:
    """Return 1 - sum|score - target|^2 / sum|target|^2 over all rows, 0-dim: 0 of predicting 0, 1 at best.

    Formed as sum s.(2t - s) / sum|t|^2, the same number without the difference from 1, as it may be 1e-4.
    """
    score, target = widened(score), widened(target)
    return (score * (2 * target - score)).sum() / (target * target).sum()


def widen(kappa: Number, sigma: float | Tensor) -> Number:
    """Return a splat's kappa seen through noise sigma: mean cosines multiply, a' = a(kappa) a(1/sigma^2).

    kappa' = a' / (1 - a'^2), formed as b / (1 / kappa + a b sigma^2) with b = a(1/sigma^2): nothing cancels.
    """
    check_level(sigma)
    variance = sigma * sigma
    cosine = 2 / (variance + (variance * variance + 4) ** 0.5)  # the noise's, a(1/sigma^2)
    return cast(Number, cosine / (1 / kappa + mean_cosine(kappa) * cosine * variance))


def matched_r2(kappa: Number, sigma: float | Tensor) -> Number:
    """Return R^2 of the best score where states spread as their splat does: k s^2 / (1 + k s^2).

    That is the flat space's value; the sphere's, kappa' s^2 a(kappa) by `widen`, is 5% lower at 0.5 rad.
    """
    check_level(sigma)
    share = kappa * sigma * sigma
    return cast(Number, share / (1 + share))


def ceiling_r2(kappa: Number, sigma: float | Tensor) -> Number:
    """Return R^2 of a splat's score where its states are copies of one point: 1 - (1 - kappa' sigma^2)^2."""
    missing = 1 - widen(kappa, sigma) * sigma * sigma
    return cast(Number, 1 - missing * missing)


def check_level(sigma: float | Tensor) -> None:
    """Raise ValueError for a noise level outside (0, pi/2) radians."""
    levels = torch.as_tensor(sigma)
    if checkable(levels) and not bool(((levels > 0) & (levels < math.pi / 2)).all()):
        raise ValueError(f"a noise level is an rms angle between 0 and pi/2 rad, not {sigma}")


def check_kind(kind: str) -> None:
    """Raise ValueError for an unknown kernel."""
    if kind not in KINDS:
        raise ValueError(f"noise is one of {', '.join(KINDS)}, not {kind!r}")
