"""`EllipsotopeClip`: a torch optimizer that applies c·dW, c chosen so that predictions move by at most a KL budget.

One step, in order: gradients checked → weights copied → base optimizers step → projection → c from the budget → weights set to
lerp(W, W_new, c), exact at 0 and 1 → at every audit the applied KL is measured on tokens that did not choose c, and the
controller moves delta. Formulas and failure rules: docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from .budget import CLIPPED_BELOW, clip_coefficient, shadow_search, trust_radius
from .controller import make_controller, schedule_multiplier
from .grouping import group_parameters
from .logits import centre, mean_kl, rms_norm
from .probe import Batch, Prober
from .sensitivity import SensitivityFilter, due_groups, probe_fd, probe_jvp
from .surrogate import aggregate as aggregate_contributions

BUDGETS = ("shadow", "surrogate")


class NonFiniteUpdateError(ArithmeticError):
    """The base optimizer proposed a non-finite update from finite gradients. A budgeted step has restored the weights."""


@dataclass
class StepStats:
    """What one step did. 0-dim tensors (`contributions` and `sensitivities`: (L,)); None where not measured."""

    clip_coefficient: Tensor  # c, in [0, 1]
    grad_norm: Tensor  # global L2 norm of the gradient
    skipped: bool = False  # weights and, for a bad gradient, optimizer state untouched
    delta: Tensor | None = None  # the budget used, nats per token
    target_kl: float | None = None  # delta*, scheduled, nats per token
    trial: Tensor | None = None  # the last shadow trial scale
    trial_kl: Tensor | None = None  # the KL measured there, nats per token
    measurements: int = 0
    surrogate: Tensor | None = None  # S, logits per token
    contributions: Tensor | None = None  # s_g, logits per token
    sensitivities: Tensor | None = None  # beta_g, where measured at this step
    applied_kl: Tensor | None = None  # on tokens that did not choose c, nats per token
    movement: Tensor | None = None  # T, logits per token, on the same tokens
    tightness: Tensor | None = None  # T/(c·S)
    audit_tokens: int = 0


class EllipsotopeClip(torch.optim.Optimizer):
    """Scale each update of `optimizers` by one c <= 1 so that predictions move by about `target_kl` nats per token.

    Args:
        model: the module whose predictions are budgeted.
        optimizers: one torch optimizer, or several that share out the parameters (Muon on matrices, Adam on the rest).
        target_kl: delta*, nats per token; `math.inf` applies every update whole, bit-equal to the plain optimizer.
        budget: `shadow` measures the KL of a trial step; `surrogate` bounds the movement by the groups' sensitivities.
        aggregate: of the groups' contributions: `l1`, `sqrtl_l2` (bounds) or `l2` (not a bound).
        grouping: which parameters are one group (`block`).
        controller: `fixed`, `pi` or `log_pi`; `gains` overrides its gains.
        schedule: of delta*: `constant`, or `linear` over `total_steps`.
        probe_sequences: leading rows of the batch that choose c.
        probe, cadence, beta_init: how beta is measured (`jvp`, `fd`), how often (`warm`, `published`), how it starts.
        sensitivity_every: under `shadow`, steps between recordings of S and the contributions; 0 never.
        audit_every: steps between measurements of the applied KL; 0 never. Default: 10; 20 under `pi`; 0 if
            `target_kl` is infinite.
        audit_tokens: how many tokens an audit needs at least; it uses rows that the probe left out.
        refine_steps, measurements: `shadow` may measure up to `measurements` times in its first `refine_steps` steps.
        floor: the smallest KL that means anything, nats per token. Default: by the logits' dtype, so a forward that casts
            low-precision logits up needs it told (1e-5).
        forward: (model, inputs) -> logits (B, ..., V), or an object with `.logits`. Default: call the model.
        project: called after the base step, sets the weights to their projection (a convex set).
        fresh_logits: compute z(W) anew without dropout. Default: if the model holds dropout or batch-norm modules.
    Raises:
        ValueError: an unknown name, a target below ten floors, or parameters outside `model`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        target_kl: float,
        budget: str = "shadow",
        aggregate: str = "l1",
        grouping: str = "block",
        controller: str = "fixed",
        gains: dict[str, float] | None = None,
        schedule: str = "constant",
        total_steps: int | None = None,
        probe_sequences: int = 2,
        probe: str = "jvp",
        cadence: str = "warm",
        beta_init: str = "first",
        sensitivity_every: int = 0,
        audit_every: int | None = None,
        audit_tokens: int = 512,
        refine_steps: int = 20,
        measurements: int = 3,
        floor: float | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        project: Callable[[], None] | None = None,
        fresh_logits: bool | None = None,
    ):
        if not target_kl > 0:
            raise ValueError(f"target_kl must be > 0 nats per token, not {target_kl}.")
        if budget not in BUDGETS:
            raise ValueError(f"budget={budget!r} is unknown; it takes {', '.join(BUDGETS)}.")
        if probe not in ("jvp", "fd"):
            raise ValueError(f"probe={probe!r} is unknown; it takes jvp or fd.")
        if probe_sequences < 1:
            raise ValueError(f"probe_sequences must be at least 1, not {probe_sequences}.")
        aggregate_contributions(torch.ones(1), aggregate)
        schedule_multiplier(schedule, 0, total_steps)

        self.bases = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        named = {id(p): name for name, p in model.named_parameters()}
        trained = [p for base in self.bases for group in base.param_groups for p in group["params"]]
        if len({id(p) for p in trained}) < len(trained):
            raise ValueError("a parameter belongs to two of the optimizers.")
        if any(id(p) not in named for p in trained):
            raise ValueError("an optimizer holds a parameter that is not the model's.")
        order = {pid: i for i, pid in enumerate(named)}
        self.weights = sorted((p for p in trained if p.requires_grad), key=lambda p: order[id(p)])
        if not self.weights:
            raise ValueError("the optimizers hold no trainable parameter.")
        self.names = [named[id(p)] for p in self.weights]
        super().__init__(self.weights, {})
        self.defaults = self.bases[0].defaults  # some schedulers look there for a momentum
        self._share_groups()

        self.model = model
        self.active = math.isfinite(target_kl)
        self.target_kl, self.budget, self.aggregate = target_kl, budget, aggregate
        self.schedule, self.total_steps = schedule, total_steps
        self.probe_sequences, self.probe, self.cadence = probe_sequences, probe, cadence
        self.sensitivity_every = sensitivity_every
        if audit_every is None:
            audit_every = 0 if not self.active else 20 if controller == "pi" else 10
        self.audit_every = audit_every
        self.audit_tokens = audit_tokens
        self.refine_steps, self.measurements = refine_steps, measurements
        self.floor = floor
        self.project = project
        self.prober = Prober(model, forward, fresh_logits)

        device = self.weights[0].device
        index = {name: i for i, name in enumerate(self.names)}
        self.groups = {g: [index[n] for n in ns] for g, ns in group_parameters(self.names, grouping).items()}
        self.filters = {g: SensitivityFilter(cadence=cadence, init=beta_init) for g in self.groups}
        gains = dict(gains or {})
        if controller == "pi":
            gains.setdefault("audit_every", float(self.audit_every))
        self.controller = make_controller(controller, target_kl if self.active else 1.0, **gains).to(device)
        self.step_index = 0
        self.trial = torch.full((), 0.1, dtype=torch.float64, device=device)
        self._old: list[Tensor] | None = None  # the two copies of the weights that are held
        self._new: list[Tensor] | None = None
        if floor is not None:
            self._check_floor(floor)

    # -- a torch optimizer to schedulers, scalers and checkpoints ------------------------------------------------------

    def _share_groups(self) -> None:
        self.param_groups = [group for base in self.bases for group in base.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once wrapped: the groups are the base optimizers' own."""
        if hasattr(self, "model"):
            raise ValueError("add parameter groups to the base optimizer before it is wrapped.")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, the bases' states included; loads with `weights_only=True`."""
        return {
            "bases": [base.state_dict() for base in self.bases],
            "step_index": self.step_index,
            "trial": self.trial.clone(),
            "controller": self.controller.state_dict(),
            "filters": {g: f.state_dict() for g, f in self.filters.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for base, state in zip(self.bases, state_dict["bases"], strict=True):
            base.load_state_dict(state)
        self._share_groups()
        self.step_index = state_dict["step_index"]
        self.trial = state_dict["trial"].to(self.trial)
        self.controller.load_state_dict(state_dict["controller"])
        for g, f in self.filters.items():
            f.load_state_dict(state_dict["filters"][g])

    # -- one step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, tokens: Any = None, logits: Tensor | None = None, mask: Tensor | None = None) -> StepStats:  # type: ignore[override]
        """Apply one budgeted update from the gradients at hand.

        Args:
            tokens: the batch as `forward` takes it, batch first; may be None when nothing is to be measured.
            logits: the training forward's own, (B, ..., V), so that z(W) need not be computed again.
            mask: (B, ...) bool, the token positions that count; all if None.
        Raises:
            NonFiniteUpdateError: the base proposed a non-finite update (weights restored, unless the budget is infinite).
            ValueError: tokens are missing, or the batch has no row left for the audit.
        """
        t, self.step_index = self.step_index, self.step_index + 1
        one = torch.ones((), dtype=torch.float64, device=self.weights[0].device)
        target: float | None = None
        if self.active:
            target = self.target_kl * schedule_multiplier(self.schedule, t, self.total_steps)
            self.controller.rescale(target)
        gradients = [p.grad for p in self.weights if p.grad is not None]
        grad_norm = get_total_norm(gradients)
        if not _all_finite(gradients, grad_norm):
            return StepStats(0 * one, grad_norm, skipped=True, delta=self._delta(), target_kl=target)

        audit = self.audit_every > 0 and t % self.audit_every == 0
        recording = self.sensitivity_every > 0 and t % self.sensitivity_every == 0
        batch = self._batch(tokens, logits, mask, audit) if self.active or audit else None
        if self.active:
            self._old = self._copy(self._old)
        for base in self.bases:
            base.step()
        self._refuse_non_finite()
        if self.project is not None:
            self.project()

        stats = StepStats(one, grad_norm, delta=self._delta(), target_kl=target)
        if self.active:
            assert batch is not None
            if self.budget == "surrogate" or recording:
                self._sense(stats, batch, t, everything=self.budget != "surrogate")
            if self.budget == "surrogate":
                self._clip_by_bound(stats)
            else:
                self._clip_by_measurement(stats, batch, t)
        if audit and not stats.skipped:
            assert batch is not None
            self._audit(stats, batch)
        torch.clear_autocast_cache()
        return stats

    def _delta(self) -> Tensor | None:
        return self.controller.delta.clone() if self.active else None

    def _batch(self, tokens: Any, logits: Tensor | None, mask: Tensor | None, audit: bool) -> Batch:
        k = self.probe_sequences
        batch = Batch(self.prober, tokens, logits, mask, self.weights[0], k=k, audit=audit, audit_tokens=self.audit_tokens)
        if self.floor is None:
            self._check_floor(batch.floor)
        return batch

    def _copy(self, buffers: list[Tensor] | None) -> list[Tensor]:
        if buffers is None:
            return [p.detach().clone() for p in self.weights]
        torch._foreach_copy_(buffers, self.weights)
        return buffers

    def _refuse_non_finite(self) -> None:
        if _all_finite(self.weights, get_total_norm(self.weights)):
            return
        if self._old is not None:
            torch._foreach_copy_(self.weights, self._old)
        raise NonFiniteUpdateError(f"step {self.step_index - 1}: the optimizer proposed a non-finite update.")

    def _clip_by_measurement(self, stats: StepStats, batch: Batch, t: int) -> None:
        old = self._old
        assert old is not None
        assert stats.delta is not None
        assert self.floor is not None
        self._new = self._copy(self._new)
        new = self._new

        def measure(trial: Tensor) -> Tensor:
            torch._foreach_copy_(self.weights, old)
            torch._foreach_lerp_(self.weights, new, float(trial))
            return mean_kl(batch.z_probe, batch.logits(batch.probe), batch.probe_mask)

        found = shadow_search(
            measure,
            stats.delta,
            self.trial,
            measurements=self.measurements if t < self.refine_steps else 1,
            floor=self.floor,
        )
        self.trial = found.next_trial
        stats.clip_coefficient, stats.trial, stats.trial_kl = found.c, found.trial, found.kl
        stats.measurements = found.measurements
        torch._foreach_copy_(self.weights, old)
        if found.skipped:
            stats.skipped = True
        else:
            torch._foreach_lerp_(self.weights, new, float(found.c))

    def _sense(self, stats: StepStats, batch: Batch, t: int, *, everything: bool) -> None:
        """Update the betas that are due and record the contributions; the weights are at W_new and stay there."""
        old = self._old
        assert old is not None
        deltas = torch._foreach_sub(self.weights, old)
        squares = torch.stack(torch._foreach_norm(deltas)).double().square()
        norms = torch.stack([squares[members].sum() for members in self.groups.values()]).sqrt()
        due = list(self.groups) if everything else due_groups(t, list(self.groups), self.cadence)
        due += [g for g in self.groups if self.filters[g].beta is None and g not in due]
        weights = {f"model.{n}": w for n, w in zip(self.names, old, strict=True)}
        measured = torch.full_like(norms, torch.nan)
        for i, (group, members) in enumerate(self.groups.items()):
            if group not in due or not norms[i] > 0:
                continue
            direction = {f"model.{self.names[j]}": deltas[j] / norms[i].to(deltas[j]) for j in members}
            if self.probe == "jvp":
                observed = probe_jvp(batch.functional, weights, direction, batch.probe_mask)
            else:
                known = self.filters[group].beta
                guess = 1.0 if known is None or not known > 0 else float(known)
                observed = probe_fd(batch.functional, weights, direction, batch.probe_mask, guess)
            measured[i] = self.filters[group].update(observed)
        betas = [self.filters[g].beta for g in self.groups]
        beta = torch.stack([torch.full_like(norms[0], torch.nan) if b is None else b.to(norms) for b in betas])
        stats.contributions = torch.where(norms > 0, beta * norms, 0)  # a group at rest needs no beta
        stats.sensitivities = measured if due else None
        stats.surrogate = aggregate_contributions(stats.contributions, self.aggregate)

    def _clip_by_bound(self, stats: StepStats) -> None:
        assert self._old is not None
        assert stats.delta is not None
        assert stats.surrogate is not None
        c = clip_coefficient(trust_radius(stats.delta), stats.surrogate)
        if not torch.isfinite(c):
            stats.skipped, stats.clip_coefficient = True, torch.zeros_like(c)
            torch._foreach_copy_(self.weights, self._old)
            return
        stats.clip_coefficient = c
        if c < 1:
            torch._foreach_lerp_(self._old, self.weights, float(c))
            torch._foreach_copy_(self.weights, self._old)

    def _audit(self, stats: StepStats, batch: Batch) -> None:
        z_new = batch.logits(batch.held)
        stats.applied_kl = mean_kl(batch.z_held, z_new, batch.held_mask).clamp(min=0)
        stats.movement = rms_norm(centre(z_new) - centre(batch.z_held), batch.held_mask)
        stats.audit_tokens = batch.held_tokens
        if stats.surrogate is not None:
            stats.tightness = stats.movement / (stats.clip_coefficient * stats.surrogate)
        if self.active:
            self.controller.update(stats.applied_kl, stats.clip_coefficient < CLIPPED_BELOW)

    def _check_floor(self, floor: float) -> None:
        if self.active and self.budget == "shadow" and self.target_kl < 10 * floor:
            raise ValueError(
                f"target_kl={self.target_kl:g} is below ten times {floor:g}, the smallest KL this precision can see."
            )
        self.floor = floor


def _all_finite(tensors: Sequence[Tensor], norm: Tensor) -> bool:
    """Whether every element is finite, given their joint norm; only a norm that overflowed needs a look at each."""
    return bool(torch.isfinite(norm)) or all(bool(torch.isfinite(t).all()) for t in tensors)
