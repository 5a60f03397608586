"""`Look`: what the first steps under `attach` showed, and what it says (docs/own_loop.md, "The first steps").

`first` looks; here is what was seen, and the sentences that follow from it.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import astuple, dataclass
from typing import Any

import torch

from ..clip import EllipsotopeClip
from ..probe import Batch
from . import checks

FIRST = 3  # steps that moved something are looked at, and forwards of a training
IDLE = 1 / 3  # from this share on, positions that the loss does not depend on are told
PART = 1 / 3  # of the loss's fall, what the part that passes the logits has at least
UNLIKE = 1.5  # a factor between the KL of other rows and that of those that chose c
FEWER = 3.0  # that factor where the other rows hold fewer than `checks.FEW_TOKENS` tokens
DEPEND = (
    "two forwards on the same rows at the same weights, in another order, differ by a KL of {:.2g} "
    "nats per token"
)


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

    `steps`: each that moved something; `wrong`: what the loss was seen to do to the logits once a step had
    been taken, None if nothing; `finding`: what is wrong, None if all is well or not all is seen yet;
    `changes`: what was done about rows; `failed`: why nothing more can be seen, as where memory is short.
    """

    def __init__(self) -> None:
        self.steps: list[Seen] = []
        self.wrong: str | None = None
        self.finding: str | None = None
        self.changes: list[str] = []
        self.failed: str | None = None
        self.patience = 100  # steps in which nothing moves, as at a learning rate of 0, end it

    def __repr__(self) -> str:
        lines = ["step        KL  on other rows     apart     share      idle"]
        for i, s in enumerate(self.steps, 1):
            lines.append(f"{i:4}{s.kl:10.3g}{s.kl_others:15.3g}{s.apart:10.3g}{s.share:10.3g}{s.idle:10.3g}")
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

    def see(self, seen: Seen, batch: Batch, clip: EllipsotopeClip) -> None:
        """One step that was looked at."""
        self.patience -= 1
        if clip.any_process(seen.moved):
            self.steps.append(seen)
        if self.done and self.steps and self.failed is None:
            self._conclude(clip, batch)

    def _conclude(self, clip: EllipsotopeClip, batch: Batch) -> None:
        """What the steps show of the rows that choose c is mended, and looked at anew; the rest is told."""
        k, size, prober = batch.choice.k, batch.size, batch.prober
        apart = _excess(self.steps, clip.settings.target_kl)
        if apart is not None and k < size and not prober.whole and clip.workers.alone:
            self._mended(f"a row's logits depend on other rows (KL {apart:.2g}): whole batches are called")
            prober.read_whole(f"{DEPEND.format(apart)}: a row's logits depend on other rows", k, size)
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
        empty = [Seen(math.nan, math.nan)] * (FIRST - len(self.steps))
        steps = [astuple(step)[:-1] for step in (*self.steps, *empty)]  # without the sentence
        return {"steps": torch.tensor(steps, dtype=torch.float64), "patience": self.patience}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = [Seen(*step) for step in state["steps"].tolist() if not math.isnan(step[0])]
        self.patience = int(state["patience"])


def finding(look: Look, batch: Batch, clip: EllipsotopeClip) -> str | None:
    """What the steps together say, a sentence with its remedy for each thing that is not as it should be.

    `batch`: that of the last of them.
    """
    steps, target_kl = look.steps, clip.settings.target_kl
    k, size, axis = len(batch.probe.z), batch.size, batch.prober.axis
    sentences = [look.wrong] if look.wrong else []
    apart = _excess(steps, target_kl)
    if apart is not None and k < size and not batch.prober.whole:
        sentences.append(
            f"{DEPEND.format(apart)}. A row's logits depend on other rows: let all choose c, "
            f"probe_sequences='all'{'' if axis else checks.TIME_FIRST}."
        )
    free = [] if clip.workers.sharded else _not_limited(clip)
    if free:
        sentences.append(
            f"{checks.listed(free)} get gradients and are of no optimizer that "
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
    least = max(10 * steps[0].floor, 0.1 * min(target_kl, _median([s.kl for s in steps])))
    return apart if apart > least else None


def _median(values: list[float]) -> float:
    """Return the median of those that could be seen; NaN if there is none, which no comparison holds for."""
    known = sorted(v for v in values if not math.isnan(v))
    return known[len(known) // 2] if known else math.nan
