"""Training batches and evaluation windows of a tokenised text, on its device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import BatchSource

BLOCK = 256  # steps drawn at a time


def drawn_starts(seed: int, block: int, places: int, batch_size: int) -> np.ndarray:
    """Where the windows of a block of steps begin, each of so many places as likely, (BLOCK, B) int64: a
    function of (seed, block) alone."""
    draw = np.random.Generator(np.random.Philox(key=[seed, block]))
    return draw.integers(0, places, (BLOCK, batch_size))


def brought(numbers: NDArray[np.int64], device: torch.device) -> Tensor:
    """Return numbers of the host on a device; a GPU does not wait for a copy from pinned memory."""
    drawn = torch.from_numpy(numbers)
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn


class Batches(BatchSource):
    """Training batches by step: a function of (seed, step), the same for every arm and after every resume.

    `of`: the length of the text for which starts are drawn, where `tokens` is only the head of it: they are
    the batches of the complete text, except that rows from its tail start elsewhere.
    """

    def __init__(self, tokens: Tensor, batch_size: int, context: int, seed: int, *, of: int | None = None):
        self.tokens = tokens
        self.batch_size = batch_size
        self.seed = seed
        self.of = of or len(tokens)
        self.window = torch.arange(context + 1, device=tokens.device)
        self.block = -1
        self.starts = torch.empty(0)  # of the block, (BLOCK, B)

    def source_at(self, step: int) -> Tensor:
        """Where the windows of `step` begin in the text, (B,) int64, on the tokens' device."""
        block, row = divmod(step, BLOCK)
        if block != self.block:
            starts = drawn_starts(self.seed, block, self.of - len(self.window) + 1, self.batch_size)
            starts %= len(self.tokens) - len(self.window) + 1
            self.starts = brought(starts, self.tokens.device)
            self.block = block
        return self.starts[row]

    def rows(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """The windows that begin at `starts`, (B,), as (inputs, next-token targets), (B, T) int64 each."""
        rows = self.tokens[starts[:, None] + self.window]
        return rows[:, :-1], rows[:, 1:]


def windows(
    tokens: Tensor, context: int, count: int | None = None, *, exact: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """Disjoint windows that cover `tokens`, as (inputs, targets): (n, T), then the shorter tail (1, < T).

    With `count`, that many full windows spread evenly over the split; `exact` finds them by integers alone.
    No target is predicted twice.
    """
    full = (len(tokens) - 1) // context
    inputs = tokens[: full * context].view(full, context)
    targets = tokens[1 : full * context + 1].view(full, context)
    if count is not None:
        n = min(count, full)
        keep = _spread(full, n) if exact else torch.linspace(0, full - 1, n).round().long()
        keep = keep.to(tokens.device)
        return [(inputs[keep], targets[keep])]
    tail = tokens[full * context :]
    return [(inputs, targets)] + ([(tail[None, :-1], tail[None, 1:])] if len(tail) > 1 else [])


def _spread(full: int, n: int) -> Tensor:
    """n of so many windows, (n,) int64, from the first to the last, rounded half up."""
    gaps = max(n - 1, 1)
    return torch.tensor([(2 * i * (full - 1) + gaps) // (2 * gaps) for i in range(n)])
