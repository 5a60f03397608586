"""Stabilizers of a base optimizer that moves the weights inside backward and leaves no gradient after it.

`InBackward` audits such a base and follows the rules for failing steps as far as they still can be: when a
gradient is found not to be finite, other tensors have moved. `LaggedClip` is EBC there. c scales all of an
update, of which nothing is known before backward has ended, so c is taken from the KLs of earlier steps; it
bounds nothing at the step itself.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import nn

from .budgets import Lagged
from .clip import EllipsotopeClip
from .flat import joint_norm
from .given.bases import Optimizers
from .options import LAGGED
from .proposal import Opened, Proposal
from .stabilized import StabilizedOptimizer
from .step import NonFiniteUpdateError, StepInputs, StepStats


class InBackward(StabilizedOptimizer):
    """A plain optimizer that moves weights inside backward, with audits and rules for failing steps.

    `begin_step()` comes before backward, with the step's learning rate set, and `take_step` after it. z(W) is
    the training forward's, since the weights have moved when it is needed.

    The base is like `ebc_lab.axiom.AXIOM`: it says that it is `hooked`. Its `backward` tells of the last
    backward pass the `norms` of the gradients, by parameter, 0-dim; the parameters that are `bad`: their
    gradient was not finite, and they have not moved; and with `record_slope` the `slopes` <gradient, dW>, by
    parameter, 0-dim. Its `step` ends the step, and raises a FloatingPointError where a gradient was not
    finite.

    Raises:
        ValueError: several base optimizers or one without hooks, dropout (z(W) would have to be computed
            again), a curve of the KL (there is no proposal to scale).
    """

    inside_backward = True
    takes_arithmetic = False

    def __init__(self, model: nn.Module, optimizers: Optimizers, **options: Any):
        super().__init__(model, optimizers, **options)
        if len(self.bases) != 1:
            raise ValueError("one base optimizer is needed.")
        if self.prober.fresh_logits:
            raise ValueError("dropout or batch norm: z(W) cannot be computed once the weights have moved.")
        if self.curve_every:
            raise ValueError("curve_every must be 0: there is no proposal to scale.")
        self.given.known_to = 0.0  # once the weights have moved, what logits were at W cannot be told
        self.base: Any = self.bases[0]

    def _check_workers(self) -> None:
        super()._check_workers()
        if not self.workers.alone:
            raise ValueError(
                "weights that move inside backward follow the gradients of one process: process_group=None."
            )

    def step(self, *args: Any, **kwargs: Any) -> StepStats:  # type: ignore[override]
        raise RuntimeError(
            "weights move inside backward: call begin_step() before it and take_step() after it."
        )

    def begin_step(self) -> int:
        t = super().begin_step()
        self.base.record_slope = self.audits(t)
        return t

    @torch.no_grad()
    def take_step(self, inputs: StepInputs) -> StepStats:
        """The rest of a step after backward: check and measure what has moved; see `StabilizedOptimizer`."""
        inputs = self._rows_first(inputs)
        seen = self.base.backward
        norms = [seen.norms[p].to(p.dtype) for p in self.weights if p in seen.norms]
        norm = joint_norm([torch.stack(norms)]) if norms else joint_norm([])
        bad = self._flags[len(seen.bad) > 0]
        stats = StepStats(self._one, norm, skipped=bad, bad_gradient=bad, failed=self._flags[False])
        self._begin(stats)
        self._stats = stats
        if bad:
            with suppress(FloatingPointError):  # it has been told
                self.base.step()
            stats.clip_coefficient = torch.zeros_like(self._one)
            return stats
        self.base.step()
        proposal = self._moved(inputs, stats)
        for constrain in (self.project, self.retract):
            if constrain is not None:
                constrain()
        self._limit_update(stats, proposal)
        if self.audits(inputs.t):
            slopes = [seen.slopes[p] for p in self.weights if p in seen.slopes]
            stats.slope = torch.stack(slopes).double().sum() / stats.clip_coefficient if slopes else None
            self._audit(stats, proposal)
            self._audited(stats, proposal)
        torch.clear_autocast_cache()
        return stats

    def _moved(self, inputs: StepInputs, stats: StepStats) -> Proposal:
        """What the step has left: no copy of W is there to go back to. Raises NonFiniteUpdateError."""
        layout = self._laid_out()
        layout.read()
        if self._bad(layout.parts, joint_norm(layout.parts)):
            raise NonFiniteUpdateError(f"step {inputs.t}: the optimizer made a non-finite update.")
        audit = self.audits(inputs.t)
        batch = self._batch(inputs, audit) if audit or self._measures(inputs.t) else None
        opened = Opened(inputs.t, stats, batch, audit, curve=False, kept=None, copies=[])
        return self._proposal(opened, layout, True)


class LaggedClip(InBackward, EllipsotopeClip):
    """EBC whose c is known before backward: the KL of c·dW is taken to grow with (c·lr)² as it did lately.

    The base moves the weights at the rate c·lr, so weight decay is scaled as well; see `budgets.Lagged`.
    Arguments are those of `EllipsotopeClip`, with budget="lagged" (the default).

    Raises:
        ValueError: as `InBackward`; a grouping that leaves weights out, or a controller that compares losses.
    """

    budgets: ClassVar[tuple[str, ...]] = (LAGGED,)
    budget: Lagged

    def __init__(self, model: nn.Module, optimizers: Optimizers, **options: Any):
        if options.get("settings") is None:
            options.setdefault("budget", LAGGED)
        super().__init__(model, optimizers, **options)
        if len(self.scaled) < len(self.weights):
            raise ValueError("budget='lagged' scales every weight: choose another grouping than 'matrices'.")
        if "loss_drop" in self.controller.needs:
            raise ValueError(
                f"controller={self.settings.controller!r} compares losses at W, which has moved."
            )
        self._rates: list[float] = []  # the groups' learning rates without c, from `begin_step` on

    def begin_step(self) -> int:
        self._restore_rates()
        t = super().begin_step()
        self._rates = [group["lr"] for group in self.param_groups]
        delta = float(self.controller.delta) * self.radius_factor**2
        c = self.budget.choose_c(t, delta, float(self._rates[0]))
        for group in self.param_groups:
            group["lr"] = group["lr"] * c
        return t

    def _restore_rates(self) -> None:
        for group, rate in zip(self.param_groups, self._rates, strict=False):
            group["lr"] = rate
        self._rates = []

    @torch.no_grad()
    def take_step(self, inputs: StepInputs) -> StepStats:
        try:
            return super().take_step(inputs)
        finally:
            self._restore_rates()

    def _limit_update(self, stats: StepStats, proposal: Proposal) -> None:
        """Record c, and learn from the KL of the update, which has been applied."""
        stats.clip_coefficient = self.budget.find_c(stats, proposal)
