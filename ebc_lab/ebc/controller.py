"""How the budget delta evolves from audit to audit, and how its target delta* is scheduled over a run.

A controller holds delta, a 0-dim float64 tensor on the model's device, and moves it in `update(kl, clipped,
**signals)` at each audit. No value is read on the host: every rule is branch-free. docs/method.md,
"Controllers and schedules".
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from .options import check_option

STEP = 1.5  # the factor by which `rsl` and `agreement` move delta
RISE = math.log(1.25) / 10  # the most that `confidence` adds to ln delta for each step
FALL = math.log(2.0) / 10  # the most that it takes away
REACH = 12.0  # |ln delta - ln delta*| at most
SMALLEST_TARGET = 1e-30  # nats per token: a schedule at 0 keeps delta/delta*, so that it can come back


class Fixed:
    """delta = delta*. The other rules are subclasses that say how `_rule` moves delta."""

    gains: ClassVar[dict[str, float]] = {}
    needs: ClassVar[tuple[str, ...]] = ()  # the signals that `update` must be given
    watches: ClassVar[bool] = False  # whether `observe` is to be called at every step

    def __init__(self, target: float, initial: float | None = None, **gains: float):
        unknown = set(gains) - set(self.gains)
        if unknown:
            raise ValueError(f"{type(self).__name__} has no gain {', '.join(sorted(unknown))}.")
        if not target > 0:
            raise ValueError(f"a controller's target must be > 0 nats per token, not {target}.")
        self.gain = {**self.gains, **gains}
        self.target = torch.tensor(target, dtype=torch.float64)
        self.delta = torch.tensor(target if initial is None else initial, dtype=torch.float64)

    def to(self, device: torch.device | str) -> Fixed:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def rescale(self, target: float) -> None:
        """Move delta* (nats per token) along its schedule; delta moves by the same factor."""
        target = max(target, SMALLEST_TARGET)
        self.delta.mul_(target / self.target)
        self.target.fill_(target)

    @property
    def factor(self) -> Tensor:
        """What the rule has made of delta/delta*, 0-dim."""
        return self.delta / self.target

    def update(self, kl: Tensor | float, clipped: Tensor | bool, **signals: Tensor | float | None) -> Tensor:
        """One audit: the applied KL and whether the step was clipped -> delta, both in nats per token.

        Signals, all in nats per token; those in `needs` must be given, the others may be:
            loss_drop: loss(W) - loss(W + c·dW).
            slope: <grad loss, dW> of the whole proposal, unscaled.
            q: the predicted KL of the whole proposal, unscaled.
            c: the scale of the update that was applied, no unit; 1 if not given.
        A KL or a signal in use that is not finite changes nothing. Raises ValueError on a missing signal.
        """
        missing = [name for name in self.needs if signals.get(name) is None]
        if missing:
            raise ValueError(f"{type(self).__name__}.update needs the signal {', '.join(missing)}.")
        kl = self._number(kl)
        values = {name: self._number(signals.get(name)) for name in self.needs}
        if self.needs:
            values["c"] = self._number(signals.get("c"))
        usable = torch.stack([kl, *values.values()]).isfinite().all()
        before = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        self._rule(kl, self._number(clipped).bool(), values)
        for name, value in before.items():  # in place: a CUDA graph reads the memory it was captured with
            value.copy_(torch.where(usable, getattr(self, name), value))
            setattr(self, name, value)
        return self.delta.clone()

    def observe(self, overconfidence: Tensor | float) -> None:
        """What a rule that `watches` is told of every step: how much too bold the batch's predictions are."""

    def _number(self, value: Tensor | float | None) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(self.delta)
        # filled where it lies: a copy of a number from the host cannot be part of a CUDA graph
        return torch.full_like(self.delta, 1.0 if value is None else value)

    def _rule(self, kl: Tensor, clipped: Tensor, signals: dict[str, Tensor]) -> None:
        return

    def _step(self, down: Tensor, up: Tensor) -> None:
        """delta/1.5 where `down`, else 1.5·delta where `up`; within `REACH` of delta*."""
        moved = torch.where(down, self.delta / STEP, torch.where(up, STEP * self.delta, self.delta))
        self.delta = moved.clamp(self.target * math.exp(-REACH), self.target * math.exp(REACH))

    def state_dict(self) -> dict[str, Any]:
        return {k: v.clone() for k, v in vars(self).items() if isinstance(v, Tensor)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            getattr(self, name).copy_(value)


class LogPI(Fixed):
    """PI on e = ln(delta*/KL), unit-free; it pauses while nothing is clipped and the KL is below target."""

    gains: ClassVar[dict[str, float]] = {"kp": 0.2, "ki": 0.3}

    def __init__(self, target: float, initial: float | None = None, **gains: float):
        super().__init__(target, initial, **gains)
        self.previous = torch.tensor(math.nan, dtype=torch.float64)

    def _rule(self, kl: Tensor, clipped: Tensor, signals: dict[str, Tensor]) -> None:
        error = (self.target / kl.clamp(min=1e-12)).log()
        previous = torch.where(self.previous.isnan(), error, self.previous)
        move = self.gain["kp"] * (error - previous) + self.gain["ki"] * error
        moved = (self.delta / self.target).log() + move
        active = clipped | (error <= 0)
        self.delta = torch.where(active, self.target * moved.clamp(-REACH, REACH).exp(), self.delta)
        self.previous = error


class RSL(Fixed):
    """KL > 2·delta* -> delta/1.5; KL < delta*/2 and clipped -> 1.5·delta; within a factor e^12 of delta*.

    The library RSL-RL moves a learning rate by this rule (Rudin et al., arXiv:2109.11978).
    """

    def _rule(self, kl: Tensor, clipped: Tensor, signals: dict[str, Tensor]) -> None:
        self._step(down=kl > 2 * self.target, up=clipped & (kl < self.target / 2))


class Agreement(Fixed):
    """The classical trust-region ratio: r = loss_drop / (-c·slope - c²·q), the real over the predicted fall.

    Conn, Gould & Toint 2000. r < 1/4, or a prediction that is not a fall -> delta/1.5; r > 3/4 and clipped ->
    1.5·delta; within a factor e^12 of delta*. `ratio` is the last r, 0-dim, no unit: NaN before the first,
    and where no fall was predicted.
    """

    needs: ClassVar[tuple[str, ...]] = ("loss_drop", "slope", "q")

    def __init__(self, target: float, initial: float | None = None, **gains: float):
        super().__init__(target, initial, **gains)
        self.ratio = torch.tensor(math.nan, dtype=torch.float64)

    def _rule(self, kl: Tensor, clipped: Tensor, signals: dict[str, Tensor]) -> None:
        c = signals["c"]
        predicted = -c * signals["slope"] - c.square() * signals["q"]
        falls = predicted > 0
        self.ratio = torch.where(falls, signals["loss_drop"] / predicted, math.nan)
        self._step(down=~falls | (self.ratio < 1 / 4), up=clipped & (self.ratio > 3 / 4))


class Energy(Fixed):
    """delta = m·a·max(-slope, 0): the budget follows the loss's predicted fall; it may be 0.

    The gain `a` has no default: nats of KL per nat of predicted fall, natural KL / median(-slope) of the
    baseline. m is how far the schedule has moved delta* since construction. Raises ValueError if `a` is
    missing or not a positive number.
    """

    gains: ClassVar[dict[str, float]] = {"a": math.nan}
    needs: ClassVar[tuple[str, ...]] = ("slope",)

    def __init__(self, target: float, initial: float | None = None, **gains: float):
        super().__init__(target, initial, **gains)
        if not 0 < self.gain["a"] < math.inf:
            raise ValueError(
                "controller='energy' needs the gain a > 0: natural KL / median(-slope) of the baseline."
            )
        self.first_target = self.target.clone()

    def _rule(self, kl: Tensor, clipped: Tensor, signals: dict[str, Tensor]) -> None:
        self.delta = self.target / self.first_target * self.gain["a"] * (-signals["slope"]).clamp(min=0)


class Confidence(Fixed):
    """delta falls where predictions on new batches are too bold, and rises where they are too timid.

    `observe` is given each step's `overconfidence`, in standard errors. An audit takes `mean`, that of the K
    steps since the last one, and moves ln delta by -m·K·mean/20, at most `RISE` up and `FALL` down for each
    step; m is how far the schedule has moved delta* since construction. Within a factor e^12 of delta*.

    delta does not rise in the first 20 steps, which are timid at any delta; nor where nothing is clipped; nor
    where timidity heals by itself: it was more than a standard error, and halves within ten steps.

    It forgets its start on one text and not on another: docs/method.md. The logits' scale as a measure of
    confidence: Guo et al., arXiv:1706.04599.
    """

    watches: ClassVar[bool] = True

    def __init__(self, target: float, initial: float | None = None, **gains: float):
        super().__init__(target, initial, **gains)
        self.first_target = self.target.clone()
        self.total = torch.zeros((), dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)
        self.steps = torch.zeros((), dtype=torch.float64)
        self.mean = torch.zeros((), dtype=torch.float64)  # at the last audit

    def observe(self, overconfidence: Tensor | float) -> None:
        """One step's value; one that is not finite is no step."""
        value = self._number(overconfidence)
        known = value.isfinite()
        self.total.add_(torch.where(known, value, 0))
        self.count.add_(known)
        self.steps.add_(known)

    def _rule(self, kl: Tensor, clipped: Tensor, signals: dict[str, Tensor]) -> None:
        mean = self.total / self.count.clamp(min=1)
        heals = (self.mean < -1) & (mean > self.mean * 0.5 ** (self.count / 10))
        may_rise = clipped & (self.steps > 20) & ~heals
        move = (-mean / 20).clamp(-FALL, RISE)
        move = torch.where(may_rise, move, move.clamp(max=0))
        weight = self.count * self.target / self.first_target
        offset = (self.delta / self.target).log() + weight * move
        self.delta = self.target * offset.clamp(-REACH, REACH).exp()
        self.total = torch.zeros_like(self.total)
        self.count = torch.zeros_like(self.count)
        self.mean = mean


CONTROLLERS: dict[str, type[Fixed]] = {
    "fixed": Fixed,
    "log_pi": LogPI,
    "rsl": RSL,
    "agreement": Agreement,
    "energy": Energy,
    "confidence": Confidence,
}


def make_controller(kind: str, target: float, initial: float | None = None, **gains: float) -> Fixed:
    """A controller of delta around `target` that starts from `initial` (default: the target), nats per token.

    Gains left out take the kind's own. Raises ValueError on an unknown kind or gain, and if `energy` is not
    given its gain.
    """
    check_option("controller", kind, CONTROLLERS)
    return CONTROLLERS[kind](target, initial, **gains)
