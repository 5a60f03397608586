"""`EllipsotopeClip`: a torch optimizer that applies c·dW, so that predictions move by at most a KL budget.

`StabilizedOptimizer` has the order of a step and the rules for failing ones; this file says how c is found
and how delta evolves. Formulas: docs/method.md.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .budget import (
    ExponentEstimate,
    Flag,
    Number,
    Scale,
    ShadowResult,
    Track,
    at_least,
    at_most,
    clip_coefficient,
    divided,
    elementwise,
    exp,
    exponent_at,
    finite,
    fitted_log_k,
    log,
    opposite,
    power_scale,
    proposal_scale,
    root,
    scale_within,
    shadow_search,
    trust_radius,
    where,
)
from .controller import Fixed, make_controller, schedule_multiplier
from .flat import joint_norm
from .given import checks
from .given.bases import Optimizers
from .grouping import group_parameters
from .logits import centre, half_fisher, overconfidence, rms_norm, token_mean
from .options import BOUNDED, BUDGETS, CLIPPED_BELOW, MEASURED, TOKEN_NOISE, check_option
from .parallel.shards import local
from .probe import LOW_PRECISION, Batch, Rows
from .proposal import Proposal
from .sensitivity import SensitivityFilter, aggregate, due_groups, linearised, probe_fd, probe_jvp
from .settings import ClipSettings
from .stabilized import StabilizedOptimizer
from .step import Forecast, StepInputs, StepStats

LOG = logging.getLogger("ebc_lab.ebc")
CARRIED = ("trial", "kl_rate", "log_ratio", "variance", "log_k")  # numbers that go from step to step


class EllipsotopeClip(StabilizedOptimizer):
    """Scale each update by one c <= 1 so that predictions move by about `target_kl` nats per token.

    Args:
        model: the module whose predictions are budgeted.
        optimizers: one torch optimizer, or several that share out the parameters (Muon on matrices, Adam on
            the rest).
        settings: what `ClipSettings` lists; or its fields as keyword arguments, of which `target_kl` is
            required.
        audit_every: steps between measurements of the applied KL; 0 never. Default: 20; 0 if `target_kl` is
            infinite.
        options: those of `StabilizedOptimizer`, and the fields of `ClipSettings`.
    Raises:
        ValueError: an unknown name, a target below ten floors, or parameters outside `model`.
    """

    settings_type: ClassVar[type[ClipSettings]] = ClipSettings
    budgets: ClassVar[tuple[str, ...]] = BUDGETS

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizers,
        *,
        settings: ClipSettings | None = None,
        audit_every: int | None = None,
        **options: Any,
    ):
        given = {f.name: options.pop(f.name) for f in fields(self.settings_type) if f.name in options}
        if settings is not None and given:
            raise TypeError(f"{', '.join(given)}: give these in `settings`, or no `settings`.")
        self.settings = s = settings or self.settings_type(**given)
        check_option("budget", s.budget, self.budgets)
        schedule_multiplier(s.schedule, 0, s.total_steps, 1.0)  # a schedule that lacks something fails here
        every = s.audit_every if audit_every is None else audit_every
        super().__init__(model, optimizers, audit_every=every, **options)
        self.keeps_old = s.active
        self._root = elementwise(self.arithmetic.sqrt)

        device = self.weights[0].device
        self.groups: dict[str, list[int]] = {}
        self.filters: dict[str, SensitivityFilter] = {}
        self._members: list[Tensor] = []
        self._weights_changed()
        self.controller = self._make_controller().to(device)
        number = functools.partial(torch.tensor, dtype=torch.float64, device=device)
        self.trial: Tensor = number(0.1)  # what `shadow` tries first, and `tracked` while x is unknown
        self.kl_rate: Tensor = number(0.0)  # KL over ||c·dW||², as last measured
        self.log_ratio: Tensor = number(math.nan)  # x of `tracked`
        self.variance: Tensor = number(math.nan)  # and its variance
        self.log_k: Tensor = number(math.nan)  # of `calibrated`
        self.exponent = ExponentEstimate(device) if s.exponent == "auto" else None
        self._boldness: Tensor = number(math.nan)  # of this step's predictions, for a controller that watches
        self.chosen_by: tuple[int, int] | None = None  # rows and tokens of the first batch
        self.floor = s.floor
        if s.floor is not None:
            s.check_floor(s.floor)

    def __repr__(self) -> str:
        s = self.settings
        given = f"target_kl={s.target_kl:g}, budget={s.budget!r}"
        if self.chosen_by is not None:
            given += ", c chosen by {} rows, {} tokens".format(*self.chosen_by)
        return f"{type(self).__name__}({', '.join(repr(base) for base in self.bases)}, {given})"

    def _check_arithmetic(self) -> None:
        super()._check_arithmetic()
        self.settings.check_arithmetic()

    def _check_workers(self) -> None:
        super()._check_workers()
        s = self.settings
        if self.workers.sharded and s.active and (s.budget not in MEASURED or s.sensitivity_every):
            asked = "sensitivity_every" if s.budget in MEASURED else f"budget={s.budget!r}"
            raise ValueError(
                f"{asked} takes derivatives of a model whose weights FSDP shares out: use budget='shadow' or "
                "'tracked', without sensitivity_every."
            )
        if not self.workers.alone and (self.controller.watches or "loss_drop" in self.controller.needs):
            raise ValueError(
                f"controller={s.controller!r} looks at the targets of one process: use another one, or "
                "process_group=None."
            )

    def _weights_changed(self) -> None:
        """Group the weights; groups that were there before keep their sensitivities."""
        device = self.weights[0].device
        index = {name: i for i, name in enumerate(self.names)}
        shapes = {name: p.shape for name, p in zip(self.names, self.weights, strict=True)}
        named = group_parameters(self.names, self.settings.grouping, shapes)
        self.groups = {group: [index[name] for name in names] for group, names in named.items()}
        self.scaled = sorted(i for members in self.groups.values() for i in members)
        self._members = [torch.tensor(members, device=device) for members in self.groups.values()]
        self.filters = {group: self.filters.get(group) or self._make_filter() for group in self.groups}

    def _make_filter(self) -> SensitivityFilter:
        return SensitivityFilter()

    def _make_controller(self) -> Fixed:
        s = self.settings
        return make_controller(s.controller, s.target_kl if s.active else 1.0, **(s.gains or {}))

    def _own_state(self) -> dict[str, Any]:
        state = {
            **{name: getattr(self, name).clone() for name in CARRIED},
            "controller": self.controller.state_dict(),
            "filters": {g: f.state_dict() for g, f in self.filters.items()},
        }
        return state if self.exponent is None else state | {"exponent": self.exponent.state_dict()}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        for name in CARRIED:
            getattr(self, name).copy_(state[name])
        self.controller.load_state_dict(state["controller"])
        for g, f in self.filters.items():
            f.load_state_dict(state["filters"][g])
            f.beta = None if f.beta is None else f.beta.to(self.trial.device)
        if self.exponent is not None:
            self.exponent.load_state_dict(state["exponent"])

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        for name in CARRIED:
            setattr(self, name, getattr(self, name).to(device))
        self.controller.to(device)
        self._members = [members.to(device) for members in self._members]
        for own in self.filters.values():
            own.beta = None if own.beta is None else own.beta.to(device)
        if self.exponent is not None:
            self.exponent.seen = self.exponent.seen.to(device)

    # -- which steps do what ---------------------------------------------------------------------------------

    def kind(self, t: int) -> tuple[str, ...] | None:
        kind = super().kind(t)
        s = self.settings
        if kind is None or not s.active:
            return kind
        if not s.limits(t):
            return (*kind, "free")
        unsensed = s.budget in BOUNDED and any(f.beta is None for f in self.filters.values())
        if unsensed or self._due(t) or self._judges(t):
            return None
        if s.budget in MEASURED and s.refines(t):
            return None
        return kind if self._measures_kl(t) else (*kind, "carried")

    def _measures(self, t: int) -> bool:
        return self.settings.limits(t)

    def _measures_kl(self, t: int) -> bool:
        """Whether a KL is measured at step `t`: one in `measure_every`, and audits see both kinds alike."""
        s = self.settings
        shifted = t // math.lcm(s.measure_every, self.audit_every or 1)
        return s.budget not in MEASURED or t < s.settling or (t + shifted) % s.measure_every == 0

    def _judges(self, t: int) -> bool:
        """Whether the controller compares losses at step `t`."""
        return self._audits(t) and "loss_drop" in self.controller.needs

    def _due(self, t: int) -> list[str]:
        """The groups whose sensitivity is measured at step `t`."""
        s = self.settings
        if s.budget in BOUNDED:
            return due_groups(t, list(self.groups), s.cadence)
        return list(self.groups) if s.sensitivity_every > 0 and t % s.sensitivity_every == 0 else []

    # -- one step: delta and the batch -----------------------------------------------------------------------

    def _prepare(self, t: int) -> None:
        s = self.settings
        if s.active and s.schedule != "constant":
            multiplier = schedule_multiplier(s.schedule, t, s.total_steps, self._lr_ratio())
            self.controller.rescale(s.target_kl * max(multiplier, 1e-12))

    def _begin(self, stats: StepStats) -> None:
        if self.settings.active:
            stats.target_kl = self.controller.target.clone()
            stats.delta = self.controller.delta * self.radius_factor**2
            stats.radius = trust_radius(stats.delta, self.arithmetic.sqrt)

    def _batch(self, inputs: StepInputs, held: bool) -> Batch:
        batch = super()._batch(inputs, held)
        if self.floor is None:
            self.settings.check_floor(batch.floor)
            self.floor = batch.floor
        if self._judges(inputs.t) and batch.probe.targets is None:
            raise ValueError(
                "controller='agreement' compares losses: give step(tokens, logits, targets=...)."
            )
        if self.controller.watches:
            self._boldness = self._overconfidence(inputs)
        return batch

    def _most_differing(self) -> float:
        return min(super()._most_differing(), 0.1 * self.settings.target_kl)

    def _collapsed(self) -> float:
        return self._last_c if self.settings.budget in MEASURED else 1.0

    def _check_given(self, batch: Batch, inputs: StepInputs) -> bool:
        renewed = super()._check_given(batch, inputs)
        if not self.given.first:
            return renewed
        tokens = int(self._probe_tokens(batch))
        self.chosen_by = (len(batch.probe.z), tokens)
        LOG.info("c is chosen by %d rows, %d tokens, of each batch", *self.chosen_by)
        if self.settings.active and tokens < checks.FEW_TOKENS:
            rows = len(batch.probe.z)
            more = "take larger batches" if rows == batch.size else f"raise probe_sequences (now {rows})"
            warnings.warn(
                f"c is chosen by {tokens} tokens of each batch, and the others' KL will often be far from "
                f"the budget: {more}, or use budget='tracked'.",
                checks.EBCWarning,
                stacklevel=2,
            )
        return renewed

    def _overconfidence(self, inputs: StepInputs) -> Tensor:
        """Of the predictions on the batch, before any step has seen it."""
        if inputs.logits is None or inputs.targets is None:
            raise ValueError(
                f"controller={self.settings.controller!r} compares predictions with targets at every step: "
                "give step(tokens, logits, targets=...)."
            )
        z = getattr(inputs.logits, "logits", inputs.logits)
        return overconfidence(z, inputs.targets, inputs.mask)

    # -- one step: c -----------------------------------------------------------------------------------------

    def _limit_update(self, stats: StepStats, proposal: Proposal) -> None:
        budget = self.settings.budget
        if not self.settings.limits(proposal.t):
            return
        if self.controller.watches:
            self.controller.observe(torch.where(proposal.sound, self._boldness, torch.nan))
        # sensitivities and S, if they are needed or due for recording
        due = self._due(proposal.t)
        if due or budget in BOUNDED:
            self._sense(stats, proposal, due)
        # the predicted KL q: every step under `fisher`, with fresh sensitivities under `calibrated`
        calibrating = budget == "calibrated" and stats.sensitivities is not None
        judging = self._judges(proposal.t)
        if budget == "fisher" or calibrating or judging:
            self._predict(stats, proposal, judging)

        if budget in MEASURED and self._blind(proposal.batch):
            c = self.trial.clone()
        elif budget == "tracked":
            c = self._tracked_c(stats, proposal)
        elif budget == "shadow" and self._measures_kl(proposal.t):
            c = self._measured_c(stats, proposal)
        elif budget == "shadow":
            c = self._carried_c(stats, proposal)
        else:
            c = self._predicted_c(stats, calibrating)
        self._apply(stats, proposal, _tensor(c))

    def _number(self, x: Tensor) -> Number:
        """As formulas take it: a float on a CPU, where reading one waits for nothing."""
        reads = not self.deferred and x.device.type == "cpu"
        return float(x) if reads else x.double()

    def _predicted_c(self, stats: StepStats, calibrating: bool) -> Tensor:
        """c of `fisher`, `surrogate` and `calibrated`, NaN if S or q is not finite."""
        assert stats.delta is not None
        assert stats.radius is not None
        if self.settings.budget == "fisher":
            assert stats.predicted_kl is not None
            return clip_coefficient(stats.delta.sqrt(), stats.predicted_kl.sqrt())
        assert stats.surrogate is not None
        if self.settings.budget == "surrogate":
            stats.guard = self._guard_factor(stats.radius)
            return clip_coefficient(stats.guard * stats.radius, stats.surrogate)
        if calibrating:
            assert stats.predicted_kl is not None
            self.log_k.copy_(fitted_log_k(self.log_k, stats.predicted_kl, stats.surrogate))
        k = self.log_k.nan_to_num(math.log(0.25)).exp()  # before the first probe: the bound, KL <= S²/4
        stats.calibration = k
        return clip_coefficient(stats.delta.sqrt(), k.sqrt() * stats.surrogate)

    def _guard_factor(self, radius: Tensor) -> Tensor:
        """The factor on the trust radius: 1. A subclass may lower it."""
        return torch.ones_like(radius)

    def _search(
        self, stats: StepStats, proposal: Proposal, trial: Number, scale: Scale | None = None
    ) -> ShadowResult:
        """Measure the KL of trial steps, `trial` first, and record it; for the rest see `shadow_search`."""
        batch = proposal.batch
        assert batch is not None
        assert stats.delta is not None
        assert self.floor is not None

        def measure(trial: Number) -> Number:
            return self._number(proposal.kl(trial, batch.probe, self.retract))

        s = self.settings
        allowed = s.measurements if s.refines(proposal.t) else 1
        delta = self._number(stats.delta)
        found = shadow_search(
            measure, delta, trial, measurements=allowed, floor=self.floor, scale=scale, root=self._root
        )
        stats.trial = _tensor(found.trial)
        stats.trial_kl = _tensor(found.kl)
        stats.measurements = found.measurements
        self._carry(self.trial, found.next_trial, proposal, found.next_trial > 0)
        return found

    def _measured_c(self, stats: StepStats, proposal: Proposal) -> Any:
        """c of `shadow`, by measuring the KL of trial steps; NaN if none was finite."""
        scale = None
        if self.exponent is not None:
            assert stats.delta is not None
            stats.exponent = self.exponent.value
            scale = power_scale(self._number(stats.delta), self._number(stats.exponent))
        found = self._search(stats, proposal, self._number(self.trial.clone()), scale)
        if self.settings.measure_every > 1:
            assert self.floor is not None
            moved = found.trial * self._number(proposal.norm())
            rate = divided(at_least(found.kl, self.floor), moved * moved)
            self._carry(self.kl_rate, rate, proposal, finite(rate))
        held = None if proposal.batch is None else proposal.batch.held  # None on a batch too short to audit
        if self.exponent is not None and held is not None and self._audits(proposal.t):
            self._observe_exponent(self.exponent, proposal, held, found)
        return where(found.skipped, math.nan, found.c)

    def _observe_exponent(
        self, estimate: ExponentEstimate, proposal: Proposal, held: Rows, found: ShadowResult
    ) -> None:
        """Measure p around the c that was found, on the tokens of the audit."""
        assert self.floor is not None
        p = exponent_at(found.c, lambda c: proposal.kl(c, held, self.retract), self.floor)
        estimate.observe(p, proposal.sound & opposite(found.skipped))

    def _carried_c(self, stats: StepStats, proposal: Proposal) -> Any:
        """c of `shadow` between measurements, from the last measured KL for each unit of ||dW||²."""
        assert stats.delta is not None
        norm = self._number(proposal.norm())
        predicted = self._number(self.kl_rate) * (norm * norm)
        c = scale_within(root(self._number(stats.delta)), root(predicted))
        self._carry(self.trial, c, proposal, c > 0)
        return c

    def _tracked_c(self, stats: StepStats, proposal: Proposal) -> Any:
        """c of `tracked`, from the KL predicted and, if it is due, measured; NaN if none was finite."""
        assert stats.delta is not None
        delta = self._number(stats.delta)
        scale = self._proposal_scale(stats, proposal)
        usable = (scale > 0) & (scale < math.inf)
        prior = Track(self._number(self.log_ratio), self._number(self.variance)).later()
        known = usable & prior.known
        expected = at_most(root(divided(delta, scale * exp(prior.log_ratio))), 1.0)  # NaN without an x
        last = self._number(self.trial)
        if self._measures_kl(proposal.t):
            trial = where(known & (expected > 0), expected, last)
            after, c = self._tracked_by_measuring(stats, proposal, prior, where(usable, scale, 0.0), trial)
        else:
            after = prior
            c = where(known | (usable & (expected < last)), expected, last)
            self._carry(self.trial, c, proposal, c > 0)
        self._carry(self.log_ratio, after.log_ratio, proposal, usable)
        self._carry(self.variance, after.variance, proposal, usable)
        stats.tracked_scale = _tensor(scale)
        stats.tracked_log_ratio = self.log_ratio.clone()
        stats.tracked_variance = self.variance.clone()
        return c

    def _proposal_scale(self, stats: StepStats, proposal: Proposal) -> Any:
        """P of what c scales."""
        gradients = [None if p.grad is None else local(p.grad) for p in self.weights]
        fall, norm = proposal.fall_and_norm(gradients)
        grad_norm = stats.grad_norm
        if len(self.scaled) < len(self.weights):
            grads = [g for i in self.scaled if (g := gradients[i]) is not None]
            grad_norm = self.workers.joined_norm(joint_norm(grads))
        return proposal_scale(self._number(fall), self._number(grad_norm), self._number(norm))

    def _tracked_by_measuring(
        self, stats: StepStats, proposal: Proposal, prior: Track, scale: Number, trial: Number
    ) -> tuple[Track, Number]:
        """Measure at `trial` -> what is known then, and c; repeated measurements all start from `prior`."""
        assert proposal.batch is not None
        assert stats.delta is not None
        assert self.floor is not None
        delta = self._number(stats.delta)
        noise = TOKEN_NOISE / self._probe_tokens(proposal.batch)
        seen: list[Any] = []  # x, by each measurement
        believed: list[Track] = []

        def believe(kl: Any, trial: Any) -> Any:
            whole = divided(kl, trial * trial)
            seen.append(log(divided(whole, scale)) + noise / 2)  # a noisy mean's log lies low by that
            believed.append(prior.measured(seen[-1], noise))
            tracked = scale * exp(believed[-1].log_ratio)
            return root(divided(delta, where(tracked > 0, tracked, whole)))

        found = self._search(stats, proposal, trial, believe)
        low = found.kl < self.floor
        unknown = low | found.skipped
        after = believed[-1]
        most = seen[-1] - noise / 2  # what was seen of a KL below the floor is the floor
        kept = where(found.skipped, prior.log_ratio, where(low, most, after.log_ratio))
        stats.innovation = _tensor(where(unknown, math.nan, prior.innovation(seen[-1])))
        after = Track(kept, where(unknown, math.nan, after.variance))
        return after, where(found.skipped, math.nan, found.c)

    def _blind(self, batch: Batch | None) -> bool:
        """Whether no token of the probe rows counts, as in an empty batch: then the last c is taken again."""
        if batch is None or self.deferred or not self.workers.alone:
            return False
        return int(batch.probe.count()) == 0

    def _probe_tokens(self, batch: Batch) -> Number:
        """How many choose c, on all processes, 1 at least."""
        tokens: Number = batch.probe.count()
        if not self.workers.alone:
            tokens = self.workers.total(tokens)[0]
        found: Number = at_least(self._number(tokens) if isinstance(tokens, Tensor) else tokens, 1)
        return found

    def _carry(self, to: Tensor, value: Number, proposal: Proposal, usable: Flag) -> None:
        """Keep a number for the next steps, if it is usable and the step is sound."""
        if isinstance(value, Tensor):
            to.copy_(torch.where(proposal.sound & usable, value, to))
        elif usable:  # an unsound step has come to its end before
            to.fill_(value)

    # -- one step: derivatives -------------------------------------------------------------------------------

    def _functional_weights(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """One tensor for each weight, as the probes take them: by name, float32 at least."""
        wide = (w.float() if w.dtype in LOW_PRECISION else w for w in tensors)
        return {f"model.{n}": w for n, w in zip(self.names, wide, strict=True)}

    def _predict(self, stats: StepStats, proposal: Proposal, judging: bool) -> None:
        """q of the (budgeted) proposal from one derivative; if `judging`, the forecast for the loss too."""
        batch = proposal.batch
        assert batch is not None
        updates = self._functional_weights(proposal.updates())
        direction = {name: updates[name] for name in (f"model.{self.names[i]}" for i in self.scaled)}
        z, dz = linearised(batch.functional, self._functional_weights(proposal.old), direction)
        q = half_fisher(z, dz, batch.probe.mask).double()
        stats.predicted_kl = self.workers.mean(q, batch.probe.count())
        if judging:
            loss = batch.probe_loss(z)
            targets = batch.probe.targets
            assert targets is not None
            rise = (z.softmax(-1) * dz).sum(-1) - dz.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            rise = torch.where(targets >= 0, rise, 0)  # negative: positions that the loss ignores
            stats.forecast = Forecast(loss.double(), token_mean(rise, batch.probe.mask).double())

    def _sense(self, stats: StepStats, proposal: Proposal, due: list[str]) -> None:
        """Measure the betas that are due or unknown, and record the contributions and S."""
        updates = proposal.updates()
        squares = torch.stack(torch._foreach_norm(updates)).double().square()
        norms = torch.stack([squares[members].sum() for members in self._members]).sqrt()
        weights = self._functional_weights(proposal.old)
        measured = torch.full_like(norms, torch.nan)
        probed = False
        for i, (group, members) in enumerate(self.groups.items()):
            wanted = group in due or self.filters[group].beta is None
            if not wanted or not norms[i] > 0:
                continue
            direction = {f"model.{self.names[j]}": updates[j] / norms[i].to(updates[j]) for j in members}
            direction = {n: u.to(weights[n].dtype) for n, u in direction.items()}
            measured[i] = self.filters[group].update(self._observe(group, proposal, weights, direction))
            probed = True
        contributions = self._betas(norms) * norms
        stats.contributions = torch.where(norms > 0, contributions, 0)  # a group at rest needs no beta
        stats.sensitivities = measured if probed else None
        stats.surrogate = aggregate(stats.contributions, self.settings.aggregate)

    def _observe(
        self, group: str, proposal: Proposal, weights: dict[str, Tensor], direction: dict[str, Tensor]
    ) -> Tensor:
        """One observation of a group's beta along its own unit direction, 0-dim."""
        batch = proposal.batch
        assert batch is not None
        rows = batch.probe
        if self.settings.probe == "jvp":
            seen = probe_jvp(batch.functional, weights, direction, rows.mask)
        else:
            known = self.filters[group].beta
            guess = 1.0 if known is None or not known > 0 else float(known)
            seen = probe_fd(batch.functional, weights, direction, rows.mask, guess)
        return self.workers.rms(seen, rows.count()).to(seen.dtype)

    def _betas(self, norms: Tensor) -> Tensor:
        """The beta of every group, (L,), in the dtype of `norms`; NaN where it is unknown."""
        unknown = torch.full_like(norms[0], torch.nan)
        betas = [f.beta for f in self.filters.values()]
        return torch.stack([unknown if b is None else b.to(norms) for b in betas])

    # -- after an audit --------------------------------------------------------------------------------------

    def _audited(self, stats: StepStats, proposal: Proposal) -> None:
        if not self.settings.limits(proposal.t):
            return
        assert stats.applied_kl is not None
        if stats.surrogate is not None:
            moved = self._budgeted_movement(stats, proposal)
            stats.tightness = moved / (stats.clip_coefficient * stats.surrogate)
        signals: dict[str, Tensor] = {}
        if "loss_drop" in self.controller.needs:
            signals = self._judge(stats, proposal)
        elif "slope" in self.controller.needs:
            assert stats.slope is not None
            signals = {"slope": stats.slope}
        self.controller.update(stats.applied_kl, stats.clip_coefficient < CLIPPED_BELOW, **signals)
        ratio: Tensor | None = getattr(self.controller, "ratio", None)
        stats.agreement = None if ratio is None else ratio.clone()

    def _budgeted_movement(self, stats: StepStats, proposal: Proposal) -> Tensor:
        """T of what the budget covers: under `matrices`, the rest is put back to W for one forward."""
        assert stats.movement is not None
        rest = [i for i in range(len(self.weights)) if i not in self.scaled]
        if not rest:
            return stats.movement
        batch = proposal.batch
        assert batch is not None
        assert batch.held is not None
        held = batch.held
        free: list[Tensor] = [proposal.layout.weights[i] for i in rest]
        now = [w.clone() for w in free]
        torch._foreach_copy_(free, [proposal.old[i] for i in rest])
        moved = rms_norm(centre(batch.logits(held.inputs)) - centre(held.z), held.mask)
        torch._foreach_copy_(free, now)
        return self.workers.rms(moved, held.count())

    def _judge(self, stats: StepStats, proposal: Proposal) -> dict[str, Tensor]:
        """By how much the loss on the probe rows fell, and what slope and q of the proposal predicted."""
        assert proposal.batch is not None
        assert stats.predicted_kl is not None
        assert stats.forecast is not None
        weights = list(proposal.old)  # what is not budgeted stays where it was
        for i in self.scaled:
            weights[i] = self.weights[i]
        after = proposal.batch.probe_loss(proposal.batch.functional(self._functional_weights(weights)))
        return {
            "loss_drop": stats.forecast.loss - after.double(),
            "slope": stats.forecast.slope,
            "q": stats.predicted_kl,
            "c": stats.clip_coefficient,
        }


def _tensor(x: Number) -> Tensor:
    """A number as it is recorded, 0-dim."""
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
