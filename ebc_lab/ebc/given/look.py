"""`Look`: is what EBC measures what training optimizes? The first steps under `attach`, looked at anew.

A step that moves something is looked at in three ways that its own measurement does not use. Two forwards at
W, the second with the rows in reverse order: a model whose rows do not depend on each other says the same.
The KL of the step on rows that did not choose c. And the fall of the loss: what the gradients promise of the
step, -<dL/dW, c·dW>, against what the movement of the logits makes of it, -<dL/dz, z(W + c·dW) - z(W)>, or
that of the output's tensors that they are made of. They agree where the logits measured carry the whole loss.
Nothing of the step depends on what is seen.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..clip import EllipsotopeClip
from ..flat import real
from ..logits import mean_kl
from ..parallel.shards import local, shared_out
from ..probe import Batch
from ..proposal import Opened
from . import checks, losses, rows
from .capture import FIRST, Capture, Forward
from .source import rows_of, tensors_of

IDLE = 1 / 3  # from this share on, positions that the loss does not depend on are told
SMALL = 0.1  # nats per token: up to here the loss falls as its gradient promises
PART = 1 / 3  # of the loss's fall, what the part that passes the logits has at least
UNLIKE = 1.5  # a factor between the KL of other rows and that of those that chose c
FEWER = 3.0  # that factor where the other rows hold fewer than `checks.FEW_TOKENS` tokens


NUMBERS = ("apart", "floor", "kl", "kl_others", "tokens_others", "idle", "share", "unused")


@dataclass
class Seen:
    """One step that was looked at. KLs are in nats per token; NaN where something could not be seen."""

    apart: float  # KL between two forwards on the same rows at W
    floor: float  # the smallest KL that this precision can see
    kl: float = math.nan  # of the step, on rows that chose c
    kl_others: float = math.nan  # on as many others
    tokens_others: int = 0  # that count there
    idle: float = math.nan  # the share of positions that count which the loss does not depend on
    share: float = math.nan  # of the loss's fall, the part that passes the logits (NaN with batch norm,
    # whose gradients are those of other means than evaluation has)
    unused: bool = False  # whether no gradient came back to the forward that chose c
    doubt: str | None = None  # what the gradient says of the loss

    @property
    def unlike(self) -> float:
        """The KL on other rows for each unit of that on rows that chose c; NaN without other rows."""
        return self.kl_others / self.kl if self.kl > 0 else math.nan

    @property
    def moved(self) -> bool:
        return self.kl > 10 * self.floor


class Look:
    """What the first steps showed.

    `steps`: each that moved something; `seconds`: what looking took; `wrong`: what the loss was seen to do to
    the logits once a step had been taken, None if nothing; `finding`: what is wrong, None if all is well or
    not all is seen yet; `changes`: what was done about rows; `failed`: why nothing more can be seen, as where
    memory is short.
    """

    def __init__(self) -> None:
        self.steps: list[Seen] = []
        self.seconds = 0.0
        self.wrong: str | None = None
        self.finding: str | None = None
        self.changes: list[str] = []
        self.failed: str | None = None
        self.patience = 100  # steps in which nothing moves, as at a learning rate of 0, end it
        self._looking: Looking | None = None  # at the step that is open
        self._gradients: dict[int, Tensor] = {}  # that backward has brought to weights, by their ids
        self._hooks: dict[int, Any] = {}

    def __repr__(self) -> str:
        head = ("step", "KL", "on other rows", "apart", "share", "idle")
        shown = [head] + [
            (str(i + 1), *(f"{x:.3g}" for x in (s.kl, s.kl_others, s.apart, s.share, s.idle)))
            for i, s in enumerate(self.steps)
        ]
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        lines = ["  ".join(cell.rjust(n) for cell, n in zip(row, widths, strict=True)) for row in shown]
        return "\n".join([*lines, *self.changes, self.summary])

    @property
    def summary(self) -> str:
        """What was found, in a sentence."""
        so_far = "nothing wrong" if self.done else f"nothing wrong so far, of {FIRST} steps"
        failed = self.failed and f"not looked at: {self.failed}"
        return self.finding or self.wrong or failed or so_far

    @property
    def done(self) -> bool:
        return len(self.steps) >= FIRST or self.patience <= 0 or self.failed is not None

    @property
    def rows_unlike(self) -> float | None:
        """The KL of a step on other rows over that on the rows that choose c, where they are not alike: of
        all steps to the same side, and at the median by a factor. None where they are, and before the end.
        """
        ratios = [s.unlike for s in self.steps if not math.isnan(s.unlike)]
        if not self.done or not ratios:
            return None
        few = min(s.tokens_others for s in self.steps) < checks.FEW_TOKENS
        factor = FEWER if few else UNLIKE
        ratio = _median(ratios)
        higher = ratio > factor and min(ratios) > 1
        lower = ratio < 1 / factor and max(ratios) < 1
        return ratio if higher or lower else None

    def watch(self, weights: Sequence[Tensor]) -> None:
        """Keep the gradients that backward brings to these weights, before anything else changes them:
        optimizers and loops use them as room to compute in."""
        for p in weights:
            if not self.done and p.requires_grad and not shared_out(p) and id(p) not in self._hooks:
                # not a hook on the tensor, which has autograd copy the gradient, maybe to other strides
                self._hooks[id(p)] = p.register_post_accumulate_grad_hook(self._came)

    def _came(self, weight: Tensor) -> None:
        if weight.grad is None:  # a Function returned none, or it was used in backward already
            return
        with torch.no_grad():  # backward may be differentiated itself
            self._gradients[id(weight)] = weight.grad.detach().clone()

    def stop(self) -> None:
        """Nothing is watched any more."""
        self.forget()
        for handle in self._hooks.values():
            handle.remove()
        self._hooks = {}

    def begin(self, opened: Opened, forward: Forward, capture: Capture) -> None:
        """The step is open, the weights are at W."""
        if self.done or opened.void or opened.batch is None:
            return
        with self._trying(), forward.precision():
            self._looking = Looking(opened, opened.batch, forward, capture)

    def end(self, clip: EllipsotopeClip, forwards: int) -> None:
        """It has ended: they are at W + c·dW. `forwards`: how many have made its gradient."""
        looking, self._looking = self._looking, None
        gradients, self._gradients = self._gradients, {}
        if looking is not None and clip.last is not None and not bool(clip.last.skipped):
            self._see(looking, clip, gradients, clip.workers.alone and forwards == 1)
        if self.done:
            self.stop()
        else:
            self.watch(clip.weights)

    def _see(
        self, looking: Looking, clip: EllipsotopeClip, gradients: dict[int, Tensor], alone: bool
    ) -> None:
        with self._trying(), looking.forward.precision():
            looking.after(clip.weights, gradients if alone else None)
        self.seconds += looking.seconds
        self.patience -= 1
        if clip.any_process(looking.seen.moved):
            self.steps.append(looking.seen)
        if self.done and self.steps and self.failed is None:
            self._conclude(clip, looking.batch)

    def _conclude(self, clip: EllipsotopeClip, batch: Batch) -> None:
        """What the steps show of the rows that choose c is mended, and looked at anew; the rest is told."""
        k, size, prober = batch.choice.k, batch.size, batch.prober
        apart = _excess(self.steps, clip.settings.target_kl)
        if apart is not None and k < size and not prober.whole and clip.workers.alone:
            self._mended(f"a row's logits depend on other rows (KL {apart:.2g}): whole batches are called")
            prober.read_whole(
                "two forwards on the same rows at the same weights, in another order, differ by a KL of "
                f"{apart:.2g} nats per token: a row's logits depend on other rows",
                *(k, size),
            )
        elif clip.any_process(self.rows_unlike is not None) and not clip.spread and k < size:
            self._mended(
                f"the leading rows are unlike the others (KL × {self.rows_unlike or 1:.2g}): rows are drawn"
            )
            clip.spread = True
        else:
            self.finding = finding(self, batch, clip)
        if self.finding is not None:
            message = f"EBC's first steps look wrong: {self.finding} (check=False says nothing.)"
            warnings.warn(message, checks.EBCWarning, stacklevel=2)

    def _mended(self, change: str) -> None:
        self.changes.append(change)
        self.steps = []

    def state_dict(self) -> dict[str, Any]:
        """What was seen, so that a run that is resumed goes on where it was."""
        steps = [[getattr(step, name) for name in NUMBERS] for step in self.steps]
        empty = [[math.nan] * len(NUMBERS)] * (FIRST - len(steps))
        return {"steps": torch.tensor([*steps, *empty], dtype=torch.float64), "patience": self.patience}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        seen = [step for step in state["steps"].tolist() if not math.isnan(step[0])]
        self.steps = [Seen(**dict(zip(NUMBERS, step, strict=True))) for step in seen]
        self.patience = state["patience"]

    def forget(self) -> None:
        """The step that is open will not end."""
        self._looking = None
        self._gradients = {}

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

    def __init__(self, opened: Opened, batch: Batch, forward: Forward, capture: Capture):
        start = time.perf_counter()
        self.batch = batch
        self.forward = forward
        self.capture = capture
        self.kept = opened.kept
        self.k = len(batch.probe.z)
        self.size = min(batch.size, 2 * self.k)
        self.at = batch.choice.seen()
        # where all rows choose c, or are called together, one may depend on the others, and on their order
        self.turns = self.k < batch.size and not batch.prober.whole
        self.rows = batch.cut(self.at.flip(0) if self.turns else self.at)
        mask = None if forward.mask is None else capture.rows_first(forward.mask)
        self.mask = None if mask is None else rows.take(mask, self.at)
        self.leading_mask = mask
        try:
            self.z, self.outputs = self._logits()
        except Exception:  # they must be sorted, by their lengths as a rule
            self.turns = False
            self.rows = batch.cut(self.at)
            self.z, self.outputs = self._logits()
        mask_rows = None if self.mask is None else self.mask[: self.k]
        self.seen = Seen(float(mean_kl(batch.probe.z, self.z[: self.k], mask_rows)), batch.floor)
        self.seconds = time.perf_counter() - start

    def _logits(self) -> tuple[Tensor, dict[int, Tensor | None]]:
        """The logits, and what they are made of where they are no view of it: by place, rows first."""
        source = self.forward.source
        self.capture.keeping = source is not None
        try:
            z = self.batch.logits(self.rows, None if self.turns else self.at)
            returned = tensors_of(self.capture.returned)
        finally:
            self.capture.keeping = False
            self.capture.returned = None
        outputs = {}
        for place in [] if source is None else source.places:
            axis = self.batch.prober.axis
            some = rows_of(returned[place], self.size, axis) if place < len(returned) else None
            outputs[place] = some if some is None or not self.turns else some.flip(0)
        return (z.flip(0) if self.turns else z), outputs

    def after(self, weights: Sequence[Tensor], gradients: dict[int, Tensor] | None) -> None:
        """`gradients`: of the weights, where this forward has made all of them."""
        start = time.perf_counter()
        seen = self.seen
        z, outputs = self._logits()
        k = self.k
        halves = [slice(0, k), slice(k, self.size)]
        kls = []
        for half in halves:
            mask_rows = None if self.mask is None else self.mask[half]
            kls.append(float(mean_kl(self.z[half], z[half], mask_rows)) if len(z[half]) else math.nan)
        seen.kl, seen.kl_others = kls
        others = z[k:, ..., 0] if self.mask is None else self.mask[k:]
        seen.tokens_others = others.numel() if self.mask is None else int(others.bool().sum())
        seen.unused = self.forward.used is False
        gradient, source = self.forward.gradient, self.forward.source
        if gradient is not None and gradient.usable:
            seen.idle = losses.without_loss(gradient, self.leading_mask)
            seen.doubt = losses.doubt(gradient, losses.are_log_probabilities(self.z))
        elif source is not None and all(place in source.gradients for place in source.places):
            seen.idle = source.idle(self.leading_mask)
        leading = self.batch.choice.order is None  # as the rows are whose gradient is known
        if gradients is not None and leading and seen.kl < SMALL and not self.batch.prober.normalises:
            seen.share = self._share(z, outputs, weights, gradients)
        self.seconds += time.perf_counter() - start

    def _share(
        self,
        z: Tensor,
        outputs: dict[int, Tensor | None],
        weights: Sequence[Tensor],
        gradients: dict[int, Tensor],
    ) -> float:
        """The part of the promised fall of the loss that passes the logits, or what they are made of."""
        forward, source = self.forward, self.forward.source
        if self.kept is None or forward.backwards != 1 or (source is not None and source.has_weights):
            return math.nan
        if source is None:
            seen = _fall(forward.gradient, self.z, z, self.k)
        else:
            falls = [_fall(source.gradients.get(i), self.outputs[i], outputs[i], self.k) for i in outputs]
            seen = sum(falls)
        promised = 0.0
        for p, old in zip(weights, self.kept.views, strict=True):
            g = gradients.get(id(p))
            if g is None and p.grad is not None:
                return math.nan  # it was made by something else than backward
            if g is not None:
                promised -= float((real(g).double() * (real(local(p)).double() - real(old).double())).sum())
        return seen / promised if promised > 0 else math.nan


def _fall(gradient: losses.Gradient | None, before: Tensor | None, after: Tensor | None, k: int) -> float:
    """What a movement makes of the fall of the loss, from its `k` leading rows; NaN where that is unknown."""
    if gradient is None or not gradient.usable or before is None or after is None:
        return math.nan
    rows = min(len(gradient.rows), k)
    g = gradient.rows[:rows].double()
    part = float(g.abs().sum()) / gradient.mass
    if not part > 0 or before[:rows].shape != g.shape or after[:rows].shape != g.shape:
        return math.nan
    return -float((g * (after[:rows].double() - before[:rows].double())).sum()) / part


def finding(look: Look, batch: Batch, clip: EllipsotopeClip) -> str | None:
    """What the steps together say, a sentence with its remedy for each thing that is not as it should be.

    `batch`: that of the last of them.
    """
    steps, target_kl = look.steps, clip.settings.target_kl
    k, size, axis = len(batch.probe.z), batch.size, batch.prober.axis
    sentences = [look.wrong] if look.wrong is not None else []
    apart = _excess(steps, target_kl)
    if apart is not None and k < size and not batch.prober.whole:
        sentences.append(
            f"two forwards on the same rows at the same weights, in another order, differ by a KL of "
            f"{apart:.2g} nats per token. A row's logits depend on other rows: let all choose c, "
            f"probe_sequences='all'{'' if axis else checks.TIME_FIRST}."
        )
    free = [] if clip.workers.sharded else _not_limited(clip)
    if free:
        sentences.append(
            f"{', '.join(free[:3])}{', …' if free[3:] else ''} get gradients and are of no optimizer that "
            "EBC limits: if another moves them, its steps are not limited. Attach to all that train the "
            "model, attach(model, [one, other])."
        )
    if all(s.unused for s in steps):
        sentences.append(
            "no gradient comes back to the last training forward before a step: call the one that is trained "
            "inside `with ebc.this_forward():`."
        )
    doubts = [s.doubt for s in steps if s.doubt]
    if len(doubts) == len(steps) and look.wrong is None:
        sentences.append(doubts[0])
    idle = _median([s.idle for s in steps])
    if idle > IDLE:
        sentences.append(
            f"the loss does not depend on {idle:.0%} of the positions that EBC measures: say which count, by "
            "the forward's arguments, as mask_of=lambda given: given['labels'] != -100 where it is given "
            "labels, or by what the loop knows."
        )
    share = _median([s.share for s in steps])
    if share < PART and not doubts and look.wrong is None:
        sentences.append(
            f"{max(share, 0):.0%} of the fall of the loss passes the logits that EBC measures: training "
            "optimizes something else as well, or its forward does what evaluation's does not (a mask that "
            "it draws), and no budget on these logits holds that back. If another output matters more, say "
            "logits_of=…."
        )
    ratio = look.rows_unlike
    if ratio is not None:
        sentences.append(
            f"on other rows the KL of a step is {ratio:.2g} × that on the {k} rows that choose c: raise "
            f"probe_sequences, or take budget='tracked'."
        )
    return " ".join(sentences) if sentences else None


def _not_limited(clip: EllipsotopeClip) -> list[str]:
    """The names of the model's parameters that get gradients and are none of those that are limited."""
    limited = {id(p) for p in clip.weights}
    named = {n: p for n, p in clip.model.named_parameters() if id(p) not in limited}
    return [n for n, p in named.items() if p.requires_grad and p.grad is not None]


def _excess(steps: list[Seen], target_kl: float) -> float | None:
    """The KL between two forwards at W, where it is too large to be rounding; else None."""
    apart = max(s.apart for s in steps)
    return (
        apart
        if apart > max(10 * steps[0].floor, 0.1 * min(target_kl, _median([s.kl for s in steps])))
        else None
    )


def _median(values: list[float]) -> float:
    """Return the median of those that could be seen; NaN if there is none, which no comparison holds for."""
    known = sorted(v for v in values if not math.isnan(v))
    return known[len(known) // 2] if known else math.nan
