"""`EllipsotopeClip`: a torch optimizer that applies c·dW, so that predictions move by at most a KL budget.

Here: delta and the radius of a step, the budget that finds c, and what an audit then moves. How c is found is
in `budgets`, how delta moves in `controller`, the step around it in `stabilized`. Formulas: docs/method.md.
"""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .budgets import BUDGETS, Budget, Need
from .budgets.measured import Measured
from .budgets.prediction import budgeted_movement, judge, predict
from .budgets.radius import Radius
from .budgets.schedules import schedule_multiplier
from .budgets.surrogate import clip_coefficient, trust_radius
from .controller import Fixed, make_controller
from .flat import gathered_norm
from .given import checks
from .given.bases import Optimizers, tell_of_copies
from .logits import overconfidence
from .options import BUDGETS as NAMES
from .options import CLIPPED_BELOW, ELSEWHERE, RULED, check_names, check_option
from .probe import Batch
from .proposal import Proposal
from .scalars import Number, least, over, root, where
from .sensitivity import NO_DERIVATIVE, Sensitivities
from .settings import ClipSettings
from .stabilized import StabilizedOptimizer
from .step import StepInputs, StepStats, TorchArithmetic

LOG = logging.getLogger("ebc_lab.ebc")


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

    capturable = True
    settings_type: ClassVar[type[ClipSettings]] = ClipSettings
    budgets: ClassVar[tuple[str, ...]] = NAMES

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizers,
        *,
        settings: ClipSettings | None = None,
        audit_every: int | None = None,
        **options: Any,
    ):
        chosen = {f.name: options.pop(f.name) for f in fields(self.settings_type) if f.name in options}
        own = inspect.signature(StabilizedOptimizer).parameters
        check_names("EBC", options, [*(f.name for f in fields(self.settings_type)), *own], ELSEWHERE)
        if settings is None and "target_kl" not in chosen:
            raise TypeError("EBC needs target_kl=…, the nats per token that a step may move predictions by.")
        if settings is not None and chosen:
            raise TypeError(f"{', '.join(chosen)}: give these in `settings`, or no `settings`.")
        self.settings = s = settings or self.settings_type(**chosen)
        check_option("budget", s.budget, self.budgets)
        schedule_multiplier(s.schedule, 0, s.total_steps, 1.0)  # a schedule that lacks something fails here
        options["audit_every"] = s.audit_every if audit_every is None else audit_every
        super().__init__(model, optimizers, **options)
        self.radius = self._make_radius()
        self.keeps_old = s.active or self.radius is not None
        if self.keeps_old:
            tell_of_copies(self.bases)
        self.sensitivities = self._make_sensitivities()
        self._weights_changed()
        self.controller = self._make_controller().to(self.weights[0].device)
        self.budget = self._make_budget(self.weights[0].device)
        self.chosen_by: tuple[int, int] | None = None  # rows and tokens of the first batch
        if s.floor is not None:
            self._set_floor(s.floor)

    def __repr__(self) -> str:
        s = self.settings
        shown = f"target_kl={s.target_kl:g}, budget={s.budget!r}"
        if self.chosen_by is not None:
            shown += ", c chosen by {} rows, {} tokens".format(*self.chosen_by)
        return f"{type(self).__name__}({', '.join(repr(base) for base in self.bases)}, {shown})"

    def _make_sensitivities(self) -> Sensitivities:
        return Sensitivities(self.settings)

    def _make_radius(self) -> Radius | None:
        s = self.settings
        if s.radius is None:
            return None
        made = Radius(
            s.radius, unit=s.radius_unit, schedule=s.schedule, total_steps=s.total_steps, ramp=s.ramp
        )
        made.to(self.weights[0].device)
        return made

    def _make_controller(self) -> Fixed:
        s = self.settings
        return make_controller(s.controller, s.target_kl if s.active else 1.0, **(s.gains or {}))

    def _make_budget(self, device: torch.device) -> Budget:
        return BUDGETS[self.settings.budget](self.settings, self.audit_every, device)

    @property
    def groups(self) -> dict[str, list[int]]:
        """The groups of weights that are budgeted together: indices of the weights."""
        return self.sensitivities.groups

    def _set_floor(self, floor: float) -> None:
        self.settings.check_floor(floor)
        self.budget.floor = floor

    def _check_arithmetic(self) -> None:
        super()._check_arithmetic()
        self.settings.check_arithmetic()

    def _check_workers(self) -> None:
        super()._check_workers()
        s = self.settings
        measures = self.budget.need is Need.MEASUREMENT
        if self.workers.sharded and s.active and (not measures or s.sensitivity_every):
            asked = "sensitivity_every" if measures else f"budget={s.budget!r}"
            raise ValueError(
                f"{asked} takes derivatives of a model whose weights FSDP shares out: use {NO_DERIVATIVE}, "
                "without sensitivity_every."
            )
        if not self.workers.alone and (self.controller.watches or "loss_drop" in self.controller.needs):
            raise ValueError(
                f"controller={s.controller!r} looks at the targets of one process: use another one, or "
                "process_group=None."
            )

    def _weights_changed(self) -> None:
        """Group the weights, of which c scales those that are in a group."""
        shapes = {name: p.shape for name, p in zip(self.names, self.weights, strict=True)}
        self.sensitivities.regroup(shapes, self.weights[0].device)
        self.scaled = sorted(i for members in self.groups.values() for i in members)

    def _own_state(self) -> dict[str, Any]:
        filters = self.sensitivities.state_dict()
        state = {**self.budget.state_dict(), "controller": self.controller.state_dict(), "filters": filters}
        start = {} if self.radius is None else self.radius.state_dict()
        return {**state, "radius": start} if start else state

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self.budget.load_state_dict(state)
        self.controller.load_state_dict(state["controller"])
        self.sensitivities.load_state_dict(state["filters"], self.weights[0].device)
        if self.radius is not None:
            self.radius.load_state_dict(state.get("radius", {}))

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        for part in (self.budget, self.controller, self.sensitivities, self.radius):
            if part is not None:
                part.to(device)

    # -- which steps do what ---------------------------------------------------------------------------------

    def never_captured(self) -> list[str]:
        """Name the same, and `measure` where every step looks at the prediction's variance."""
        s = self.settings
        looks = s.active and s.measure != "every" and s.until == 1
        return [*super().never_captured(), *(["measure"] if looks else [])]

    def kind(self, t: int) -> tuple[str, ...] | None:
        kind = super().kind(t)
        s = self.settings
        if kind is None or (self.radius is not None and not self.radius.settled):
            return None
        if not s.active:
            return kind
        if not s.limits(t):
            return (*kind, "free")
        unsensed = self.budget.bounded and not self.sensitivities.complete
        refines = self.budget.need is Need.MEASUREMENT and s.refines(t)
        looks = s.measure != "every"  # at the prediction's variance
        if unsensed or refines or looks or self.sensitivities.due(t, self.budget.bounded) or self._judges(t):
            return None
        return kind if self.budget.measures_kl(t) else (*kind, "carried")

    def _measures(self, t: int) -> bool:
        return self.settings.limits(t)

    def _reads_gradients(self) -> bool:
        return self.budget.reads_gradients

    def _judges(self, t: int) -> bool:
        """Whether the controller compares losses at step `t`."""
        return "loss_drop" in self.controller.needs and self.audits(t)

    # -- one step, in order ----------------------------------------------------------------------------------

    def _prepare(self, t: int) -> None:
        """Move delta* and the radius along their schedule."""
        s = self.settings
        if s.active and s.schedule != "constant":
            multiplier = schedule_multiplier(s.schedule, t, s.total_steps, self._lr_ratio())
            self.controller.rescale(s.target_kl * max(multiplier, 1e-12))
        if self.radius is not None:
            self.radius.move(t, self._lr_ratio())

    def _begin(self, stats: StepStats) -> None:
        if self.settings.active:
            stats.target_kl = self.number(self.controller.target.clone())
            delta = self.controller.delta if self.settings.steers == "kl" else self.controller.target
            stats.delta = self.number(delta) * self.radius_factor**2
            stats.radius = trust_radius(stats.delta)

    def _gradient_norm(self, gradients: list[Tensor]) -> Tensor:
        if isinstance(self.arithmetic, TorchArithmetic):
            return gathered_norm(gradients)
        return super()._gradient_norm(gradients)

    def _batch(self, inputs: StepInputs, held: bool) -> Batch:
        batch = super()._batch(inputs, held)
        if math.isnan(self.budget.floor):
            self._set_floor(batch.floor)
        if self._judges(inputs.t) and batch.probe.targets is None:
            raise ValueError(
                "controller='agreement' compares losses: give step(tokens, logits, targets=...)."
            )
        if self.controller.watches:
            if inputs.logits is None or inputs.targets is None:
                raise ValueError(
                    f"controller={self.settings.controller!r} compares predictions with targets at every "
                    "step: give step(tokens, logits, targets=...)."
                )
            # before any step has seen the batch
            z = getattr(inputs.logits, "logits", inputs.logits)
            self._boldness = overconfidence(z, inputs.targets, inputs.mask)
        return batch

    def _first_batch(self, batch: Batch) -> None:
        tokens = int(batch.probe_tokens(self.workers))
        self.chosen_by = (len(batch.probe.z), tokens)
        LOG.info("c is chosen on %d rows (%d tokens) of each batch", *self.chosen_by)
        if self.settings.active and tokens < checks.FEW_TOKENS:
            message = checks.few_tokens(tokens, len(batch.probe.z), batch.size)
            warnings.warn(message, checks.EBCWarning, stacklevel=2)

    def _most_differing(self) -> float:
        return min(super()._most_differing(), 0.1 * self.settings.target_kl)

    def _collapsed(self) -> float:
        return self.last_c if self.budget.need is Need.MEASUREMENT else 1.0

    def _limit_update(self, stats: StepStats, proposal: Proposal) -> None:
        if not self.settings.in_force(proposal.t):
            return
        if self.radius is not None:  # the longest step, and the most that c may be by it
            self.radius.see(proposal)
            stats.update_norm = proposal.length
            stats.radius_limit = self.number(self.radius.now) * self.radius_factor
            if self.settings.steers == "radius":
                stats.radius_limit = stats.radius_limit * root(self.number(self.controller.factor))
            stats.ceiling = clip_coefficient(stats.radius_limit, stats.update_norm)
        if self.settings.active:
            self._apply(stats, proposal, self._ruled(stats, self._c_of_budget(stats, proposal)))
        elif stats.ceiling is not None:
            self._apply(stats, proposal, self._ruled(stats, self.number(self._one)))

    def _ruled(self, stats: StepStats, c: Number) -> Number:
        """Return the smaller of c and what the radius allows, and record which of them limits the step."""
        if stats.ceiling is None:
            return c
        by_radius = where(stats.ceiling < 1, RULED.index("radius"), RULED.index("nothing"))
        stats.ruled = where(c < stats.ceiling, RULED.index("kl"), by_radius)
        return least(c, stats.ceiling)  # NaN if one of them is

    def _c_of_budget(self, stats: StepStats, proposal: Proposal) -> Number:
        """c by the KL alone, or by both where the budget looks at `stats.ceiling` itself."""
        if self.controller.watches:  # how bold this step's predictions were
            self.controller.observe(where(proposal.sound, self._boldness, math.nan))
        due = self.sensitivities.due(proposal.t, self.budget.bounded)
        if due or self.budget.bounded:
            self.sensitivities.measure(stats, proposal, due)
        judging = self._judges(proposal.t)
        predicts = self.budget.predicts(stats)
        if judging or predicts:
            other = f"a controller other than {self.settings.controller!r}"
            predict(stats, proposal, judging, NO_DERIVATIVE if predicts else other)
        # where no token counts no KL can be measured: c of the step before
        looks = not self.deferred and self.workers.alone
        if looks and isinstance(self.budget, Measured) and not int(proposal.batch.probe.count()):
            return self.budget.known("trial", proposal)
        return self.budget.find_c(stats, proposal)

    def _audited(self, stats: StepStats, proposal: Proposal) -> None:
        """Let the controller move delta by the KL that an audit has measured, and the budget learn."""
        if not self.settings.limits(proposal.t):
            return
        assert stats.applied_kl is not None
        if stats.surrogate is not None:
            bound = stats.clip_coefficient * stats.surrogate
            stats.tightness = over(budgeted_movement(stats, proposal), bound)
        signals: dict[str, Number] = {}
        if "loss_drop" in self.controller.needs:
            signals = judge(stats, proposal)
        elif "slope" in self.controller.needs:
            assert stats.slope is not None
            signals = {"slope": stats.slope}
        clipped = stats.clip_coefficient < CLIPPED_BELOW
        if stats.ruled is not None:  # where the other bound limits the step, moving this one changes nothing
            clipped = clipped & (stats.ruled == RULED.index(self.settings.steers))
        self.controller.update(stats.applied_kl, clipped, **signals)
        ratio: Tensor | None = getattr(self.controller, "ratio", None)
        stats.agreement = None if ratio is None else self.number(ratio.clone())
        self.budget.audited(stats, proposal)
