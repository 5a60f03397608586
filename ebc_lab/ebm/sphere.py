"""The unit sphere S^(n-1) in R^n: projection, angles, exponential and logarithm, transport (docs/ebm.md).

Points and vectors are (..., n) tensors, one point in each row; leading shapes broadcast. float64 stays
float64, half precision is computed in float32. Angles come from 2 atan2(|x - y|, |x + y|): arccos(x.y) is off
by up to 4e-4 rad near 0 in float32. Only elementwise products and sums are used, which autocast leaves alone,
and every function has derivatives by torch's reverse and forward modes.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

NEAR_ANTIPODE = 1e-7  # of 1 + x.y: closer to -x than this, no one geodesic joins x and y


def widened(x: Tensor) -> Tensor:
    """Return x in float32 where it is in half precision, else x itself."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def checkable(x: Tensor) -> bool:
    """Tell whether values of x may be looked at: not on a GPU, where the host would wait for each."""
    return not x.is_cuda


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Return x.y of each row, (..., 1)."""
    return (x * y).sum(-1, keepdim=True)


def norm(x: Tensor) -> Tensor:
    """Return |x| of each row, (..., 1); its derivative at 0 is 0."""
    return cast(Tensor, torch.linalg.vector_norm(x, dim=-1, keepdim=True))


def normalise(x: Tensor) -> Tensor:
    """Return x / |x| for each row, (..., n); a row of zeros, which has no direction, stays zero."""
    x = widened(x)
    return x / norm(x).clamp_min(torch.finfo(x.dtype).tiny)


def randn(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw N(0, I) of x's shape and dtype on the generator's device, and move it to x's."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, dtype=x.dtype, device=device, generator=generator).to(x.device)


def project(x: Tensor, v: Tensor) -> Tensor:
    """Return the part of v tangent at x, v - (x.v) x, (..., n)."""
    x, v = widened(x), widened(v)
    return v - dot(x, v) * x


def distance(x: Tensor, y: Tensor) -> Tensor:
    """Return the angle between x and y in radians, (...); its gradient is 0, not NaN, at angle 0."""
    return _angle(widened(x), widened(y)).squeeze(-1)


def _angle(x: Tensor, y: Tensor) -> Tensor:
    return 2 * torch.atan2(norm(x - y), norm(x + y))


def exp(x: Tensor, v: Tensor) -> Tensor:
    """Follow the geodesic from x with tangent velocity v until time 1, (..., n)."""
    x, v = widened(x), widened(v)
    angle = norm(v)
    return normalise(torch.cos(angle) * x + torch.sinc(angle / math.pi) * v)


def log(x: Tensor, y: Tensor) -> Tensor:
    """Return the tangent vector at x whose exponential is y, (..., n): its length is the angle.

    ValueError where y lies opposite to x: every direction leads there.
    """
    x, y = widened(x), widened(y)
    check_not_opposite(x, y)
    towards = project(x, y - x)
    length = norm(towards)
    apart = length > 0
    ratio = _angle(x, y) / torch.where(apart, length, 1.0)
    return torch.where(apart, ratio, 1.0) * towards


def transport(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """Carry the tangent vector v at x along the geodesic to y, (..., n): an isometry of the tangent spaces.

    v - (y.v) / (1 + x.y) (x + y). ValueError where y lies opposite to x.
    """
    x, y, v = widened(x), widened(y), widened(v)
    check_not_opposite(x, y)
    both = x + y
    return project(y, v - 2 * dot(y, v) / dot(both, both) * both)


def geodesic(x: Tensor, v: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return point and velocity after time t on the geodesic from x with tangent velocity v, (..., n) each.

    t is a number or a tensor of the leading shape.
    """
    x, v = widened(x), widened(v)
    time = t.unsqueeze(-1) if isinstance(t, Tensor) and t.dim() else t
    speed = norm(v)
    angle = speed * time
    cosine = torch.cos(angle)
    there = normalise(cosine * x + torch.sinc(angle / math.pi) * time * v)
    return there, project(there, cosine * v - speed * torch.sin(angle) * x)


def check_not_opposite(x: Tensor, y: Tensor) -> None:
    """Raise ValueError where 1 + x.y < 1e-7 in some row."""
    if not checkable(x):
        return
    both = (x + y).detach()
    if bool((dot(both, both) < 2 * NEAR_ANTIPODE).any()):
        raise ValueError("no one geodesic joins a point and its opposite: move one of the two points first")
