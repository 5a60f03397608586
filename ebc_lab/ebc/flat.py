"""Weights that lie one after the other in memory, taken as one tensor: what is done to all of them is then one kernel.

`lay_flat` puts a model's weights so; `segments` finds out how they lie, whoever has put them there, and `Copy` keeps a copy of
them that lies alike. Weights that lie anyhow work too, only slower.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes: each weight starts on a cache line


@dataclass(frozen=True)
class Segment:
    """Neighbouring weights, by their places in a list, and the memory they lie in: one flat view, or the only weight itself."""

    members: tuple[int, ...]
    tensor: Tensor


def _room(weight: Tensor) -> int:
    """Elements from the start of a weight to where its neighbour may begin."""
    step = max(1, ALIGNMENT // weight.element_size())
    return -(-weight.numel() // step) * step


@torch.no_grad()
def lay_flat(weights: Iterable[nn.Parameter]) -> None:
    """Move weights into one stretch of memory for each device and dtype, in their order; values and objects stay the same.

    To be done after `model.to(...)`, which would tear them apart again. The gaps between them are zeros.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
    for p in weights:
        kinds.setdefault((p.device, p.dtype), []).append(p)
    for (device, dtype), members in kinds.items():
        flat = torch.zeros(sum(map(_room, members)), device=device, dtype=dtype)
        at = 0
        for p in members:
            place = flat[at : at + p.numel()].view(p.shape)
            place.copy_(p)
            p.data = place
            at += _room(p)


def addresses(weights: Sequence[Tensor]) -> list[int]:
    """Where each weight lies; it changes when somebody moves it. (Whoever holds a `Segment` keeps its memory from reuse.)"""
    return [p.data_ptr() for p in weights]


def segments(weights: Sequence[Tensor], marks: Sequence[bool]) -> list[Segment]:
    """The weights as maximal runs of neighbours that bear the same mark."""
    where = [(p.untyped_storage()._cdata, int(p.storage_offset())) for p in weights]
    runs: list[list[int]] = []
    for i, w in enumerate(weights):
        if runs and w.is_contiguous():
            j = runs[-1][-1]
            before = weights[j]
            gap = where[i][1] - where[j][1] - before.numel()
            alike = (marks[i], w.dtype, where[i][0]) == (marks[j], before.dtype, where[j][0])
            if alike and before.is_contiguous() and 0 <= gap <= _room(before) - before.numel():
                runs[-1].append(i)
                continue
        runs.append([i])
    return [Segment(tuple(run), _joined(weights, where, run)) for run in runs]


def _joined(weights: Sequence[Tensor], where: Sequence[tuple[int, int]], run: Sequence[int]) -> Tensor:
    first, last = weights[run[0]].detach(), weights[run[-1]]
    if len(run) == 1:
        return first
    start = where[run[0]][1]
    return first.as_strided((where[run[-1]][1] + last.numel() - start,), (1,), start)


class Copy:
    """A copy of weights that lies as they do: `parts` for the segments, `views` one a weight. `store` fills it."""

    def __init__(self, weights: Sequence[Tensor], lying: Sequence[Segment]):
        self.segments = lying
        self.parts = [torch.empty_like(s.tensor) for s in lying]
        self.views: list[Tensor] = [torch.empty(0)] * len(weights)
        for s, part in zip(lying, self.parts, strict=True):
            for i in s.members:
                w = weights[i]
                offset = w.storage_offset() - s.tensor.storage_offset()
                self.views[i] = part if len(s.members) == 1 else part.as_strided(w.shape, w.stride(), offset)

    def store(self) -> None:
        """Copy the weights as they are now."""
        torch._foreach_copy_(self.parts, [s.tensor for s in self.segments])

    @contextmanager
    def standing_in(self, weights: Sequence[nn.Parameter]) -> Iterator[None]:
        """The model computes with this copy: no weight is copied to that end, each only points here for the while."""
        own = [p.data for p in weights]
        try:
            for p, view in zip(weights, self.views, strict=True):
                p.data = view
            yield
        finally:
            for p, data in zip(weights, own, strict=True):
                p.data = data
