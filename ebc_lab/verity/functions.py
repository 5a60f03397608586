"""Exponential, logarithm, logistic and normal distribution, rotations and random normal numbers, from single
float64 operations.

The platform's own functions differ in their last bits from one set of instructions to the next. These are
polynomials in Horner's form, whose coefficients stand here as they are used; `kernels.c` has the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import divided, exponent, pow2, pow2f


def _coefficients(hexadecimal: str) -> tuple[float, ...]:
    """Read the coefficients of x^0, x^1, …"""
    return tuple(map(float.fromhex, hexadecimal.split()))


LOG2_E = float.fromhex("0x1.71547652b82fep+0")
LN2_HIGH = float.fromhex("0x1.62e42feep-1")
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
ROOT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")
DENSITY_AT_0 = float.fromhex("0x1.9884533d43651p-2")  # 1/sqrt(2 pi)
TWO_PI = float.fromhex("0x1.921fb54442d18p+2")
LEAST_EXP = -700.0  # below, exp64 is 0
SPLIT = 134217729.0  # 2^27 + 1: parts a float64 into two of 26 bits
EXP = _coefficients(
    "0x1.0000000000000p+0 0x1.0000000000000p+0 0x1.0000000000000p-1 "
    "0x1.5555555555555p-3 0x1.5555555555555p-5 0x1.1111111111111p-7 "
    "0x1.6c16c16c16c17p-10 0x1.a01a01a01a01ap-13 0x1.a01a01a01a01ap-16 "
    "0x1.71de3a556c734p-19 0x1.27e4fb7789f5cp-22"
)  # 1/n!
LOG = _coefficients(
    "0x1.0000000000000p+1 0x1.5555555555555p-1 0x1.999999999999ap-2 "
    "0x1.2492492492492p-2 0x1.c71c71c71c71cp-3 0x1.745d1745d1746p-3 "
    "0x1.3b13b13b13b14p-3 0x1.1111111111111p-3 0x1.e1e1e1e1e1e1ep-4 "
    "0x1.af286bca1af28p-4 0x1.8618618618618p-4 0x1.642c8590b2164p-4"
)  # 2/(2n+1)
COS = _coefficients(
    "0x1.0000000000000p+0 -0x1.0000000000000p-1 0x1.5555555555555p-5 "
    "-0x1.6c16c16c16c17p-10 0x1.a01a01a01a01ap-16 -0x1.27e4fb7789f5cp-22 "
    "0x1.1eed8eff8d898p-29 -0x1.93974a8c07c9dp-37 0x1.ae7f3e733b81fp-45"
)  # (-1)^n/(2n)!
SIN = _coefficients(
    "0x1.0000000000000p+0 -0x1.5555555555555p-3 0x1.1111111111111p-7 "
    "-0x1.a01a01a01a01ap-13 0x1.71de3a556c734p-19 -0x1.ae64567f544e4p-26 "
    "0x1.6124613a86d09p-33 -0x1.ae7f3e733b81fp-41 0x1.952c77030ad4ap-49"
)  # (-1)^n/(2n+1)!
ERFC = _coefficients(
    "0x1.46e80e2276062p+0 -0x1.7bf5ec17849aep-4 -0x1.5407beb68c3f1p-3 "
    "0x1.4ffa1e1c266e5p-3 -0x1.bc2b99645051dp-5 -0x1.0742357d441f9p-7 "
    "0x1.1dd3a7624b617p-7 0x1.4d4573c13c2d4p-10 -0x1.7e07f02e0edcap-10 "
    "-0x1.dc5779d15d0a3p-12 0x1.b483bf93a2a8cp-13 0x1.3c92818de58c4p-13 "
    "-0x1.5bd892fa4e23cp-18 -0x1.3425102871dcfp-15 -0x1.2d28fa1411c3ep-17 "
    "0x1.472d98a647cd9p-18 0x1.295923152889bp-19"
)  # of exp(z²)·erfc(z)·(1+2z) in (z-2)/(z+2), relative error 2.5e-12


def horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Return a polynomial's value, from its highest power down: p·x, then p + c."""
    p = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        p.mul_(x).add_(c)
    return p


def exp64(x: Tensor) -> Tensor:
    """Return exp(x) of float64 x <= 0, relative error 3e-13; 0 below -700."""
    # x = k·ln 2 + r with |r| <= ln(2)/2: a power of two times a polynomial of r
    k = (x * LOG2_E).round()
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    p = horner(r, EXP)
    inside = x >= LEAST_EXP
    power = p * pow2(torch.where(inside, k, 0.0).to(torch.int64))
    return torch.where(inside, power, torch.where(x < LEAST_EXP, 0.0, x))  # NaN stays


