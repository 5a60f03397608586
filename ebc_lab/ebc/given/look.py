"""`Look`: is what EBC measures what training optimizes? The first steps under `attach`, looked at anew.

A step that moves something is looked at in three ways that its own measurement does not use. Two forwards at
W, the second with the rows in reverse order: a model whose rows do not depend on each other says the same.
The KL of the step on rows that did not choose c. And the fall of the loss: what the gradients promise of the
step, -<dL/dW, c·dW>, against what the movement of the logits makes of it, -<dL/dz, z(W + c·dW) - z(W)>. They
agree where the logits measured carry the whole loss. Nothing of the step depends on what is seen.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..clip import EllipsotopeClip
from ..flat import real
from ..logits import mean_kl
from ..parallel.shards import local
from ..probe import Batch
from ..proposal import Opened
from . import checks, losses, rows
from .capture import FIRST, Forward

RowsFirst = Callable[[Tensor], Tensor]  # logits, or a mask of them, with the batch in front

IDLE = 1 / 3  # from this share on, positions that the loss does not depend on are told
SMALL = 0.1  # nats per token: up to here the loss falls as its gradient promises
UNLIKE = 3.0  # a factor: between the KL of rows, and of the loss's fall and its part that passes the logits


@dataclass
class Seen:
    """One step that was looked at. KLs are in nats per token; NaN where something could not be seen."""

    apart: float  # KL between two forwards on the same rows at W
    floor: float  # the smallest KL that this precision can see
    kl: float = math.nan  # of the step, on rows that chose c
    kl_others: float = math.nan  # on as many others
    idle: float = math.nan  # the share of positions that count which the loss does not depend on
    share: float = math.nan  # of the loss's fall, the part that passes the logits (NaN with batch norm,
    # whose gradients are those of other means than evaluation has)
    unused: bool = False  # whether no gradient came back to the forward that chose c
    doubt: str | None = None  # what the gradient says of the loss

    @property
    def moved(self) -> bool:
        return self.kl > 10 * self.floor


class Look:
    """What the first steps showed.

    `steps`: each that moved something; `seconds`: what looking took; `finding`: what is wrong, None if all is
    well or not all is seen yet; `failed`: why nothing more can be seen, as where memory is short.
    """

    def __init__(self) -> None:
        self.steps: list[Seen] = []
        self.seconds = 0.0
        self.finding: str | None = None
        self.failed: str | None = None
        self.patience = 100  # steps in which nothing moves, as at a learning rate of 0, end it
        self._looking: Looking | None = None  # at the step that is open

    @property
    def done(self) -> bool:
        return len(self.steps) >= FIRST or self.patience <= 0 or self.failed is not None

    def begin(self, opened: Opened, forward: Forward, rows_first: RowsFirst) -> None:
        """The step is open, the weights are at W."""
        if self.done or opened.void or opened.batch is None:
            return
        with self._trying(), forward.precision():
            self._looking = Looking(opened, opened.batch, forward, rows_first)

    def end(self, clip: EllipsotopeClip, forwards: int, gradients: Sequence[Tensor | None]) -> None:
        """It has ended: they are at W + c·dW. `forwards`: how many have made its gradient, for each weight
        one of `gradients`."""
        looking, self._looking = self._looking, None
        if looking is None or clip.last is None or bool(clip.last.skipped):
            return
        alone = clip.workers.alone and forwards == 1
        with self._trying(), looking.forward.precision():
            looking.after(clip.weights, gradients, alone)
        self.seconds += looking.seconds
        self.patience -= 1
        if clip.any_process(looking.seen.moved):
            self.steps.append(looking.seen)
        if self.done and self.steps and self.failed is None:
            self.finding = finding(self.steps, looking.batch, clip.settings.target_kl)
        if self.finding is not None:
            message = f"EBC's first steps look wrong: {self.finding} (check=False says nothing.)"
            warnings.warn(message, checks.EBCWarning, stacklevel=2)

    def forget(self) -> None:
        """The step that is open will not end."""
        self._looking = None

    @contextmanager
    def _trying(self) -> Iterator[None]:
        """What fails inside ends the look, and not the training, with a warning."""
        try:
            yield
        except Exception as error:
            self.failed = checks.failed(error)
            message = f"EBC's first steps were not looked at: a forward failed meanwhile ({self.failed})."
            warnings.warn(message, checks.EBCWarning, stacklevel=2)


class Looking:
    """One step: `before` it at W, `after` it at W + c·dW."""

    def __init__(self, opened: Opened, batch: Batch, forward: Forward, rows_first: RowsFirst):
        start = time.perf_counter()
        self.batch = batch
        self.forward = forward
        self.kept = opened.kept
        self.k = len(batch.probe.z)
        self.size = min(batch.size, 2 * self.k)
        self.at = batch.choice.at(0, self.size)
        whole = batch.prober.whole
        some = batch.tokens if whole else batch.prober.cut(batch.tokens, self.at, batch.size)
        # where all rows choose c, or are called together, one may depend on the others, and on their order
        self.turns = self.k < batch.size and not whole
        self.rows = rows.turned(some, self.size, batch.prober.axis) if self.turns else some
        self.mask = None if forward.mask is None else rows_first(forward.mask)[: self.size]
        try:
            self.z = self._logits()
        except Exception:  # they must be sorted, by their lengths as a rule
            self.turns = False
            self.rows = some
            self.z = self._logits()
        mask_rows = None if self.mask is None else self.mask[: self.k]
        self.seen = Seen(float(mean_kl(batch.probe.z, self.z[: self.k], mask_rows)), batch.floor)
        self.seconds = time.perf_counter() - start

    def _logits(self) -> Tensor:
        if self.turns:
            return self.batch.logits(self.rows).flip(0)
        return self.batch.logits(self.rows, self.at)

    def after(self, weights: list[Any], gradients: Sequence[Tensor | None], alone: bool) -> None:
        """`gradients`: the weights'; `alone`: whether this forward has made all of them."""
        start = time.perf_counter()
        seen = self.seen
        z = self._logits()
        k = self.k
        halves = [slice(0, k), slice(k, self.size)]
        kls = []
        for half in halves:
            mask_rows = None if self.mask is None else self.mask[half]
            kls.append(float(mean_kl(self.z[half], z[half], mask_rows)) if len(z[half]) else math.nan)
        seen.kl, seen.kl_others = kls
        gradient = self.forward.gradient
        seen.unused = self.forward.used is False
        if gradient is not None and gradient.usable:
            seen.idle = losses.without_loss(gradient, self.mask)
            seen.doubt = losses.doubt(gradient, losses.are_log_probabilities(self.z))
            straight = seen.kl < SMALL and not self.batch.prober.normalises
            if alone and straight and self.kept is not None:
                seen.share = self._share(gradient, z, weights, gradients)
        self.seconds += time.perf_counter() - start

    def _share(
        self, gradient: losses.Gradient, z: Tensor, weights: list[Any], gradients: Sequence[Tensor | None]
    ) -> float:
        """Return the part of the promised fall of the loss that passes the logits."""
        assert self.kept is not None
        rows = min(len(gradient.rows), self.size)
        g = gradient.rows[:rows].double()
        part = float(g.abs().sum()) / gradient.mass
        if not part > 0:
            return math.nan
        seen = -float((g * (z[:rows].double() - self.z[:rows].double())).sum()) / part
        promised = 0.0
        for p, old, grad in zip(weights, self.kept.views, gradients, strict=True):
            if grad is not None:
                promised -= float(
                    (real(grad).double() * (real(local(p)).double() - real(old).double())).sum()
                )
        return seen / promised if promised > 0 else math.nan


