"""Training through the quantizer: the forward sees the effective weight, the gradient passes through it.

* Forward: the values that `quantize` gives, bit for bit, computed anew from the weight at every call. Nothing
  is cached, because weights are also swapped without torch noticing (no version bump).
* Backward and forward-mode derivative: the identity; the step is a constant.
* Where torch transforms or traces the call (`jvp` inside `vmap`, `torch.compile`), and on a GPU, it is plain
  torch operations; elsewhere what the dispatcher measured to be quickest. The bits are the same.
* A group that holds NaN or infinity has no finite value: the forward of a diverged run does not raise, its
  loss is NaN. `quantize` itself does raise.

The maths is in docs/lowbit.md, "Training through the quantizer". The straight-through estimator: Bengio,
Léonard & Courville, arXiv:1308.3432.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .backends.formulas import Group, Scale, check_group, check_levels, check_scale
from .backends.tensors import torch_codes, torch_effective, torch_steps
from .dispatch import default_dispatcher


class _Compiled(torch.autograd.Function):
    """(weight, levels, group, scale) -> effective weight; torch.compile traces no Function with a `jvp`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, levels: str, group: Group, scale: Scale) -> Tensor:
        return effective(weight, levels, group, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = output.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient, None, None, None


class _StraightThrough(_Compiled):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *constants: None) -> Tensor:
        return tangent.to(ctx.dtype, copy=True)  # a derivative may not be a view of the one that came in


def straight_through(
    weight: Tensor, levels: str, group: Group = "tensor", scale: Scale = "absmean"
) -> Tensor:
    """Return the effective weight step·code of a weight, whose gradient is that of the weight itself.

    Args:
        weight: real; (rows, columns) for the groups other than `tensor`. It is read as float32.
        levels, group, scale: as in `quantize`.
    Returns:
        Of the weight's shape, float32 (float64 for a float64 weight), under autocast too; NaN throughout a
        group that holds NaN or infinity.
    Raises:
        ValueError: unknown levels, group or scale, or a group that needs a matrix.
    """
    function = _Compiled if torch.compiler.is_compiling() else _StraightThrough
    return cast(Tensor, function.apply(weight, levels, group, scale))  # type: ignore[no-untyped-call]


def effective(weight: Tensor, levels: str, group: Group, scale: Scale) -> Tensor:
    """Return what `straight_through` does, without a gradient."""
    latent = _float32(weight, levels, group, scale)
    values: Tensor | None = None
    if weight.device.type == "cpu" and not traced(weight):
        try:
            values = default_dispatcher().quantize(latent.detach(), levels, scale, group)
        except ValueError:
            if latent.isfinite().all():
                raise
    if values is None:
        values = torch_effective(latent, levels, group, scale)
    return values.double() if weight.dtype == torch.float64 else values


def codes_of(weight: Tensor, levels: str, group: Group = "tensor", scale: Scale = "absmean") -> Tensor:
    """Return a weight's int8 codes at this moment, for recording; 0 throughout a group that is not finite."""
    with torch.no_grad():
        latent = _float32(weight.detach(), levels, group, scale)
        steps = torch_steps(latent, levels, group, scale)
        steps = torch.where(steps.isfinite(), steps, 0.0)
        return torch_codes(latent.nan_to_num(0.0, 0.0, 0.0), steps, levels, group)


def flip_share(before: Tensor, after: Tensor) -> Tensor:
    """Return the share of codes that differ, 0-dim float32; 0 for no codes. ValueError on unequal shapes."""
    if before.shape != after.shape:
        raise ValueError(
            f"codes of shape {tuple(before.shape)} and {tuple(after.shape)} cannot be compared: "
            "both must be of one weight."
        )
    return (before != after).float().sum() / max(1, before.numel())


def traced(tensor: Tensor) -> bool:
    """Say whether torch transforms or compiles the call: its memory must not be touched then."""
    if torch.compiler.is_compiling():
        return True
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return not plain or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _float32(weight: Tensor, levels: str, group: Group, scale: Scale) -> Tensor:
    check_levels(levels)
    check_scale(scale)
    check_group(group, tuple(weight.shape))
    if weight.is_complex():
        raise ValueError(f"a weight must be real to be quantized, not {weight.dtype}.")
    return weight.float()
