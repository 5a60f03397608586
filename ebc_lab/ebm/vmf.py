"""The von Mises-Fisher law on S^(n-1): normaliser, mean cosine, its inverse, samples (docs/ebm.md).

p(x) = C_n(K) exp(K mu.x) with respect to the sphere's surface, K the raw concentration. A concentration per
degree of freedom is kappa = K / (n - 1): it means the same width in every dimension, and the mean of mu.x,
the Bessel ratio A_n(K) = I_{n/2}(K) / I_{n/2-1}(K), is `mean_cosine(kappa)` up to O(1/n). Everything is
computed in float64 from Debye's uniform expansion (DLMF 10.41), never from I itself: I underflows at n = 640.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .sphere import checkable, norm, normalise, project, randn, widened

Number = TypeVar("Number", float, Tensor)

SAFE_ORDER = 30.0  # from this order on four terms of the expansion leave an error below 1e-9
NEWTON_STEPS = 12
# u_1 to u_4 of Debye's expansion, as polynomials in p^2 after a factor p^k (DLMF 10.41.10)
DEBYE = (
    (3 / 24, -5 / 24),
    (81 / 1152, -462 / 1152, 385 / 1152),
    (30375 / 414720, -369603 / 414720, 765765 / 414720, -425425 / 414720),
    (
        *(4465125 / 39813120, -94121676 / 39813120, 349922430 / 39813120),
        *(-446185740 / 39813120, 185910725 / 39813120),
    ),
)


# -- per degree of freedom -----------------------------------------------------------------------------------


def mean_cosine(kappa: Number) -> Number:
    """Return a = 2 kappa / (1 + sqrt(1 + 4 kappa^2)), the mean of mu.x at large n.

    kappa is per degree of freedom.
    """
    return cast(Number, 2 * kappa / (1 + (1 + 4 * kappa * kappa) ** 0.5))


def concentration_of(a: Number) -> Number:
    """Return kappa = a / (1 - a^2), the inverse of `mean_cosine`; nothing is clamped."""
    return a / (1 - a * a)


# -- Bessel functions ----------------------------------------------------------------------------------------


def bessel_ratio(n: int, K: float | Tensor) -> Tensor:
    """Return A_n(K) = I_{n/2}(K) / I_{n/2-1}(K), the mean of mu.x; float64 of K's shape.

    Debye's expansion at an order of at least 30, brought down by r_v = 1 / (2 (v + 1) / K + r_{v+1}).
    ValueError for n < 2 or K <= 0.
    """
    raw = _checked(n, K)
    order = _safe_order(n)
    ratio = _ratio_at(order, raw)
    # down to the order wanted, where the recurrence loses nothing
    while order > n / 2 - 1:
        ratio = raw / (2 * order + raw * ratio)
        order -= 1
    return ratio


def concentration(n: int, A: float | Tensor) -> Tensor:
    """Return the K with A_n(K) = A, float64 of A's shape: Newton's method from A (n - A^2) / (1 - A^2).

    Banerjee et al. 2005; Sra 2012.

    ValueError for n < 2 or A outside (0, 1).
    """
    check_dimension(n)
    target = torch.as_tensor(A, dtype=torch.float64)
    if checkable(target) and bool(((target <= 0) | (target >= 1)).any()):
        raise ValueError("a mean cosine lies strictly between 0 and 1: clamp it before asking for K")
    rest = 1 - target * target
    raw = target * (n - target * target) / rest
    # the start's own slope: a floor under the exact one, which cancels away at very large K
    square = target * target
    least = 0.5 * rest * rest / ((n - 3 * square) * rest + 2 * square * (n - square))
    for _ in range(NEWTON_STEPS):
        ratio = bessel_ratio(n, raw)
        slope = 1 - ratio * ratio - (n - 1) * ratio / raw
        moved = raw - (ratio - target) / torch.maximum(slope, least)
        raw = torch.maximum(moved, 0.1 * raw)
    return raw


class _LogPeak(torch.autograd.Function):
    """log_peak with its derivative 1 - A_n(K), in both modes."""

    @staticmethod
    def forward(raw: Tensor, n: int) -> Tensor:
        return _log_peak(n, raw)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        raw, ctx.n = inputs
        ctx.save_for_backward(raw)
        ctx.save_for_forward(raw)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (raw,) = ctx.saved_tensors
        return grads[0] * (1 - bessel_ratio(ctx.n, raw)), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (raw,) = ctx.saved_tensors
        return cast(Tensor, tangents[0] * (1 - bessel_ratio(ctx.n, raw)))


def log_peak(n: int, K: float | Tensor) -> Tensor:
    """Return ln C_n(K) + K, the log density at the mean direction, in nats; float64 of K's shape.

    d log_peak / dK = 1 - A_n(K). ValueError for n < 2 or K <= 0.
    """
    raw = _checked(n, K)
    return cast(Tensor, _LogPeak.apply(raw, n))  # type: ignore[no-untyped-call]


def _log_peak(n: int, raw: Tensor) -> Tensor:
    """Return (n/2 - 1) ln K - (n/2) ln 2 pi - ln(e^-K I_{n/2-1}(K)), so that no large terms cancel."""
    order = _safe_order(n)
    w = torch.sqrt(order * order + raw * raw)
    peak = order * torch.log(order + w) - order * order / (w + raw) + 0.5 * torch.log(w)
    peak = peak - torch.log(_debye_sum(order, w)) - 0.5 * (n - 1) * math.log(2 * math.pi)
    if order == n / 2 - 1:
        return peak
    ratio = _ratio_at(order, raw)
    while order > n / 2 - 1:
        denominator = 2 * order + raw * ratio
        peak = peak - torch.log(denominator)
        ratio = raw / denominator
        order -= 1
    return peak


def _safe_order(n: int) -> float:
    lowest = n / 2 - 1
    return lowest + max(0, math.ceil(SAFE_ORDER - lowest))


def _debye_sum(order: float, w: Tensor) -> Tensor:
    """Sum u_k(p) / v^k for k = 0 to 4, with p = v / w; p^k / v^k is w^-k."""
    inverse = 1 / w
    square = (order * inverse) ** 2
    total = torch.zeros_like(w)
    for coefficients in reversed(DEBYE):
        polynomial = torch.full_like(w, coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            polynomial = polynomial * square + coefficient
        total = (total + polynomial) * inverse
    return 1 + total


def _ratio_at(order: float, raw: Tensor) -> Tensor:
    """Return I_{v+1}(K) / I_v(K) by the expansion at both orders, exponents subtracted in closed form."""
    w, above = torch.sqrt(order * order + raw * raw), torch.sqrt((order + 1) ** 2 + raw * raw)
    step = (2 * order + 1) / (above + w)
    exponent = step - order * torch.log1p((1 + step) / (order + w)) - 0.5 * torch.log1p(step / w)
    sums = _debye_sum(order + 1, above) / _debye_sum(order, w)
    return raw / (order + 1 + above) * torch.exp(exponent) * sums


# -- samples -------------------------------------------------------------------------------------------------


def sample(mu: Tensor, K: float | Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one point of vMF(mu, K) for each row of mu (M, n), by rejection; K is (M,) or a number.

    Wood 1994. Numbers are drawn on the generator's device. ValueError for n < 2 or K <= 0.
    """
    mu = widened(mu)
    rows, n = mu.shape
    raw = _checked(n, K).detach().to(mu.device).expand(rows)
    below, sine = _wood(n, raw, generator)
    tangent = project(mu, randn(mu, generator))
    tangent = tangent / norm(tangent)
    return normalise((1 - below).to(mu.dtype).unsqueeze(-1) * mu + sine.to(mu.dtype).unsqueeze(-1) * tangent)


