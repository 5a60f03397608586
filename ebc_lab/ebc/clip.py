"""`EllipsotopeClip`: a torch optimizer that applies c·dW, so that predictions move by at most a KL budget.

Here: which budget finds c, which controller moves delta, and what a step of theirs takes, in order. How c is
found is in `budgets`, how delta evolves in `controller`. Formulas: docs/method.md.
"""

from __future__ import annotations

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
from .budgets.surrogate import trust_radius
from .controller import Fixed, make_controller, schedule_multiplier
from .given import checks
from .given.bases import Optimizers
from .logits import overconfidence
from .options import BUDGETS as NAMES
from .options import CLIPPED_BELOW, check_option
from .probe import Batch
from .proposal import Proposal
from .sensitivity import Sensitivities
from .settings import ClipSettings
from .stabilized import StabilizedOptimizer
from .step import StepInputs, StepStats

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
        if settings is not None and chosen:
            raise TypeError(f"{', '.join(chosen)}: give these in `settings`, or no `settings`.")
        self.settings = s = settings or self.settings_type(**chosen)
        check_option("budget", s.budget, self.budgets)
        schedule_multiplier(s.schedule, 0, s.total_steps, 1.0)  # a schedule that lacks something fails here
        every = s.audit_every if audit_every is None else audit_every
        super().__init__(model, optimizers, audit_every=every, **options)
        self.keeps_old = s.active
        device = self.weights[0].device
        self.sensitivities = self._make_sensitivities()
        self._weights_changed()
        self.controller = self._make_controller().to(device)
        self.budget = self._make_budget(device)
        self._boldness = torch.tensor(
            math.nan, dtype=torch.float64, device=device
        )  # of this step's predictions
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

    def _make_budget(self, device: torch.device) -> Budget:
        return BUDGETS[self.settings.budget](self.settings, self.audit_every, device)

    def _make_controller(self) -> Fixed:
        s = self.settings
        return make_controller(s.controller, s.target_kl if s.active else 1.0, **(s.gains or {}))

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
                f"{asked} takes derivatives of a model whose weights FSDP shares out: use budget='shadow' or "
                "'tracked', without sensitivity_every."
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
        return {**self.budget.state_dict(), "controller": self.controller.state_dict(), "filters": filters}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self.budget.load_state_dict(state)
        self.controller.load_state_dict(state["controller"])
        self.sensitivities.load_state_dict(state["filters"], self.weights[0].device)

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        for part in (self.budget, self.controller, self.sensitivities):
            part.to(device)

    # -- which steps do what ---------------------------------------------------------------------------------

    def kind(self, t: int) -> tuple[str, ...] | None:
        kind = super().kind(t)
        s = self.settings
        if kind is None or not s.active:
            return kind
        if not s.limits(t):
            return (*kind, "free")
        unsensed = self.budget.bounded and not self.sensitivities.complete
        refines = self.budget.need is Need.MEASUREMENT and s.refines(t)
        if unsensed or refines or self._due(t) or self._judges(t):
            return None
        return kind if self.budget.measures_kl(t) else (*kind, "carried")

    def _measures(self, t: int) -> bool:
        return self.settings.limits(t)

    def _judges(self, t: int) -> bool:
        """Whether the controller compares losses at step `t`."""
        return self._audits(t) and "loss_drop" in self.controller.needs

    def _due(self, t: int) -> list[str]:
        """Return the groups whose sensitivity is measured at step `t`."""
        return self.sensitivities.due(t, self.budget.bounded)

    # -- one step, in order ----------------------------------------------------------------------------------

    def _prepare(self, t: int) -> None:
        """Move delta* along its schedule."""
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

    def _limit_update(self, stats: StepStats, proposal: Proposal) -> None:
        if not self.settings.limits(proposal.t):
            return
        if self.controller.watches:
            self.controller.observe(torch.where(proposal.sound, self._boldness, torch.nan))
        # sensitivities and S, if they are needed or due for recording
        due = self._due(proposal.t)
        if due or self.budget.bounded:
            self.sensitivities.measure(stats, proposal, due)
        # the predicted KL q, if the budget or the controller takes it
        judging = self._judges(proposal.t)
        if judging or self.budget.predicts(stats):
            predict(stats, proposal, judging)
        # c, and the update that it leaves
        c = self._repeated_c(proposal.batch)
        self._apply(stats, proposal, self.budget.find_c(stats, proposal) if c is None else c)

    def _repeated_c(self, batch: Batch | None) -> Tensor | None:
        """Return the last c for a batch without a token that counts, on which no KL can be measured."""
        if batch is None or not isinstance(self.budget, Measured) or self.deferred or not self.workers.alone:
            return None
        return None if int(batch.probe.count()) else self.budget.trial.clone()

    def _audited(self, stats: StepStats, proposal: Proposal) -> None:
        """Let the controller move delta by the KL that an audit has measured."""
        if not self.settings.limits(proposal.t):
            return
        assert stats.applied_kl is not None
        if stats.surrogate is not None:
            stats.tightness = budgeted_movement(stats, proposal) / (stats.clip_coefficient * stats.surrogate)
        signals: dict[str, Tensor] = {}
        if "loss_drop" in self.controller.needs:
            signals = judge(stats, proposal)
        elif "slope" in self.controller.needs:
            assert stats.slope is not None
            signals = {"slope": stats.slope}
        self.controller.update(stats.applied_kl, stats.clip_coefficient < CLIPPED_BELOW, **signals)
        ratio: Tensor | None = getattr(self.controller, "ratio", None)
        stats.agreement = None if ratio is None else ratio.clone()

    # -- the logits given ------------------------------------------------------------------------------------

    def _most_differing(self) -> float:
        return min(super()._most_differing(), 0.1 * self.settings.target_kl)

    def _collapsed(self) -> float:
        return self._last_c if self.budget.need is Need.MEASUREMENT else 1.0

    def _check_given(self, batch: Batch, inputs: StepInputs) -> bool:
        renewed = super()._check_given(batch, inputs)
        if not self.given.first:
            return renewed
        tokens = int(batch.probe_tokens(self.workers))
        self.chosen_by = (len(batch.probe.z), tokens)
        LOG.info("c is chosen by %d rows, %d tokens, of each batch", *self.chosen_by)
        if self.settings.active and tokens < checks.FEW_TOKENS:
            warnings.warn(
                checks.few_tokens(tokens, len(batch.probe.z), batch.size), checks.EBCWarning, stacklevel=2
            )
        return renewed
