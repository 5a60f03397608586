"""Training batches and evaluation windows of a tokenised text, on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import RunConfig

if TYPE_CHECKING:
    from torch import Tensor


HELD_SHARE = 0.02  # of the training text, its end, where the budget is measured on held-back text


class Batches:
    """Training batches by step: a pure function of (seed, step), the same for every arm and after every resume.

    `of`: the length of the text that starts are drawn for, where `tokens` is only its head: batches are then those of the whole
    text but for the rows that would start in its tail.
    """

    BLOCK = 256  # steps drawn at a time

    def __init__(self, tokens: Tensor, batch_size: int, context: int, seed: int, *, of: int | None = None):
        import torch

        self.tokens, self.batch_size, self.seed = tokens, batch_size, seed
        self.of = of or len(tokens)
        self.window = torch.arange(context + 1, device=tokens.device)
        self.block = -1

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and next-token targets of `step`, (B, T) int64 each, on the tokens' device."""
        return self.rows(self.starts_at(step))

    def starts_at(self, step: int) -> Tensor:
        """Where the windows of `step` begin in the text, (B,) int64, on the tokens' device."""
        import torch

        block, row = divmod(step, self.BLOCK)
        if block != self.block:
            draw = np.random.Generator(np.random.Philox(key=[self.seed, block]))
            starts = draw.integers(0, self.of - len(self.window) + 1, (self.BLOCK, self.batch_size))
            starts %= len(self.tokens) - len(self.window) + 1
            drawn = torch.from_numpy(starts)
            if self.tokens.is_cuda:  # from pinned memory the copy does not wait
                drawn = drawn.pin_memory().to(self.tokens.device, non_blocking=True)
            self.starts, self.block = drawn, block
        return self.starts[row]

    def rows(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """The windows that begin at `starts`, (B,), as (inputs, targets), (B, T) each."""
        rows = self.tokens[starts[:, None] + self.window]
        return rows[:, :-1], rows[:, 1:]


def training_batches(run: RunConfig, text: Tensor) -> tuple[Batches, Batches | None]:
    """The run's training batches, and those that choose c where budget.probe_tokens=held, else None.

    Raises UserError where the text is too short to hold any of it back.
    """
    context = run.model.context
    if run.stabilizer.name != "ebc" or run.budget.probe_tokens != "held":
        return Batches(text, run.batch_size, context, run.seed), None
    cut = round((1 - HELD_SHARE) * len(text))
    if len(text) - cut < context + 1:
        raise UserError(
            f"the corpus is too short for budget.probe_tokens=held: {len(text) - cut} characters would be held back "
            f"and a window takes {context + 1}; use a longer text, or probe_tokens=train."
        )
    trained = Batches(text[:cut], run.batch_size, context, run.seed, of=len(text))
    return trained, Batches(text[cut:], run.budget.probe_sequences, context, run.seed)


def overlapping_windows(tokens: Tensor, context: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """`count` windows half a context apart at the head of `tokens` (forensic: the earlier study judged on ≈600 characters)."""
    import torch

    stride = max(1, context // 2)
    count = min(count, (len(tokens) - context - 1) // stride + 1)
    at = torch.arange(count, device=tokens.device)[:, None] * stride + torch.arange(
        context + 1, device=tokens.device
    )
    rows = tokens[at]
    return [(rows[:, :-1], rows[:, 1:])]


def windows(tokens: Tensor, context: int, count: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Disjoint windows that cover `tokens`, as (inputs, targets): one pair (n, context), then the shorter tail (1, <context).

    With `count`, that many full windows spread evenly over the split instead. Every target is predicted exactly once.
    """
    import torch

    full = (len(tokens) - 1) // context
    inputs = tokens[: full * context].view(full, context)
    targets = tokens[1 : full * context + 1].view(full, context)
    if count is not None:
        keep = torch.linspace(0, full - 1, min(count, full)).round().long().to(tokens.device)
        return [(inputs[keep], targets[keep])]
    tail = tokens[full * context :]
    return [(inputs, targets)] + ([(tail[None, :-1], tail[None, 1:])] if len(tail) > 1 else [])
