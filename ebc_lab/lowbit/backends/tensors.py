"""The formulas of `levels` and `packing` on torch's tensors, bit for bit, and a layer (docs/lowbit.md).

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

from .formulas import BLOCK, TOP, Group, Scale, mix, parts_of, steps_shape
from .planes import CODES, PLANES, pack_planes, packed_size, parts, unpack_planes


def torch_steps(
    weight: Tensor, levels: str = "ternary", group: Group = "tensor", scale: Scale = "absmean"
) -> Tensor:
    """The float32 steps of a float32 tensor's groups; NaN where a value of the group is NaN or infinite."""
    shape = steps_shape(tuple(weight.shape), group)
    if weight.numel() == 0:
        return weight.new_zeros(shape)
    steps = [_torch_steps_of_part(part, levels, scale) for part in parts_of(weight, group)]
    found = torch.cat(steps, dim=-1).reshape(shape)
    return found - found * 0  # NaN instead of infinity


def _torch_steps_of_part(groups: Tensor, levels: str, scale: Scale) -> Tensor:
    """(…, width) -> (…): one step per group of equal width."""
    if scale == "absmean":
        return torch_mean(groups).float()
    largest = groups.abs().amax(dim=-1)
    if scale == "absmax":
        return largest * (1 / TOP[levels])  # a division by 1 or 2, exactly
    return largest * 0 + float(scale)


def torch_mean(values: Tensor, power: int = 1) -> Tensor:
    """The float64 mean of |v|^power over the last axis, in any order: `levels.order_free_mean` in torch."""
    length = values.shape[-1]
    whole = length - length % BLOCK
    totals = []
    if whole:
        cut = (*values.shape[:-1], whole // BLOCK, BLOCK)
        totals.append(_torch_block_totals(values[..., :whole].reshape(cut), power))
    if whole < length:
        totals.append(_torch_block_totals(values[..., whole:].unsqueeze(-2), power))
    total = torch.cat(totals, dim=-1)
    count = total.shape[-1]
    width = 1 << (count - 1).bit_length()
    total = torch.nn.functional.pad(total, (0, width - count))
    while width > 1:
        width //= 2
        total = total[..., :width] + total[..., width:]
    return total[..., 0] / torch.full((), length, dtype=torch.float64, device=values.device)


def _torch_block_totals(blocks: Tensor, power: int) -> Tensor:
    """(…, blocks, width) -> (…, blocks): see `levels._block_totals`."""
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
    """Steps in a shape that broadcasts against the weights."""
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
    """step * code of a float32 tensor, +0 where the code is 0; a group with NaN or infinity is all NaN."""
    steps = torch_steps(weight, levels, group, scale)
    # 0 times a step that is not finite is NaN, and no code of such a group is anything but 0
    return torch_decode(torch_codes(weight, steps, levels, group), steps, group)


def torch_codes(weight: Tensor, steps: Tensor, levels: str, group: Group = "tensor") -> Tensor:
    """The nearest int8 codes of a float32 tensor at these steps."""
    step = torch_spread(steps, group, weight.shape[-1] if weight.ndim else 1)
    one = torch.where(step > 0, 0.5 * step, math.inf)
    codes = (weight > one).to(torch.int8) - (weight < -one).to(torch.int8)
    if levels == "five":
        two = torch.where(step > 0, 1.5 * step, math.inf)
        codes = codes + (weight >= two).to(torch.int8) - (weight <= -two).to(torch.int8)
    return codes


def torch_decode(codes: Tensor, steps: Tensor, group: Group = "tensor") -> Tensor:
    """step * code, float32."""
    return codes.float() * torch_spread(steps, group, codes.shape[-1] if codes.ndim else 1)


def torch_uniforms(n: int, key: int, device: Any = None) -> Tensor:
    """`levels.uniforms` as a float32 tensor of shape (n,)."""
    places = torch.arange(n, dtype=torch.int64, device=device)
    hashed = mix((places * 0x9E3779B9 + (key & 0xFFFFFFFF)) & 0xFFFFFFFF)
    return cast("Tensor", (hashed >> 8).float() * 2.0**-24)


def torch_stochastic(values: Tensor, levels: str, step: float | Tensor, key: int) -> Tensor:
    """Stochastic int8 codes of a float32 tensor. `step` may be a float32 tensor of shape (), or of one that
    broadcasts against the values."""
    if not isinstance(step, torch.Tensor):
        step = torch.full((), float(step), dtype=torch.float32, device=values.device)
    position = (values.abs() / step).clamp(max=float(TOP[levels]))
    position = torch.where(step > 0, position, 0.0)
    below = position.floor()
    up = torch_uniforms(values.numel(), key, values.device).reshape(values.shape) < position - below
    return torch.copysign(below + up, values).to(torch.int8)


def torch_stochastic_step(values: Tensor, levels: str) -> Tensor:
    """`levels.stochastic_step` as a float32 tensor of shape (), without a look at the data from the host."""
    if values.numel() == 0:
        return values.new_zeros(())
    root = torch_mean(values.reshape(1, -1), power=2)[0].sqrt()
    largest = values.abs().amax().double()
    return (torch.minimum(largest, 2.5 * root) * (1 / TOP[levels])).float()


def torch_pack(codes: Tensor, levels: str) -> Tensor:
    """Flat int8 codes -> flat uint8 bytes on the same device."""
    n = len(codes)
    data = torch.empty(packed_size(n, levels), dtype=torch.uint8, device=codes.device)
    padded = torch.nn.functional.pad(codes, (0, CODES[levels] * len(data) // PLANES[levels] - n))
    sources = parts(padded, CODES[levels], n, levels)
    for source, target in zip(sources, parts(data, PLANES[levels], n, levels), strict=True):
        pack_planes(source, target, levels)
    return data


def torch_unpack(data: Tensor, n: int, levels: str) -> tuple[Tensor, list[Tensor]]:
    """Flat uint8 bytes -> the n codes, flat int8 on the same device, and tensors that hold a value other than
    0 where the bytes were no codes."""
    codes = torch.empty(CODES[levels] * len(data) // PLANES[levels], dtype=torch.int8, device=data.device)
    wrong = []
    targets = parts(codes, CODES[levels], n, levels)
    for source, target in zip(parts(data, PLANES[levels], n, levels), targets, strict=True):
        wrong.append(unpack_planes(source, target, levels))
    return codes[:n], wrong
