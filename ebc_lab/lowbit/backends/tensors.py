"""The formulas of `formulas` on torch's tensors, bit for bit (docs/lowbit.md).

The formulas are pure functions of tensors: no control flow depends on data and nothing is looked at from the
host, so they may be compiled, captured in a CUDA graph, and used under the transforms of `torch.func`. They
check nothing; `backends.TorchBackend` does. Two traps on the way to equal bits: torch on CUDA turns a
division by a host number into a product with its reciprocal (so divisors are tensors of the device), and its
`ldexp` goes through `pow` (so powers of two are put together from bits).
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from .formulas import CLIP_AT, TOP, Group, Scale, in_groups, mix, order_free_total, steps_shape
from .planes import Empty, pack_flat, unpack_flat


def torch_steps(
    weight: Tensor, levels: str = "ternary", group: Group = "tensor", scale: Scale = "absmean"
) -> Tensor:
    """Return the float32 steps of a float32 tensor's groups; NaN where a group holds NaN or infinity."""

    def step_of(groups: Tensor) -> Tensor:
        if scale == "absmean":
            return torch_mean(groups).float()
        largest = groups.abs().amax(dim=-1)
        if scale == "absmax":
            return largest * (1 / TOP[levels])  # a division by 1 or 2, exactly
        return largest * 0 + float(scale)

    if weight.numel() == 0:
        return weight.new_zeros(steps_shape(tuple(weight.shape), group))
    return cast(Tensor, in_groups(torch, weight, group, step_of))


def torch_mean(values: Tensor, power: int = 1) -> Tensor:
    """Return the float64 mean of |v|^power over the last axis: `formulas.order_free_mean` in torch."""
    total: Tensor = order_free_total(torch, values, power, _torch_block_totals)
    return total / torch.full((), values.shape[-1], dtype=torch.float64, device=values.device)


def _torch_block_totals(xp: Any, blocks: Tensor, power: int) -> Tensor:
    """Return each block's sum, (…, blocks, width) -> (…, blocks): `formulas._counted` in torch."""
    magnitudes = blocks.abs()
    largest = magnitudes.amax(dim=-1)
    exponent = ((largest.view(torch.int32) >> 23) & 0xFF).clamp(min=37)
    bits = 30 // power
    scale = ((bits + 253 - exponent) << 23).view(torch.float32)
    unit = ((exponent - bits + 1) << 23).view(torch.float32).double()
    counts = torch.round(magnitudes * scale.unsqueeze(-1))
    if power == 2:
        counts = counts.double().square()
        unit = unit * unit
    totals = counts.sum(dim=-1, dtype=torch.float64) * unit
    return torch.where(largest < 2.0**-90, 0.0, totals)


def torch_spread(steps: Tensor, group: Group, columns: int) -> Tensor:
    """Return steps in a shape that broadcasts against the weights."""
    if group == "tensor":
        return steps
    if group == "row":
        return steps.unsqueeze(-1)
    # Not repeat_interleave and a slice: torch 2.13's compiler makes wrong code of the two on a CPU.
    places = torch.arange(columns, device=steps.device) // cast(int, group)
    return steps[..., places]


def torch_effective(
    weight: Tensor, levels: str = "ternary", group: Group = "tensor", scale: Scale = "absmean"
) -> Tensor:
    """Return step * code of a float32 tensor, +0 where the code is 0; NaN where a group is not finite."""
    steps = torch_steps(weight, levels, group, scale)
    # 0 times a step that is not finite is NaN, and no code of such a group is anything but 0
    return torch_decode(torch_codes(weight, steps, levels, group), steps, group)


def torch_codes(weight: Tensor, steps: Tensor, levels: str, group: Group = "tensor") -> Tensor:
    """Return the nearest int8 codes of a float32 tensor at these steps."""
    step = torch_spread(steps, group, weight.shape[-1] if weight.ndim else 1)
    one = torch.where(step > 0, 0.5 * step, math.inf)
    codes = (weight > one).to(torch.int8) - (weight < -one).to(torch.int8)
    if levels == "five":
        two = torch.where(step > 0, 1.5 * step, math.inf)
        codes = codes + (weight >= two).to(torch.int8) - (weight <= -two).to(torch.int8)
    return codes


def torch_decode(codes: Tensor, steps: Tensor, group: Group = "tensor") -> Tensor:
    """Return step * code, float32."""
    return codes.float() * torch_spread(steps, group, codes.shape[-1] if codes.ndim else 1)


def torch_uniforms(n: int, key: int, device: Any = None) -> Tensor:
    """Return `levels.uniforms` as a float32 tensor of shape (n,)."""
    places = torch.arange(n, dtype=torch.int64, device=device)
    hashed = mix((places * 0x9E3779B9 + (key & 0xFFFFFFFF)) & 0xFFFFFFFF)
    return cast("Tensor", (hashed >> 8).float() * 2.0**-24)


def torch_stochastic(values: Tensor, levels: str, step: float | Tensor, key: int) -> Tensor:
    """Draw stochastic int8 codes of a float32 tensor. `step` may be a float32 tensor of shape (), or of one
    that broadcasts against the values."""
    if not isinstance(step, torch.Tensor):
        step = torch.full((), float(step), dtype=torch.float32, device=values.device)
    position = (values.abs() / step).clamp(max=float(TOP[levels]))
    position = torch.where(step > 0, position, 0.0)
    below = position.floor()
    up = torch_uniforms(values.numel(), key, values.device).reshape(values.shape) < position - below
    return torch.copysign(below + up, values).to(torch.int8)


def torch_stochastic_step(values: Tensor, levels: str) -> Tensor:
    """Return `levels.stochastic_step` as a float32 tensor, (), without a look at the data from the host."""
    if values.numel() == 0:
        return values.new_zeros(())
    root = torch_mean(values.reshape(1, -1), power=2)[0].sqrt()
    largest = values.abs().amax().double()
    return (torch.minimum(largest, CLIP_AT * root) * (1 / TOP[levels])).float()


def torch_pack(codes: Tensor, levels: str) -> Tensor:
    """Return int8 codes, row-major, as flat uint8 bytes."""
    return cast(Tensor, pack_flat(codes.reshape(-1), levels, empty_on(codes.device)))


def torch_unpack(data: Tensor, n: int, levels: str) -> Tensor:
    """Return the n codes in flat uint8 bytes, flat int8."""
    return cast(Tensor, unpack_flat(data, n, levels, empty_on(data.device))[0])


def empty_on(device: torch.device) -> Empty:
    """Make what makes empty tensors on a device."""
    return lambda n, dtype: torch.empty(n, dtype=getattr(torch, dtype), device=device)