def _wood(n: int, raw: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Draw 1 - mu.x and sqrt(1 - (mu.x)^2) of vMF samples, float64 (M,), not as small differences."""
    device = raw.device if generator is None else generator.device
    b_all = (n - 1) / (2 * raw + torch.sqrt(4 * raw * raw + (n - 1) ** 2))
    below, sine = torch.zeros_like(raw), torch.zeros_like(raw)
    waiting = torch.arange(len(raw), device=raw.device)
    while len(waiting):
        u = torch.rand(3, len(waiting), dtype=torch.float64, device=device, generator=generator)
        u, b = u.to(raw.device), b_all[waiting]
        # a proposal w = mu.x of a law whose envelope covers the wanted one
        z = 0.5 + 0.5 * _coordinate(n, u[0], u[1])
        scale = 1 - (1 - b) * z
        distance = 2 * b * z / scale  # 1 - w of the proposal w
        at_mode = 2 * b / (1 + b)  # 1 - x0
        ratio = (at_mode + (1 - at_mode) * distance) * (1 + b) ** 2 / (4 * b)  # (1 - x0 w) / (1 - x0^2)
        taken = raw[waiting] * (at_mode - distance) + (n - 1) * torch.log(ratio) >= torch.log(u[2])
        # those that are taken first, each part in its order: a GPU waits once, for how many they are
        order = torch.argsort(~taken, stable=True)
        first = order[: int(taken.sum())]
        below[waiting[first]] = distance[first]
        sine[waiting[first]] = (2 * torch.sqrt(b * z * (1 - z)) / scale)[first]
        waiting = waiting[order[len(first) :]]
    return below, sine


def _coordinate(n: int, u: Tensor, v: Tensor) -> Tensor:
    """Make two uniform numbers a coordinate of a uniform point of S^(n-1): 2 Beta((n-1)/2, (n-1)/2) - 1."""
    if n == 2:
        return torch.cos(2 * math.pi * v)
    return torch.sqrt(-torch.expm1(torch.log(u) * (2 / (n - 2)))) * torch.cos(2 * math.pi * v)


# -- checks --------------------------------------------------------------------------------------------------


def check_dimension(n: int) -> None:
    """Raise ValueError for n < 2."""
    if n < 2:
        raise ValueError(f"a sphere needs n >= 2 dimensions around it, not {n}")


def _checked(n: int, K: float | Tensor) -> Tensor:
    check_dimension(n)
    raw = torch.as_tensor(K, dtype=torch.float64)
    if checkable(raw) and bool((raw <= 0).any()):
        raise ValueError("a concentration K must be over 0: clamp it, or leave the law uniform")
    return raw
