"""How logits are made of a model's output, where they are no view of it: stacked, cast, behind a head.

The loss's gradient comes back to the output alone. What it says of the logits is found by calling `logits_of`
once more, on the output's leading rows: which of its tensors they are made of; which of its elements each
logit is, where each is one; and which positions do not move with what the loss depends on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import checks, losses
from .losses import Gradient
from .numbers import kept

STEP = 0.01  # of a value, what it is moved by to see what moves with it
ROUNDING = 1e-6  # of a position's largest logit: what does not count as movement


def tensors_of(output: Any) -> list[Tensor]:
    """Those in what a forward returns: nested, or an object's attributes."""
    return list(checks.tensors_in(output)) or list(checks.tensors_in(getattr(output, "__dict__", None)))


def rows_of(t: Tensor, size: int, axis: int) -> Tensor | None:
    """An output's tensor with the batch's `size` rows in front, flattened ones too; None if it has none."""
    if t.ndim > axis and t.shape[axis] == size:
        return t.movedim(axis, 0)
    if axis == 0 and t.ndim and t.shape[0] and t.shape[0] % size == 0:
        flattened: Tensor = t.unflatten(0, (size, -1))
        return flattened
    return None


class Source:
    """The output of one training forward, its leading rows, and the logits that `logits_of` makes of them.

    Args:
        model: its buffers are as before afterwards, whatever `logits_of` calls.
        output, logits: of the forward; the logits with rows first.
        axis: the batch's, in the output.
    Raises:
        ValueError: where it cannot be told.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        logits_of: Callable[[Any], Any],
        output: Any,
        logits: Tensor,
        axis: int,
    ):
        self.axis = axis
        self.size = len(logits)
        self.rows = min(self.size, losses.leading_rows(logits))
        self._logits_of = logits_of
        self._buffers = list(model.buffers())
        whole = tensors_of(output)
        self._output = _replaced(output, {id(t): self._cut(t).detach().clone() for t in whole})
        self._leaves = tensors_of(self._output)
        graded = [i for i, t in enumerate(whole) if t.requires_grad]
        starts = {i: self._leaves[i].clone().requires_grad_() for i in graded}
        with torch.enable_grad():
            z = self._made(starts)
            if z.shape != logits[: self.rows].shape or not z.requires_grad:
                raise ValueError("other logits than those of the forward")
            used = torch.autograd.grad(
                z, list(starts.values()), _noise(z), allow_unused=True, retain_graph=True
            )
            self.places = [i for i, g in zip(graded, used, strict=True) if g is not None and bool(g.any())]
            self.elements = self._elements(z, starts[self.places[0]]) if len(self.places) == 1 else None
            # weights of its own, as a head's, take part of the loss's fall
            self.has_weights = self._made({}).requires_grad
        self.shape = z.shape
        self.gradients: dict[int, Gradient] = {}

    def _cut(self, t: Tensor) -> Tensor:
        """The leading rows, where they stand."""
        whole = rows_of(t, self.size, self.axis)
        if whole is None:
            return t
        rows = whole[: self.rows]
        return rows.flatten(0, 1) if whole.ndim > t.ndim else rows.movedim(0, self.axis)

    def _made(self, values: dict[int, Tensor]) -> Tensor:
        """The logits of these values in the places of the output's, rows first."""
        at = {id(self._leaves[i]): value for i, value in values.items()}
        before = [b.clone() for b in self._buffers]
        with kept():
            z = checks.logits_in(self._logits_of(_replaced(self._output, at)))
        for b, old in zip(self._buffers, before, strict=True):
            if not torch.equal(b, old):
                b.data.copy_(old)  # not seen by autograd, which has its own use of it
        return z.movedim(self.axis, 0) if self.axis else z

    def _elements(self, z: Tensor, start: Tensor) -> tuple[Tensor, Tensor] | None:
        """For each logit, which element of the output it is, -1 for a constant, and for each element by how
        much its logit moves with it; None where one is several, or a logit is made of several, or where
        constants are not the same classes everywhere."""

        def back(weights: Tensor) -> Tensor:
            (g,) = torch.autograd.grad(z, start, weights.to(z.dtype), retain_graph=True)
            return g.flatten().float()

        slope = back(torch.ones_like(z))
        feeds = slope != 0
        base = 64 if z.dtype in (torch.bfloat16, torch.float16) else 1024  # digits that the dtype holds
        number = torch.arange(z.numel(), device=z.device).view(z.shape)
        which = torch.zeros_like(feeds, dtype=torch.long)
        place = 1
        while place < z.numel():
            digit = (back(number // place % base) / slope).nan_to_num(-1.0, -1.0, -1.0).round().long()
            which += digit.clamp(0, base - 1) * place
            place *= base
        which = which.clamp(max=z.numel() - 1)
        noise = _noise(z)
        expected = slope * noise.flatten().float()[which]
        near = (back(noise) - expected).abs() <= 0.02 * slope.abs()
        once = torch.bincount(which[feeds], minlength=1).max() <= 1
        if not feeds.any() or not bool(near[feeds].all()) or not bool(once):
            return None
        of = torch.full((z.numel(),), -1, device=z.device)
        of[which[feeds]] = feeds.nonzero()[:, 0]
        known = (of >= 0).view(z.shape).flatten(0, -2)
        return (of, slope) if bool((known == known[0]).all()) else None

    def came(self, place: int, gradient: Tensor) -> None:
        """A gradient has come back to the output's tensor there."""
        whole = rows_of(gradient, self.size, self.axis)
        new = losses.of_rows(gradient if whole is None else whole, self.rows)
        old = self.gradients.get(place)
        self.gradients[place] = new if old is None else old + new

    def by_logits(self) -> Gradient | None:
        """The loss's gradient by the logits, where each is one element of the output, or a constant."""
        if self.elements is None:
            return None
        (place,) = self.places
        by_output = self._as_it_stands(place)
        if by_output is None:
            return None
        gradient = self.gradients[place]
        of, slope = self.elements
        g = torch.where(of >= 0, (by_output.flatten() / slope)[of], 0.0).view(self.shape)
        known = (of >= 0).view(self.shape).flatten(0, -2)[0]
        mass = gradient.mass * float(g.abs().sum()) / max(float(gradient.rows.abs().sum()), 1e-38)
        return Gradient(g, mass, None if bool(known.all()) else known)

    def _as_it_stands(self, place: int) -> Tensor | None:
        """The gradient that has come back there, float32, laid out as the output's leading rows; None where
        none has, or the logits have other rows than the output."""
        gradient = self.gradients.get(place)
        g = torch.empty_like(self._leaves[place], dtype=torch.float32)
        front = rows_of(g, self.rows, self.axis)
        front = g if front is None else front
        if gradient is None or front.shape != gradient.rows.shape:
            return None
        front.copy_(gradient.rows)
        return g

    def idle(self, mask: Tensor | None) -> float:
        """The share of the positions that count, in these rows, that the loss does not depend on: those that
        stay where they are when all moves that the loss depends on. NaN where a gradient is not known."""
        moved = {}
        for i in self.places:
            leaf, g = self._leaves[i], self._as_it_stands(i)
            if g is None:
                return math.nan
            size = torch.where(leaf == 0, leaf.abs().float().mean().to(leaf.dtype), leaf.abs())
            moved[i] = torch.where(g != 0, leaf + STEP * size * _noise(leaf), leaf)
        z = self._made({}).detach().float()
        shift = (self._made(moved).detach().float() - z).nan_to_num(0.0, 0.0, 0.0)
        shift = (shift - shift.mean(-1, keepdim=True)).abs().amax(-1)
        return losses.share_of(shift <= ROUNDING * z.nan_to_num(0.0, 0.0, 0.0).abs().amax(-1), mask)


def _noise(like: Tensor) -> Tensor:
    """Numbers between -1 and 1, the same each time, none of which is near 0."""
    generator = torch.Generator().manual_seed(0)
    noise = 2 * torch.rand(like.shape, generator=generator) - 1
    return ((noise + noise.sign()) / 2).to(like.device, like.dtype)


def _replaced(output: Any, tensors: dict[int, Tensor]) -> Any:
    """What a forward returned with other tensors in the places of its own, by their ids."""
    if isinstance(output, Tensor):
        return tensors.get(id(output), output)
    if isinstance(output, tuple | list):
        parts = [_replaced(v, tensors) for v in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    if isinstance(output, Mapping):
        mapping: Any = copy.copy(output)
        for key, value in output.items():
            mapping[key] = _replaced(value, tensors)
        return mapping
    if hasattr(output, "__dict__"):
        again = copy.copy(output)
        vars(again).update({name: _replaced(v, tensors) for name, v in vars(output).items()})
        return again
    return output
