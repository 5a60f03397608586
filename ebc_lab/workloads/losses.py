"""A forward in the run's precision, the loss of its tokens, and the mean loss over windows of held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebc_lab.config.schema import RunConfig

EVAL_TOKENS = {"cpu": 2048, "cuda": 65536}  # of one evaluation forward


def autocast(run: RunConfig) -> Any:
    """A fresh context for one forward: float32, or bfloat16 autocast with float32 parameters."""
    return torch.autocast(run.device, torch.bfloat16) if run.dtype == "bfloat16" else nullcontext()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token in float32; (B, T, V) and (B, T) -> (B·T,), nats."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    run: RunConfig,
    pairs: Iterable[tuple[Tensor, Tensor]],
    alive: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean loss over disjoint windows, its standard error with windows as the sampling unit, accuracy, token count.

    `alive` is called now and then: a whole split may take a while.
    """
    sums, counts, right = [], [], []
    model.eval()
    for inputs, targets in pairs:
        rows = max(1, EVAL_TOKENS[run.device] // inputs.shape[1])
        for start in range(0, len(inputs), rows):
            x, y = inputs[start : start + rows], targets[start : start + rows]
            with autocast(run):
                logits = model(x)
            sums.append(token_losses(logits, y).view(y.shape).double().sum(1))
            counts.append(torch.full((len(y),), float(y.shape[1]), dtype=torch.float64))
            right.append((logits.argmax(-1) == y).sum())
            alive()
    model.train()
    total, n, hits = torch.cat(sums).cpu(), torch.cat(counts), int(torch.stack(right).sum())
    tokens, k = float(n.sum()), len(n)
    mean = float(total.sum()) / tokens
    spread = float((total - n * mean).square().sum())
    se = math.sqrt(spread * k / (k - 1)) / tokens if k > 1 else math.nan
    return {"loss": mean, "se": se, "accuracy": hits / tokens, "tokens": tokens}
