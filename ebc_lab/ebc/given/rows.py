"""Rows of a batch: which choose c, and how a batch is cut to some of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import checks

At = slice | Tensor  # places of rows: a run of them, or an index, (n,) int64
RowsOf = Callable[[dict[str, Any], Tensor], Any]  # (the forward's arguments, an index) -> those of these rows


@dataclass(frozen=True)
class Choice:
    """The first `k` of a batch's `size` rows choose c, in `order` (an index of all; None: as they lie)."""

    size: int
    k: int
    order: Tensor | None = None

    def at(self, start: int, end: int) -> At:
        """The places of the `start`-th to the `end`-th row in that order."""
        return slice(start, min(end, self.size)) if self.order is None else self.order[start:end]

    def seen(self) -> Tensor:
        """The places of the rows that choose c, and of as many of the others, evenly from all of them."""
        rest = self.size - self.k
        others = self.k + torch.arange(min(self.k, rest)) * rest // max(1, min(self.k, rest))
        places = torch.cat([torch.arange(min(self.k, self.size)), others])
        return places if self.order is None else self.order[places]

    def taken(self, x: Tensor, start: int, end: int) -> Tensor:
        """The `start`-th to the `end`-th row of a tensor (B, ...) in that order."""
        return take(x, self.at(start, end))


@dataclass(frozen=True)
class Chooser:
    """Says which rows choose c.

    `sequences`: how many; "all"; None: as many as hold about `checks.ENOUGH_TOKENS` tokens that count, two at
    least. `audits`: whether a quarter of the rows that count is then left for audits.
    """

    sequences: int | str | None
    audits: bool

    def choose(self, size: int, like: Tensor | None, mask: Tensor | None, drawn_at: int | None) -> Choice:
        """The leading rows of a batch of `size` rows, if positions of theirs count.

        Args:
            like: a tensor with an element for each position, rows first; None: known to be counted by `mask`.
            drawn_at: the step, if rows are to be drawn from the whole batch, anew at each step.
        """
        order = None
        if drawn_at is not None:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(drawn_at))
        if mask is None:
            assert like is not None
            in_a_row = max(1, like.numel() // max(1, size))
            return Choice(size, self._count(-(-checks.ENOUGH_TOKENS // in_a_row), size, size), order)
        counted = mask.reshape(size, -1).sum(1).cpu()
        k = self._enough(counted, order)
        later = counted_first(counted, order, k)
        return Choice(size, k if later is order else self._enough(counted, later), later)

    def _enough(self, counted: Tensor, order: Tensor | None) -> int:
        """How many rows choose c, of rows with `counted` positions each, (B,) on the CPU."""
        tokens = (counted if order is None else counted[order]).cumsum(0)
        wanted = 1 + int((tokens < checks.ENOUGH_TOKENS).sum())
        return self._count(wanted, max(1, int((counted > 0).sum())), len(counted))

    def _count(self, wanted: int, counting: int, size: int) -> int:
        """As many rows as were asked for, else as `wanted`, of `size` rows of which some are `counting`."""
        if self.sequences is not None:
            return size if self.sequences == "all" else int(self.sequences)
        most = counting - max(1, counting // 4) if self.audits and counting > 1 else counting
        return min(max(wanted, 2), most)


def take(x: Tensor, at: At, axis: int = 0) -> Tensor:
    """Some rows of a tensor, a view where they are a run of the first axis."""
    if isinstance(at, Tensor):
        return x.index_select(axis, at.to(x.device))
    rows = x.narrow(axis, at.start, at.stop - at.start)
    return rows.contiguous() if axis else rows  # models may `view` them


def cut(inputs: Any, at: At, size: int, axis: int = 0) -> Any:
    """Some rows of a batch of `size` along `axis`: of each tensor, in mappings and sequences, that has them.

    Tensors of another size (positions, shared by all rows) stay whole.
    """
    if isinstance(inputs, Tensor):
        if inputs.layout is not torch.strided:
            return inputs
        for along in (axis, 0):  # a mask of padding is (B, T) beside tokens (T, B), too
            if inputs.ndim > along and inputs.shape[along] == size:
                return take(inputs, at, along)
        return inputs
    if isinstance(inputs, Mapping):
        return {k: cut(v, at, size, axis) for k, v in inputs.items()}
    if isinstance(inputs, tuple | list):
        parts = [cut(v, at, size, axis) for v in inputs]
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else type(inputs)(parts)
    return inputs


def counted_first(counted: Tensor, order: Tensor | None, k: int) -> Tensor | None:
    """An order in which rows with positions that count come first, if few of the first `k` have any.

    `counted`: positions that count in each row, (B,) on the CPU.
    """
    some = counted if order is None else counted[order]
    if bool(some[:k].all()) or not bool(some[k:].any()):
        return order
    later = torch.sort((some == 0).long(), stable=True).indices
    return later if order is None else order[later]
