"""Cross-entropy of tokens, in training and over held-out text, in the run's precision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebc_lab.config.schema import RunConfig
from ebc_lab.verity import VerityError, ops

UNIT = 1 << ops.LOSS_BITS  # of a sum of exact losses: one nat
EVAL_TOKENS = {"cpu": 2048, "cuda": 65536}  # of one evaluation forward
EVAL_LOGITS = 1 << 29  # of data=bin, whose vocabulary is large, in one such forward at most: 2 GiB in float32


def autocast(run: RunConfig) -> AbstractContextManager[Any]:
    """A context for one forward: nothing for float32, else bfloat16 autocast."""
    return torch.autocast(run.device, torch.bfloat16) if run.dtype == "bfloat16" else nullcontext()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token in float32; (B, T, V) and (B, T) -> (B·T,), nats."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")


def window_sums(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each window; (B, T, V) and (B, T) -> (B,) float64, nats."""
    return token_losses(logits, targets).view(targets.shape).double().sum(1)


def exact_window_sums(logits: Tensor, targets: Tensor) -> list[int]:
    """The same under determinism=verity, B whole numbers, in units of 2^-32. Raises VerityError."""
    return ops.loss_totals(ops.cross_entropy(logits, targets, reduction="none"))


def mean_of(total: int, tokens: int) -> float:
    """The mean of exact losses, rounded once, from their sum in units of 2^-32; nats per token."""
    return total / (UNIT * tokens)


def _spread(sums: Sequence[Tensor], count: Tensor, tokens: float) -> tuple[float, float]:
    """The mean loss of a token, and the squared deviations of windows from it, from each one's sum, and from
    the tokens in it, (k,)."""
    total = torch.cat(list(sums)).cpu()
    mean = float(total.sum()) / tokens
    return mean, float((total - count * mean).square().sum())


def _exact_spread(sums: Sequence[list[int]], count: Tensor, tokens: float) -> tuple[float, float]:
    """The same from whole numbers, in an order that does not matter."""
    total = list(itertools.chain(*sums))
    mean = mean_of(sum(total), int(tokens))
    off = [mean_of(s, 1) - n * mean for s, n in zip(total, count.tolist(), strict=True)]
    return mean, math.fsum(x * x for x in off)


class Sums(NamedTuple):
    """How the losses of windows are added up."""

    of_windows: Callable[[Tensor, Tensor], Any]  # logits (B, T, V), targets (B, T) -> the sum of each window
    spread: Callable[[Sequence[Any], Tensor, float], tuple[float, float]]  # see `_spread`
    refusals: tuple[type[Exception], ...] = ()  # of windows whose losses are not finite


SUMS = Sums(window_sums, _spread)
EXACT_SUMS = Sums(exact_window_sums, _exact_spread, (VerityError,))


class Processes(Protocol):
    """Those that share the windows of an evaluation."""

    def rows(self, batch: Tensor) -> Tensor:
        """Return this process's rows."""

    def gathered(self, own: Tensor, rows: int) -> Tensor:
        """Return the values of all rows from those of each process's."""


def _tokens_at_once(run: RunConfig) -> int:
    """How many tokens one evaluation forward takes."""
    most = EVAL_TOKENS[run.device]
    return min(most, EVAL_LOGITS // run.data.vocabulary) if run.data.name == "bin" else most


@torch.no_grad()
def evaluate(
    model: nn.Module,
    run: RunConfig,
    pairs: Iterable[tuple[Tensor, Tensor]],
    alive: Callable[[], None] = lambda: None,
    how: Sums = SUMS,
    among: Processes | None = None,
) -> dict[str, float]:
    """Return the mean loss over disjoint windows, its standard error (over windows), accuracy, token count.

    `alive` is called after every forward, because a split may take minutes. `how`: in float64, or exactly.
    `among`: the processes that take a share of the windows each, and all return the figures of all.
    """
    sums: list[Any] = []
    counts = []
    hits = []
    model.eval()
    try:
        for inputs, targets in pairs:
            windows, context = targets.shape
            if among is not None:
                inputs, targets = among.rows(inputs), among.rows(targets)
            rows = max(1, _tokens_at_once(run) // inputs.shape[1])
            of_pair, hits_of_pair = [], []
            for x, y in zip(torch.split(inputs, rows), torch.split(targets, rows), strict=True):
                with autocast(run):
                    logits = model(x)
                of_pair.append(how.of_windows(logits, y))
                hits_of_pair.append((logits.argmax(-1) == y).sum(-1))
                alive()
            if among is not None:
                of_pair = [among.gathered(torch.cat(of_pair), windows)]
                hits_of_pair = [among.gathered(torch.cat(hits_of_pair), windows)]
            sums += of_pair
            hits += hits_of_pair
            counts.append(torch.full((windows,), float(context), dtype=torch.float64))
    except how.refusals:  # a value is not finite
        return dict.fromkeys(("loss", "se", "accuracy", "tokens"), math.nan)
    finally:
        model.train()
    count = torch.cat(counts)
    tokens = float(count.sum())
    mean, spread = how.spread(sums, count, tokens)
    k = len(count)
    se = math.sqrt(spread * k / (k - 1)) / tokens if k > 1 else math.nan
    return {"loss": mean, "se": se, "accuracy": int(torch.cat(hits).sum()) / tokens, "tokens": tokens}
