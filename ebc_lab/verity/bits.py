"""Exponents, powers of two, and sums whose bits are fixed: what the rest of the library stands on.

Two rules make results independent of the machine (docs/verity.md). A product of matrices of integers that are
small enough is exact in float64, in any order. Everything else is one IEEE operation after another, each
rounded once, in the order that the source gives.

Matrix products without rounding from parts of few bits: Ozaki et al. 2012.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NOT_FINITE = 1025  # the exponent of NaN and of infinity
LEAST_EXPONENT = -900  # of a grid: a sum of smaller terms is zero


class VerityError(ArithmeticError):
    """Something that would make wrong or machine-dependent bits: a value that is not finite, a platform that
    does not compute as IEEE 754 says, a layer that is not exact, or grids that belong to another model."""


def lg(n: int) -> int:
    """Return ceil(log2 n), n >= 1."""
    return (n - 1).bit_length()


def bits_for(K: int) -> int:
    """Return how many bits either factor may have, so that a sum of K products stays below 2^53."""
    return min(24, (53 - lg(K)) // 2)


def left_for(K: int, taken: int) -> int:
    """Return the same for one factor, where the other has `taken` bits."""
    return min(24, 53 - taken - lg(K))


def exponent(m: Tensor) -> Tensor:
    """Return e with 2^(e-1) <= |m| < 2^e, int64 of m's shape: 0 of zero, 1025 of NaN and infinity.

    Of float64, subnormal numbers count as the smallest normal one's half.
    """
    wide = m.double()
    e = (wide.view(torch.int64) >> 52 & 0x7FF) - 1022
    return torch.where(wide == 0, 0, e)


def pow2(s: Tensor) -> Tensor:
    """Return 2^s, float64 of the shape of s, int64 in -1022…1023; made of its bits."""
    return (s + 1023 << 52).view(torch.float64)


def pow2f(s: int) -> float:
    """Return 2^s as a number."""
    return float.fromhex(f"0x1p{s}")


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no number of these is NaN or infinite: all in one look, where a GPU holds them."""
    flags = [torch.isfinite(t).all() for t in tensors]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


def largest(x: Tensor) -> Tensor:
    """Return the largest |x|, 0-dim; NaN if there is one, 0 of nothing."""
    return x.abs().amax() if x.numel() else x.new_zeros(())


def tree_sum(x: Tensor) -> Tensor:
    """Return the sum over the last dimension as a tree of float64 additions: (…, n) -> (…), 0 for n = 0.

    While n > 1: h = ceil(n/2), a[i] += a[i+h] for i < n-h, n = h.
    """
    n = x.shape[-1]
    if n == 0:
        return x.new_zeros(x.shape[:-1], dtype=torch.float64)
    if n == 1:
        return x[..., 0].double()
    h = (n + 1) // 2
    a = x[..., :h].double().clone()
    a[..., : n - h] += x[..., h:n]
    while h > 1:
        n, h = h, (h + 1) // 2
        a[..., : n - h] += a[..., h:n]
    return a[..., 0].clone()


def divided(a: Tensor, b: Tensor | float) -> Tensor:
    """Return a/b, rounded once. b is spread out: by a scalar, a GPU multiplies with its reciprocal."""
    spread = torch.full_like(a, b) if isinstance(b, float) else b.expand_as(a).contiguous()
    return a / spread
