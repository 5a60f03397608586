"""A step's numbers: Python floats where the weights are on a CPU, else 0-dim float64 tensors.

On a CPU one operation on a 0-dim tensor takes as long as ten thousand additions. On a GPU a float would stop
the host until the device has caught up, and a CUDA graph holds what the device computes and nothing else. So
each rule of a step is written once, with Python's operators and what is here, and gives the same for both:
NaN goes through, and nothing raises an error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Number = float | Tensor
Flag = bool | Tensor


def number(measured: Tensor, on_host: bool) -> Number:
    """A 0-dim tensor as the other numbers are, which the host may read or not."""
    return float(measured) if on_host else measured.double()


def where(condition: Flag, yes: Number, no: Number) -> Number:
    """`yes` where the condition holds, else `no`."""
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


def constant(value: float, like: Number) -> Number:
    """A number that is known, as the others are."""
    return torch.full_like(like, value) if isinstance(like, Tensor) else value


def negated(flag: Flag) -> Flag:
    """Whether it does not hold."""
    return ~flag if isinstance(flag, Tensor) else not flag


def is_finite(x: Number) -> Flag:
    """Whether it is neither infinite nor NaN."""
    return torch.isfinite(x) if isinstance(x, Tensor) else math.isfinite(x)


def least(x: Number, y: Number) -> Number:
    """The smaller of two numbers, NaN if one of them is; y is a constant or like x."""
    if isinstance(x, Tensor):
        return x.minimum(y) if isinstance(y, Tensor) else x.clamp_max(y)  # clamp(max=NaN) is x in torch 2.9
    assert isinstance(y, float)
    return x if x < y or x != x else y


def most(x: Number, y: Number) -> Number:
    """The larger of two numbers, NaN if one of them is; y is a constant or like x."""
    if isinstance(x, Tensor):
        return x.maximum(y) if isinstance(y, Tensor) else x.clamp_min(y)
    assert isinstance(y, float)
    return x if x > y or x != x else y


def over(x: Number, y: Number) -> Number:
    """x / y; for y = 0 infinity or NaN."""
    if isinstance(x, Tensor) or isinstance(y, Tensor) or y != 0:
        return x / y
    return x * math.inf


def root(x: Number) -> Number:
    """The square root, NaN below 0."""
    if isinstance(x, Tensor):
        return x.sqrt()
    return math.sqrt(x) if x >= 0 else math.nan


def log(x: Number) -> Number:
    """The natural logarithm, -infinity at 0 and NaN below."""
    if isinstance(x, Tensor):
        return x.log()
    if x > 0:
        return math.log(x)
    return -math.inf if x == 0 else math.nan


def exp(x: Number) -> Number:
    """e to the x, infinite where a double cannot hold it."""
    if isinstance(x, Tensor):
        return x.exp()
    return math.exp(x) if x < 709.78 or x != x else math.inf
