"""Cross-entropy of tokens, in training and over held-out text, in the run's precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebc_lab.config.schema import RunConfig

EVAL_TOKENS = {"cpu": 2048, "cuda": 65536}  # of one evaluation forward


def autocast(run: RunConfig) -> AbstractContextManager[Any]:
    """A context for one forward: nothing for float32, else bfloat16 autocast."""
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
    """Mean loss over disjoint windows, its standard error (over windows), accuracy, token count.

    `alive` is called after every forward, because a split may take minutes.
    """
    sums = []
    counts = []
    hits = []
    model.eval()
    for inputs, targets in pairs:
        rows = max(1, EVAL_TOKENS[run.device] // inputs.shape[1])
        for x, y in zip(torch.split(inputs, rows), torch.split(targets, rows), strict=True):
            with autocast(run):
                logits = model(x)
            sums.append(token_losses(logits, y).view(y.shape).double().sum(1))
            counts.append(torch.full((len(y),), float(y.shape[1]), dtype=torch.float64))
            hits.append((logits.argmax(-1) == y).sum())
            alive()
    model.train()
    total = torch.cat(sums).cpu()
    count = torch.cat(counts)
    tokens = float(count.sum())
    mean = float(total.sum()) / tokens
    spread = float((total - count * mean).square().sum())
    k = len(count)
    se = math.sqrt(spread * k / (k - 1)) / tokens if k > 1 else math.nan
    return {"loss": mean, "se": se, "accuracy": int(torch.stack(hits).sum()) / tokens, "tokens": tokens}
