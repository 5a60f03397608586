"""Values in three or five levels: the step of a group, the nearest and the stochastic codes (docs/lowbit.md).

A code q is an integer in [-top, top]; what it stands for is step * q. `ternary` has top 1, `five` top 2. The
functions take anything that numpy or torch calls an array, check it, and have a backend compute.

Ternary weights: Li et al., arXiv:1605.04711; with the mean magnitude as step: Ma et al., arXiv:2402.17764.
Stochastic codes: Gupta et al., arXiv:1502.02551.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np

from .backends import get_backend
from .backends.formulas import (
    CLIP_AT,
    Codes,
    Floats,
    Group,
    Scale,
    as_float32,
    check_finite,
    check_group,
    check_levels,
    decode,
    root_mean_square,
    uniforms_of,
)
from .backends.formulas import rounding_key as rounding_key


@dataclass(frozen=True, eq=False)
class Quantized:
    """Codes and steps of one array.

    `codes` is int8 and has the array's shape; `steps` is float32 of shape () for the group "tensor", (rows,)
    for "row" and (rows, ceil(columns / g)) for a count g of neighbours in a row.
    """

    codes: Codes
    steps: Floats
    levels: str
    group: Group

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def values(self) -> Floats:
        """Return step * code, float32, of the codes' shape; +0 where the code is 0."""
        return cast(Floats, decode(np, self.codes, self.steps, self.group))


def absmean(values: object) -> np.float32:
    """Return the mean magnitude, the step of `quantize`: the same bits in any order; 0 for an empty array."""
    return np.float32(quantize(values).steps)


def quantize(
    values: object,
    levels: str = "ternary",
    *,
    group: Group = "tensor",
    scale: Scale = "absmean",
    backend: str = "numpy",
) -> Quantized:
    """Return the nearest codes of an array and the steps of its groups, as numpy arrays.

    `scale` is "absmean" (a group's mean magnitude), "absmax" (its largest over top) or the step itself.
    ValueError for NaN, infinity, complex or object input, and for names that do not exist.
    """
    weights = as_float32(values)
    group = check_group(group, weights.shape)
    codes, steps = get_backend(backend).quantize(weights, levels, group, scale)
    return Quantized(np.asarray(codes), np.asarray(steps), levels, group)


def quantize_stochastic(
    values: object, levels: str, *, step: float, key: int, backend: str = "numpy"
) -> Codes:
    """Draw codes so that step * code has the mean `value`, for |value| <= top * step; larger are clipped.

    `key` is a `rounding_key`. The draw of a place depends on the key and the place in row-major order only.
    """
    weights = as_float32(values)
    check_finite(weights)
    return cast(Codes, np.asarray(get_backend(backend).stochastic(weights, levels, step, key)))


def stochastic_step(values: object, levels: str) -> np.float32:
    """Return the step for stochastic codes of a gradient: min(max |a|, 2.5 root mean squares) / top."""
    top = check_levels(levels)
    array = as_float32(values)
    check_finite(array)
    if array.size == 0:
        return np.float32(0)
    largest = float(np.abs(array).max())
    return np.float32(min(largest, CLIP_AT * root_mean_square(array)) / top)


def uniforms(n: int, key: int) -> Floats:
    """Return n numbers in [0, 1), multiples of 2^-24, float32, (n,): the hash of each place and the key."""
    if n < 0:
        raise ValueError(f"a count of numbers cannot be negative: {n}")
    return cast(Floats, uniforms_of(np, n, key))


def entropy_bits(codes: object) -> float:
    """Return the entropy of the codes' frequencies, bits per code: what an ideal coder needs; 0 for none."""
    _, counts = np.unique(np.asarray(codes), return_counts=True)
    shares = counts / max(1, counts.sum())
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def zero_share(codes: object) -> float:
    """Return the share of the codes that are 0; 0 for no codes."""
    array = np.asarray(codes)
    return 1.0 - np.count_nonzero(array) / array.size if array.size else 0.0
