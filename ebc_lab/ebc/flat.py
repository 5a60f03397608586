"""Weights that are neighbours in memory, treated as one tensor: an operation on all of them is one kernel.

`lay_flat` moves a model's weights next to each other. `Layout` finds out which weights are neighbours and
keeps copies of them in the same layout. Scattered weights are gathered where they are few, and treated one by
one where they are many.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from .parallel.shards import swapped

ALIGNMENT = 64  # bytes: each weight starts on a cache line
FEW = 1_000_000  # elements of weights that are gathered: sooner than forty operations are started
FEW_NEW = 300_000  # and of gradients, for which there is no room yet


@dataclass(frozen=True)
class Segment:
    """Weights, by index, as one tensor: a flat view of the memory of neighbours, or the only weight itself.

    Of weights that are `gathered` the tensor is room for their values, which `Layout.read` fills.
    """

    members: tuple[int, ...]
    tensor: Tensor
    gathered: tuple[Tensor, ...] = ()

    @cached_property
    def flattened(self) -> list[Tensor]:
        """The gathered weights, each in one dimension."""
        return [w.view(-1) for w in self.gathered]

    @cached_property
    def own_views(self) -> list[Tensor]:
        """Each gathered weight in `tensor`."""
        return self.views(self.tensor, ())

    def views(self, part: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """Each weight in a tensor that is laid out like this one's."""
        if len(self.members) == 1:
            return [part]
        if self.gathered:
            pieces = part.split([w.numel() for w in self.gathered])
            return [piece.view(w.shape) for piece, w in zip(pieces, self.gathered, strict=True)]
        start = self.tensor.storage_offset()
        members = [weights[i] for i in self.members]
        return [part.as_strided(w.shape, w.stride(), w.storage_offset() - start) for w in members]