def log64(x: Tensor) -> Tensor:
    """Return ln(x) of float64 x > 0, normal, relative error 3e-13."""
    # x = m·2^e with m within [√½, √2): ln m is a series in s = (m - 1)/(m + 1)
    e = exponent(x)
    m = x * pow2(-e)
    low = m < ROOT_HALF
    m = torch.where(low, m + m, m)
    e = torch.where(low, e - 1, e).double()
    s = divided(m - 1.0, m + 1.0)
    p = horner(s * s, LOG)
    p = p * s + e * LN2_LOW
    return e * LN2_HIGH + p


def phi64(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the standard normal distribution function of float64 x, and exp(-x²/2)."""
    a = x.abs()
    E = exp64(-((x * x) * 0.5))
    z = a * ROOT_HALF
    P = horner(divided(z - 2.0, z + 2.0), ERFC)
    P = divided(P, (z + z) + 1.0)
    P = (P * E) * 0.5
    return torch.where(x > 0, 1.0 - P, P), E


def gelu64(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x·Phi(x) of float64 x, and its derivative."""
    phi, E = phi64(x)
    return x * phi, phi + (E * DENSITY_AT_0) * x


def silu64(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x·sigma(x) of float64 x with sigma(x) = 1/(1 + exp(-x)), and its derivative."""
    E = exp64(-x.abs())
    large = divided(torch.ones_like(E), E + 1.0)  # sigma(|x|)
    small = large * E  # 1 - sigma(|x|), without a difference that cancels
    positive = x > 0
    y = x * torch.where(positive, large, small)
    return y, torch.where(positive, large, small) + y * torch.where(positive, small, large)


def cos2pi(v: Tensor) -> Tensor:
    """Return cos(2·pi·v) of float64 v in [0, 1)."""
    # the nearest quarter of a turn says which of cosine and sine it is, and its sign
    k = (v * 4.0).round()
    r = (v - k * 0.25) * TWO_PI
    q = r * r
    cosine = horner(q, COS)
    sine = horner(q, SIN) * r
    quarter = k.to(torch.int64) & 3
    magnitude = torch.where((quarter & 1) == 0, cosine, sine)
    return torch.where((quarter == 1) | (quarter == 2), -magnitude, magnitude)


def rotations(T: int, D: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of t·base^(-2i/D), (T, D/2) float64, for places t and pairs i; base >= 1."""
    shares = divided(torch.arange(0, D, 2, device=device).double(), float(D))
    rates = exp64(-(log64(torch.full_like(shares, base)) * shares))
    turns = torch.arange(T, device=device).double()[:, None] * divided(rates, TWO_PI)
    v = turns - turns.floor()
    earlier = v + 0.75  # a sine is the cosine a quarter of a turn before
    return cos2pi(v), cos2pi(earlier - earlier.floor())


def sqrt64(x: Tensor) -> Tensor:
    """Return the square root of float64 x >= 0, correctly rounded.

    torch's own is off by a last bit for 1 in 100 values where it calls MKL, and for other values with other
    instructions. x - s² is exact (Dekker's product), and tells whether the neighbour of s is nearer. For x
    between 2^-900 and 2^900, and for 0; NaN stays.
    """
    s = x.sqrt()
    bits = s.view(torch.int64)
    above = (bits + 1).view(torch.float64) - s
    below = s - (bits - 1).view(torch.float64)
    c = s * SPLIT
    high = c - (c - s)
    low = s - high
    square = s * s
    error = ((high * high - square) + (high * low) * 2.0) + low * low
    rest = (x - square) - error
    s_up = torch.where(rest > s * above, s + above, s)
    return torch.where((x > 0) & (rest <= -(s * below)), s - below, s_up)


def sqrt32(x: Tensor) -> Tensor:
    """Return the square root of float32 x, correctly rounded: float64 has more than twice the digits."""
    return sqrt64(x.double()).float()


@torch.no_grad()
def normal_(t: Tensor, std: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Fill float32 `t` with normal numbers of deviation `std`, drawn on the CPU (Box & Muller 1958)."""
    a = torch.randint(0, 2**31, (t.numel(), 4), generator=generator)
    u = (a[:, 0] * 2**21 + (a[:, 1] >> 10) + 1).double() * pow2f(-52)
    v = (a[:, 2] * 2**21 + (a[:, 3] >> 10)).double() * pow2f(-52)
    drawn = (sqrt64(log64(u) * -2.0) * cos2pi(v)) * std
    return t.copy_(drawn.float().view(t.shape))
