"""`EllipsotopeClip`: a torch optimizer that applies c·dW, c chosen so that predictions move by at most a KL budget.

The order of a step and the rules for failing ones are `StabilizedOptimizer`'s; here is how c is found and how delta evolves.
Formulas: docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .budget import clip_coefficient, fitted_log_k, shadow_search, trust_radius
from .controller import make_controller, schedule_multiplier
from .flat import Copy
from .grouping import group_parameters
from .logits import centre, half_fisher, mean_kl, rms_norm, token_mean
from .options import BOUNDED, BUDGETS, CLIPPED_BELOW, LEAST_MULTIPLIER, UNITS
from .probe import LOW_PRECISION, Batch
from .sensitivity import SensitivityFilter, due_groups, linearised, probe_fd, probe_jvp
from .stabilized import StabilizedOptimizer
from .step import StepStats
from .surrogate import Guard
from .surrogate import aggregate as aggregate_contributions


class EllipsotopeClip(StabilizedOptimizer):
    """Scale each update of `optimizers` by one c <= 1 so that predictions move by about `target_kl` nats per token.

    Args:
        model: the module whose predictions are budgeted.
        optimizers: one torch optimizer, or several that share out the parameters (Muon on matrices, Adam on the rest).
        target_kl: delta*, nats per token; `math.inf` applies every update whole, bit-equal to the plain optimizer.
        budget: `shadow` measures the KL of a trial step; `surrogate` bounds the movement by the groups' sensitivities; `fisher`
            predicts the KL from one derivative of the whole proposal; `calibrated` is k·S², k fitted to that now and then.
        aggregate: of the groups' contributions: `l1`, `sqrtl_l2` (bounds) or `l2` (not a bound).
        grouping: which parameters are one group: `block`, `tensor`, `type`, `global`; `matrices` budgets and scales the
            hidden matrices alone, the rest moves freely.
        controller: `fixed`, `pi`, `log_pi`, `rsl`, `agreement` or `energy`; `gains` overrides its gains.
        schedule: of delta*: `constant`, `linear` or `cosine` over `total_steps`, or `lr_squared`.
        guard: `none`, `shrink` or `shrink_inflate`, under `surrogate` only.
        probe_sequences: leading rows of the batch that choose c.
        probe, cadence, beta_init: how beta is measured (`jvp`, `fd`), how often (`warm`, `published`, `dense`, `sweep`), how
            it starts.
        units: of the contributions. `per_lr` (forensic) divides them by the learning rate: delta then has no unit.
        sensitivity_every: under `shadow` and `fisher`, steps between recordings of S and the contributions; 0 never.
        audit_every: steps between measurements of the applied KL; 0 never. Default: 10; 20 under `pi`; 0 if
            `target_kl` is infinite.
        measure_every: of `shadow`: one step in so many measures. In between the KL is taken to be what the last measurement
            found for each unit of ||dW||², and c follows from that without a forward.
        refine_steps, measurements: `shadow` may measure up to `measurements` times in its first `refine_steps` steps.
        floor: the smallest KL that means anything, nats per token. Default: by the logits' dtype, so a forward that casts
            low-precision logits up needs it told (1e-5).
        options: `audit_tokens`, `forward`, `compiled`, `project`, `retract`, `fresh_logits`: see `StabilizedOptimizer`.
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
        guard: str = "none",
        probe: str = "jvp",
        cadence: str = "warm",
        beta_init: str = "first",
        units: str = "logits",
        sensitivity_every: int = 0,
        audit_every: int | None = None,
        measure_every: int = 1,
        refine_steps: int = 20,
        measurements: int = 3,
        floor: float | None = None,
        **options: Any,
    ):
        if not target_kl > 0:
            raise ValueError(f"target_kl must be > 0 nats per token, not {target_kl}.")
        for key, value, allowed in (
            ("budget", budget, BUDGETS),
            ("probe", probe, ("jvp", "fd")),
            ("units", units, UNITS),
        ):
            if value not in allowed:
                raise ValueError(f"{key}={value!r} is unknown; it takes {', '.join(allowed)}.")
        if measure_every < 1:
            raise ValueError(f"measure_every must be at least 1, not {measure_every}.")
        if guard != "none" and budget != "surrogate":
            raise ValueError(
                f"guard={guard!r} corrects a bound: it goes with budget='surrogate', not {budget!r}."
            )
        aggregate_contributions(torch.ones(1), aggregate)
        schedule_multiplier(schedule, 0, total_steps, 1.0)

        self.active = math.isfinite(target_kl)
        if audit_every is None:
            audit_every = 0 if not self.active else 20 if controller == "pi" else 10
        super().__init__(model, optimizers, audit_every=audit_every, **options)
        self.keeps_old = self.active
        self.target_kl, self.budget, self.aggregate = target_kl, budget, aggregate
        self.schedule, self.total_steps = schedule, total_steps
        self.probe, self.cadence, self.units = probe, cadence, units
        self.sensitivity_every, self.measure_every = sensitivity_every, measure_every
        self.refine_steps, self.measurements = refine_steps, measurements

        device = self.weights[0].device
        index = {name: i for i, name in enumerate(self.names)}
        shapes = {name: p.shape for name, p in zip(self.names, self.weights, strict=True)}
        self.groups = {
            g: [index[n] for n in ns] for g, ns in group_parameters(self.names, grouping, shapes).items()
        }
        self.scaled = sorted(i for members in self.groups.values() for i in members)
        self._members = [torch.tensor(members, device=device) for members in self.groups.values()]
        self.filters = {g: SensitivityFilter(cadence=cadence, init=beta_init) for g in self.groups}
        gains = dict(gains or {})
        if controller == "pi":
            gains.setdefault("audit_every", float(self.audit_every))
        self.controller = make_controller(controller, target_kl if self.active else 1.0, **gains).to(device)
        self.guard = Guard(guard).to(device)
        self._trial: Copy | None = None  # the other copy of the weights: those at which the KL is measured
        self.trial = torch.full((), 0.1, dtype=torch.float64, device=device)
        self.kl_rate = torch.zeros(
            (), dtype=torch.float64, device=device
        )  # KL over ||c·dW||², as last measured
        self.log_k = torch.full((), math.nan, dtype=torch.float64, device=device)
        self.floor = floor
        if floor is not None:
            self._check_floor(floor)

    def _own_state(self) -> dict[str, Any]:
        return {
            "trial": self.trial.clone(),
            "kl_rate": self.kl_rate.clone(),
            "log_k": self.log_k.clone(),
            "controller": self.controller.state_dict(),
            "guard": self.guard.state_dict(),
            "filters": {g: f.state_dict() for g, f in self.filters.items()},
        }

    def _load_own_state(self, state: dict[str, Any]) -> None:
        for name in ("trial", "kl_rate", "log_k"):
            getattr(self, name).copy_(state[name])
        self.controller.load_state_dict(state["controller"])
        self.guard.load_state_dict(state["guard"])
        for g, f in self.filters.items():
            f.load_state_dict(state["filters"][g])

    # -- one step ------------------------------------------------------------------------------------------------------

    def _prepare(self, t: int) -> None:
        if self.active and self.schedule != "constant":
            multiplier = schedule_multiplier(self.schedule, t, self.total_steps, self._lr_ratio())
            self.controller.rescale(self.target_kl * max(multiplier, 1e-12))

    def _begin(self, stats: StepStats) -> None:
        if self.active:
            stats.target_kl = self.controller.target.clone()
            stats.delta = self.controller.delta.clone()
            stats.radius = trust_radius(stats.delta)

    def kind(self, t: int) -> tuple[str, ...] | None:
        kind = super().kind(t)
        if kind is None or not self.active:
            return kind
        unsensed = self.budget in BOUNDED and any(f.beta is None for f in self.filters.values())
        unlike = self._judges(t) or self._due(t) or unsensed or self.schedule == "lr_squared"
        if (
            unlike
            or (self.budget == "shadow" and t < self.refine_steps)
            or (self._audits(t) and self.guard.kind != "none")
        ):
            return None
        return kind if self._measures_kl(t) else (*kind, "carried")

    def _measures(self, t: int) -> bool:
        return self.active

    def _batch(self, *arguments: Any) -> Batch:
        batch = super()._batch(*arguments)
        if self.floor is None:
            self._check_floor(batch.floor)
        if batch.audit and "loss_drop" in self.controller.needs and batch.probe_targets is None:
            raise ValueError(
                "controller='agreement' compares losses: give step(tokens, logits, targets=...)."
            )
        return batch

    def _limit_update(self, stats: StepStats, batch: Batch | None, t: int) -> None:
        if not self.active:
            return
        assert batch is not None
        assert stats.delta is not None
        assert stats.radius is not None
        judging = self._judges(t)
        due = self._due(t)
        if due or self.budget in BOUNDED:
            self._sense(stats, batch, due)
        probed = stats.sensitivities is not None
        if self.budget == "fisher" or judging or (self.budget == "calibrated" and probed):
            self._predict(stats, batch, judging)

        if self.budget == "shadow":
            self._clip_by_measurement(stats, batch, t)
            return
        if self.budget == "surrogate":
            assert stats.surrogate is not None
            stats.guard = self.guard.factor
            c = clip_coefficient(stats.guard * stats.radius, stats.surrogate)
        elif self.budget == "fisher":
            assert stats.predicted_kl is not None
            c = clip_coefficient(stats.delta.sqrt(), stats.predicted_kl.sqrt())
        else:
            assert stats.surrogate is not None
            if stats.predicted_kl is not None and probed:
                self.log_k.copy_(fitted_log_k(self.log_k, stats.predicted_kl, stats.surrogate))
            k = self.log_k.nan_to_num(math.log(0.25)).exp()  # before the first probe: the bound, KL <= S²/4
            stats.calibration = k
            c = clip_coefficient(stats.delta.sqrt(), k.sqrt() * stats.surrogate)
        self._apply(stats, c)

    def _judges(self, t: int) -> bool:
        return self._audits(t) and "loss_drop" in self.controller.needs

    def _due(self, t: int) -> list[str]:
        """The groups whose sensitivity is measured at step `t`."""
        if self.budget in BOUNDED:
            return due_groups(t, list(self.groups), self.cadence)
        return list(self.groups) if self.sensitivity_every > 0 and t % self.sensitivity_every == 0 else []

    def _measures_kl(self, t: int) -> bool:
        """Whether `shadow` measures at step `t`: one step in `measure_every`, in an order that audits do not favour."""
        k = self.measure_every
        shifted = t // math.lcm(k, self.audit_every or 1)
        return self.budget != "shadow" or t < self.refine_steps or (t + shifted) % k == 0

    def _clip_by_measurement(self, stats: StepStats, batch: Batch, t: int) -> None:
        assert self._kept is not None
        assert stats.delta is not None
        assert self.floor is not None
        if not self._measures_kl(t):
            predicted = self.kl_rate * self._moved().square()
            self._apply(stats, clip_coefficient(stats.delta.sqrt(), predicted.sqrt()))
            self._start_from(stats.clip_coefficient)
            return
        self._trial = tried = self._trial or Copy(self.weights, self._segments)
        resting = set(range(len(self._segments))) - {i for _, i in self._moving}
        for i in resting:
            tried.parts[i].copy_(self._kept.parts[i])

        def measure(trial: Tensor) -> Tensor:
            self._interpolate(trial, tried.parts)
            with tried.standing_in(self.weights):
                if self.retract is not None:
                    self.retract()
                return mean_kl(batch.z_probe, batch.logits(batch.probe), batch.probe_mask)

        found = shadow_search(
            measure,
            stats.delta,
            self.trial.clone(),
            measurements=self.measurements if t < self.refine_steps else 1,
            floor=self.floor,
        )
        stats.trial, stats.trial_kl, stats.measurements = found.trial, found.kl, found.measurements
        self._start_from(found.next_trial)
        if self.measure_every > 1:
            rate = found.kl.clamp(min=self.floor) / (found.trial * self._moved()).square()
            self.kl_rate.copy_(torch.where(self._sound & rate.isfinite(), rate, self.kl_rate))
        self._apply(stats, torch.where(found.skipped, torch.nan, found.c))

    def _start_from(self, trial: Tensor) -> None:
        """Where the next measurement begins, if `trial` is a positive scale of a sound step."""
        self.trial.copy_(torch.where(self._sound & (trial > 0), trial, self.trial))

    def _moved(self) -> Tensor:
        """||dW|| of what c scales, 0-dim float64, while the weights are at W + dW."""
        assert self._kept is not None
        parts = [torch.dist(w, self._kept.parts[i]) for w, i in self._moving]
        total: Tensor = torch.linalg.vector_norm(torch.stack(parts).double())
        return total

    def _forget_copies(self) -> None:
        super()._forget_copies()
        self._trial = None

    def _functional_weights(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """One list a weight as the probes take it: by name, float32 at least."""
        wide = (w.float() if w.dtype in LOW_PRECISION else w for w in tensors)
        return {f"model.{n}": w for n, w in zip(self.names, wide, strict=True)}

    def _predict(self, stats: StepStats, batch: Batch, judging: bool) -> None:
        """q of the whole (budgeted) proposal from one derivative; for a controller that judges, also slope and loss at W."""
        assert self._old is not None
        weights = self._functional_weights(self._old)
        proposal = self._functional_weights(torch._foreach_sub(self.weights, self._old))
        z, dz = linearised(
            batch.functional,
            weights,
            {k: proposal[k] for k in (f"model.{self.names[i]}" for i in self.scaled)},
        )
        stats.predicted_kl = half_fisher(z, dz, batch.probe_mask).double()
        if judging:
            loss = batch.probe_loss(z)
            targets = batch.probe_targets
            assert targets is not None
            rise = (z.softmax(-1) * dz).sum(-1) - dz.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            rise = torch.where(targets >= 0, rise, 0)  # negative: positions that the loss ignores
            self._judged = loss.double(), token_mean(rise, batch.probe_mask).double()

    def _sense(self, stats: StepStats, batch: Batch, due: list[str]) -> None:
        """Update the betas that are due and record the contributions; the weights are at W_new and stay there."""
        old = self._old
        assert old is not None
        deltas = torch._foreach_sub(self.weights, old)
        squares = torch.stack(torch._foreach_norm(deltas)).double().square()
        norms = torch.stack([squares[members].sum() for members in self._members]).sqrt()
        due = due + [g for g in self.groups if self.filters[g].beta is None and g not in due]
        weights = self._functional_weights(old)
        measured, probed = torch.full_like(norms, torch.nan), False
        for i, (group, members) in enumerate(self.groups.items()):
            if group not in due or not norms[i] > 0:
                continue
            direction = {f"model.{self.names[j]}": deltas[j] / norms[i].to(deltas[j]) for j in members}
            direction = {n: u.to(weights[n].dtype) for n, u in direction.items()}
            if self.probe == "jvp":
                observed = probe_jvp(batch.functional, weights, direction, batch.probe_mask)
            else:
                known = self.filters[group].beta
                guess = 1.0 if known is None or not known > 0 else float(known)
                observed = probe_fd(batch.functional, weights, direction, batch.probe_mask, guess)
            measured[i], probed = self.filters[group].update(observed), True
        betas = [self.filters[g].beta for g in self.groups]
        beta = torch.stack(
            [torch.full_like(norms[0], torch.nan) if b is None else b.to(norms) for b in betas]
        )
        if self.units == "per_lr":
            beta = beta / self.param_groups[0]["lr"]
        stats.contributions = torch.where(norms > 0, beta * norms, 0)  # a group at rest needs no beta
        stats.sensitivities = measured if probed else None
        stats.surrogate = aggregate_contributions(stats.contributions, self.aggregate)

    def _audited(self, stats: StepStats, batch: Batch, t: int) -> None:
        if not self.active:
            return
        assert stats.applied_kl is not None
        if stats.surrogate is not None:
            stats.tightness = self._budgeted_movement(stats, batch) / (
                stats.clip_coefficient * stats.surrogate
            )
        if self.guard.kind != "none" and stats.tightness is not None and stats.guard is not None:
            inflation = self.guard.audit(stats.tightness * stats.guard, t)
            for group in self.filters.values():
                group.inflate(inflation)
        signals: dict[str, Tensor] = {}
        if "loss_drop" in self.controller.needs:
            signals = self._judge(stats, batch)
        elif "slope" in self.controller.needs:
            assert stats.slope is not None
            signals = {"slope": stats.slope}
        self.controller.update(stats.applied_kl, stats.clip_coefficient < CLIPPED_BELOW, **signals)
        ratio: Tensor | None = getattr(self.controller, "ratio", None)
        stats.agreement = None if ratio is None else ratio.clone()

    def _budgeted_movement(self, stats: StepStats, batch: Batch) -> Tensor:
        """T of what the budget covers: under `matrices` the rest, which moves freely, is put back for one forward."""
        assert stats.movement is not None
        assert self._old is not None
        rest = [i for i in range(len(self.weights)) if i not in self.scaled]
        if not rest:
            return stats.movement
        free, now = [self.weights[i] for i in rest], [self.weights[i].clone() for i in rest]
        torch._foreach_copy_(free, [self._old[i] for i in rest])
        moved = rms_norm(centre(batch.logits(batch.held)) - centre(batch.z_held), batch.held_mask)
        torch._foreach_copy_(free, now)
        return moved

    def _judge(self, stats: StepStats, batch: Batch) -> dict[str, Tensor]:
        """What the loss did on the probe rows, against what slope and q of the proposal promised."""
        assert self._old is not None
        assert stats.predicted_kl is not None
        before, slope = self._judged
        weights = list(self._old)  # what is not budgeted stays where it was
        for i in self.scaled:
            weights[i] = self.weights[i]
        after = batch.probe_loss(batch.functional(self._functional_weights(weights))).double()
        return {
            "loss_drop": before - after,
            "slope": slope,
            "q": stats.predicted_kl,
            "c": stats.clip_coefficient,
        }

    def _check_floor(self, floor: float) -> None:
        least = self.target_kl * LEAST_MULTIPLIER.get(self.schedule, 1.0)
        if self.active and self.budget == "shadow" and least < 10 * floor * (1 - 1e-9):
            falling = (
                f", falling to {least:g} on schedule={self.schedule!r}," if least < self.target_kl else ""
            )
            raise ValueError(
                f"target_kl={self.target_kl:g}{falling} is below ten times {floor:g}, the smallest KL this precision can see."
            )
        self.floor = floor