def _room(weight: Tensor) -> int:
    """Elements from the start of a weight to where its neighbour may begin."""
    step = max(1, ALIGNMENT // weight.element_size())
    return -(-weight.numel() // step) * step


@torch.no_grad()
def lay_flat(weights: Iterable[nn.Parameter]) -> None:
    """Move weights, in order, into one block of memory for each device and dtype; their values stay the same.

    Call it after `model.to(...)`, which would scatter them again. The gaps between them are zeros.
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


def segments(weights: Sequence[Tensor], marks: Sequence[bool]) -> list[Segment]:
    """The weights as maximal runs of neighbours that carry the same mark."""
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
    first = weights[run[0]].detach()
    if len(run) == 1:
        return first
    start = where[run[0]][1]
    end = where[run[-1]][1] + weights[run[-1]].numel()
    return first.as_strided((end - start,), (1,), start)


def _gathered(weights: Sequence[Tensor], marks: Sequence[bool]) -> list[Segment]:
    """The weights as two segments at most, one for each mark, to be read and written as a whole."""
    found = []
    for mark in dict.fromkeys(marks):
        members = tuple(i for i, marked in enumerate(marks) if marked == mark)
        homes = tuple(weights[i].detach() for i in members)
        if len(members) == 1:
            found.append(Segment(members, homes[0]))
        else:
            found.append(Segment(members, homes[0].new_empty(sum(w.numel() for w in homes)), homes))
    return found


def _are_few(tensors: Sequence[Tensor], most: int) -> bool:
    """Whether gathering them is sooner done than treating them one by one. On a GPU it need not be."""
    return sum(map(Tensor.numel, tensors)) <= most and all(t.is_cpu for t in tensors)


def real(t: Tensor) -> Tensor:
    """The tensor itself, or the real and imaginary parts of a complex one."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def joint_norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of all elements of the tensors together, 0-dim; 0 without any.

    The bits of torch's `get_total_norm`, which spends longer on sorting 28 tensors by device and dtype than
    on their norms: where there is nothing to sort, that is left out.
    """
    kinds = {(type(t), t.dtype, t.device) for t in tensors}
    if len(kinds) != 1 or type(tensors[0]) is not Tensor:
        return get_total_norm(tensors)
    norms = torch._foreach_norm(list(tensors)) if len(tensors) > 1 else None
    total: Tensor = torch.linalg.vector_norm(tensors[0] if norms is None else torch.stack(norms))
    return total


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Set the first tensor of each pair to the second."""
    if pairs:
        to, values = zip(*pairs, strict=True)
        torch._foreach_copy_(list(to), list(values))


def gathered_norm(tensors: Sequence[Tensor]) -> Tensor:
    """`joint_norm` up to its last digits, sooner where the tensors have few elements and are on a CPU."""
    if len(tensors) <= 2 or not _are_few(tensors, FEW_NEW):
        return joint_norm(tensors)
    norm: Tensor = torch.linalg.vector_norm(torch.cat([t.reshape(-1) for t in tensors]))
    return norm


class Copy:
    """A copy of weights in their layout: `parts` by segment, `views` by weight. `store` fills it.

    `written`: whether, to stand in for them, its values are exchanged with theirs.
    """

    def __init__(self, weights: Sequence[Tensor], originals: Sequence[Segment], written: bool = False):
        self.segments = originals
        self.written = written
        self.own = [w.data for w in weights]  # where the weights are while no copy stands in for them
        self.parts = [torch.empty_like(s.tensor) for s in originals]
        self.views: list[Tensor] = [torch.empty(0)] * len(weights)
        for s, part in zip(originals, self.parts, strict=True):
            for i, view in zip(s.members, s.views(part, weights), strict=True):
                self.views[i] = view

    def store(self) -> None:
        """Copy the weights as they are now."""
        apart = []
        for s, part in zip(self.segments, self.parts, strict=True):
            if s.gathered:
                torch.cat(s.flattened, out=part)
            else:
                apart.append((part, s.tensor))
        _copy(apart)

    def equals_weights(self) -> bool:
        """Whether the weights are still what was stored."""
        return all(map(torch.equal, self.own, self.views))

    def restore(self) -> None:
        """Set the weights to what was stored."""
        pairs = []
        for s, part in zip(self.segments, self.parts, strict=True):
            views = [self.views[i] for i in s.members]
            pairs += list(zip(s.gathered, views, strict=True)) if s.gathered else [(s.tensor, part)]
        _copy(pairs)

    def bring_home(self, weights: Sequence[Tensor]) -> None:
        """Put weights that an optimizer has moved to other memory back to where they were, as they are."""
        for p, own in zip(weights, self.own, strict=True):
            if p.data_ptr() != own.data_ptr():
                own.copy_(p)
                p.data = own

    @contextmanager
    def standing_in(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """The model computes with this copy meanwhile: its parameters point here, and no weight is copied.

        Unless it is `written`.
        """
        if self.written:
            with swapped([s.tensor for s in self.segments], self.parts):
                yield
            return
        try:
            for p, view in zip(weights, self.views, strict=True):
                p.data = view
            yield
        finally:
            for p, data in zip(weights, self.own, strict=True):
                p.data = data


class Shortened:
    """Weights that are left at W + c·dW for a while; `before` holds W.

    The layout's copy for trial weights holds W + dW meanwhile.
    """

    def __init__(self, layout: Layout, before: Copy, c: float):
        self.layout = layout
        self.before = before
        self.c = c
        layout.trial.store()
        for i in layout.moving:
            layout.parts[i].copy_(self._part(i))
        layout.write(layout.moving)

    def _part(self, i: int) -> Tensor:
        return torch.lerp(self.before.parts[i], self.layout.trial.parts[i], self.c)

    def undo(self, weights: Sequence[Tensor]) -> bool:
        """Put W + dW back. If somebody has moved the weights meanwhile, leave them and return False."""
        layout = self.layout
        if not layout.holds(weights):
            return False
        layout.read()
        if not all(torch.equal(layout.parts[i], self._part(i)) for i in layout.moving):
            return False
        layout.trial.restore()
        return True


class Layout:
    """Where weights lie in memory, valid while `holds`, and two copies of them, made at their first use.

    `parts` is the weights' own memory, one tensor for each segment, or what was `read` of weights that are
    gathered; `moving` are the indices of the segments of `scaled` weights, which have no others among them.
    `written`: see `Copy`.
    """

    def __init__(self, weights: Sequence[Tensor], scaled: Collection[int], written: bool = False):
        self.weights = weights
        self.written = written
        self.addresses = [p.data_ptr() for p in weights]
        marks = [i in scaled for i in range(len(weights))]
        self.segments = segments(weights, marks)
        alike = len({w.dtype for w in weights}) == 1 and all(w.is_contiguous() for w in weights)
        if len(self.segments) > 2 and not written and alike and _are_few(weights, FEW):
            self.segments = _gathered(weights, marks)
        self.parts = [s.tensor for s in self.segments]
        self.moving = [i for i, s in enumerate(self.segments) if s.members[0] in scaled]

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether these weights lie where those did; the segments keep that memory from being used again."""
        return [p.data_ptr() for p in weights] == self.addresses

    def read(self) -> None:
        """Have `parts` hold the weights as they are now."""
        for s in self.segments:
            if s.gathered:
                torch.cat(s.flattened, out=s.tensor)

    def write(self, which: Iterable[int]) -> None:
        """Set the weights of some segments to what `parts` hold."""
        for i in which:
            s = self.segments[i]
            if s.gathered:
                torch._foreach_copy_(list(s.gathered), s.own_views)

    @cached_property
    def kept(self) -> Copy:
        """For the weights before a step."""
        return Copy(self.weights, self.segments, self.written)

    @cached_property
    def trial(self) -> Copy:
        """For the weights at which the KL of a trial step is measured."""
        return Copy(self.weights, self.segments, self.written)


def all_finite(tensors: Sequence[Tensor], norm: Tensor) -> bool:
    """Whether every element is finite; each is looked at only if their norm, or sum, overflowed."""
    return math.isfinite(norm) or all(bool(torch.isfinite(t).all()) for t in tensors)


def finite_flag(tensors: Sequence[Tensor], norm: Tensor) -> Tensor:
    """Return `all_finite` as a 0-dim bool tensor, without reading a value on the host.

    Whether the norm overflowed is unknown then, so it is computed again in float64, whose range no float32
    exceeds.
    """
    if not tensors or tensors[0].dtype == torch.float64:
        return torch.isfinite(norm)
    return torch.isfinite(torch.stack(torch._foreach_norm(list(tensors), 2, torch.float64))).all()