def finding(steps: list[Seen], batch: Batch, target_kl: float) -> str | None:
    """What the steps together say, a sentence with its remedy for each thing that is not as it should be.

    `batch`: that of the last of them.
    """
    k, size, axis = len(batch.probe.z), batch.size, batch.prober.axis
    sentences = []
    apart = max(s.apart for s in steps)
    floor = steps[0].floor
    target_kl = min(target_kl, _median([s.kl for s in steps]))
    if apart > max(10 * floor, 0.1 * target_kl):
        sentences.append(
            f"two forwards on the same rows at the same weights, in another order, differ by a KL of "
            f"{apart:.2g} nats per token. A row's logits depend on other rows: let all choose c, "
            f"probe_sequences={size}{'' if axis else checks.TIME_FIRST}."
        )
    if all(s.unused for s in steps):
        sentences.append(
            "no gradient comes back to the last training forward before a step: call the one that is trained "
            "inside `with ebc.this_forward():`."
        )
    doubts = [s.doubt for s in steps if s.doubt]
    if len(doubts) == len(steps):
        sentences.append(doubts[0])
    idle = _median([s.idle for s in steps])
    if idle > IDLE:
        sentences.append(
            f"the loss does not depend on {idle:.0%} of the positions that EBC measures: say which count, by "
            "the forward's arguments, as mask_of=lambda given: given['labels'] != -100."
        )
    share = _median([s.share for s in steps])
    if share < 1 / UNLIKE and not doubts:
        sentences.append(
            f"{max(share, 0):.0%} of the fall of the loss passes the logits that EBC measures: training "
            "optimizes something else as well, which no budget on these logits holds back. If another output "
            "matters more, say logits_of=…."
        )
    ratio = _median([s.kl_others / s.kl for s in steps])
    if not 1 / UNLIKE <= ratio <= UNLIKE and not math.isnan(ratio):
        sentences.append(
            f"on other rows the KL of a step is {ratio:.2g} × that on the {k} rows that choose c: raise "
            f"probe_sequences, or take budget='tracked'."
        )
    return " ".join(sentences) if sentences else None


def _median(values: list[float]) -> float:
    """Return the median of those that could be seen; NaN if there is none, which no comparison holds for."""
    known = sorted(v for v in values if not math.isnan(v))
    return known[len(known) // 2] if known else math.nan
