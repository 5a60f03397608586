"""`StabilizedOptimizer`: the step that EBC and its rivals share, a torch optimizer around base optimizers.

In order: check the gradients → `_limit_gradients` → base optimizers step → projection → `_limit_update` →
retraction → at every audit, measure the applied KL on tokens that had no part in choosing c. A stabilizer is
a subclass that overrides one of the two limits; without any it is the plain optimizer, bit for bit. Failing
steps follow the rules of docs/method.md, the same for every stabilizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .flat import Layout, joint_norm
from .options import CURVE_SCALES
from .probe import Batch, Prober
from .proposal import Proposal, StateCopy
from .step import Arithmetic, NonFiniteUpdateError, StepInputs, StepStats, TorchArithmetic


class StabilizedOptimizer(torch.optim.Optimizer):
    """Plain optimizers with audits and rules for failing steps; subclasses limit the gradient or the update.

    Args:
        model: the module whose predictions are audited.
        optimizers: one torch optimizer, or several that share out the parameters (Muon on matrices, Adam on
            the rest). One whose state holds copies of the weights names their keys in an attribute
            `weight_copies`: they are scaled too.
        probe_sequences: leading rows of the batch that an audit leaves out.
        audit_every: steps between measurements of the applied KL; 0 never.
        audit_tokens: how many tokens an audit needs at least.
        curve_every: steps between measurements of the KL at `options.CURVE_SCALES` of the whole proposal, on
            an audit's tokens; 0 never. They change nothing else.
        forward: (model, inputs) -> logits (B, ..., V), or an object with `.logits`. Default: call the model.
        compiled: `torch.compile(model)` if training calls that; measurements of the KL then call it too,
            through `forward` in the model's place. Sensitivities, which swap weights, always use `model`.
        project: called after the base step, sets the weights to their projection on a convex set.
        retract: called after the update was limited, puts the weights back on their manifold.
        fresh_logits: compute z(W) again without dropout. Default: if the model holds dropout or batch-norm
            modules.
        arithmetic: computes norms, KLs and trial weights instead of torch's own operations, see `Arithmetic`.
    Raises:
        ValueError: parameters outside `model`, or of two optimizers; a number out of its range; an
            `arithmetic` where not all that is computed would go through it.

    Whatever drives the training may set `radius_factor` before a step: those that keep updates within a
    radius (EBC, a trust region) multiply it by that. It is no part of a checkpoint.
    """

    keeps_old = False  # whether the update is limited, so that W is needed again after the base step
    inside_backward = False  # whether the bases move the weights there
    capturable = True  # whether the step can do without reading values on the host, see `kind`
    takes_arithmetic = True  # whether all that it computes goes through `arithmetic`

    def __init__(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        probe_sequences: int = 2,
        audit_every: int = 20,
        audit_tokens: int = 512,
        curve_every: int = 0,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        compiled: nn.Module | None = None,
        project: Callable[[], None] | None = None,
        retract: Callable[[], None] | None = None,
        fresh_logits: bool | None = None,
        arithmetic: Arithmetic | None = None,
    ):
        _check_counts(probe_sequences, curve_every)
        self.bases = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        self._check_bases()
        if arithmetic is not None:
            self._check_arithmetic()
        named = _trained(model, self.bases)
        self.names = list(named)
        self.weights = list(named.values())
        super().__init__(self.weights, {})
        self.defaults = self.bases[0].defaults  # some schedulers look there for a momentum
        self._share_groups()

        self.model = model
        self.probe_sequences = probe_sequences
        self.audit_every = audit_every
        self.audit_tokens = audit_tokens
        self.curve_every = curve_every
        self.radius_factor = 1.0
        self.project = project
        self.retract = retract
        self.arithmetic = arithmetic or TorchArithmetic()
        self.prober = Prober(model, forward, fresh_logits, compiled)
        self.step_index = 0
        self.peak_lr = float(self.param_groups[0]["lr"])
        self.scaled = list(range(len(self.weights)))  # the weights that c scales
        # read nothing on the host: the bases must then heed `found_inf`, as torch's fused ones do
        self.deferred = False
        device = self.weights[0].device
        # what most steps say of themselves; nothing changes them
        self._one = torch.ones((), dtype=torch.float64, device=device)
        self._flags = tuple(torch.tensor(flag, device=device) for flag in (False, True))
        self._index = {id(p): i for i, p in enumerate(self.weights)}
        self._trained_at: list[Tensor] | None = None
        self._layout: Layout | None = None

    def _check_bases(self) -> None:
        if any(getattr(base, "hooked", False) != self.inside_backward for base in self.bases):
            wanted = "with registered hooks" if self.inside_backward else "without hooks in backward"
            raise ValueError(f"{type(self).__name__} needs a base optimizer {wanted}.")

    def _check_arithmetic(self) -> None:
        """Raises ValueError where something would be computed beside `arithmetic`."""
        copying = [base for base in self.bases if getattr(base, "weight_copies", ())]
        beside = [type(x).__name__ for x in (copying if self.takes_arithmetic else [self])]
        if beside:
            raise ValueError(f"{beside[0]} computes with torch's own operations: it takes no `arithmetic`.")

    # -- a torch optimizer to schedulers, scalers and checkpoints --------------------------------------------

    def _share_groups(self) -> None:
        self.param_groups = [group for base in self.bases for group in base.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once wrapped: the groups are the base optimizers' own."""
        if hasattr(self, "model"):
            raise ValueError("add parameter groups to the base optimizer before it is wrapped.")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, the bases' states too; loads with `weights_only=True`."""
        return {
            "bases": [base.state_dict() for base in self.bases],
            "step_index": self.step_index,
            "peak_lr": self.peak_lr,
            **self._own_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for base, state in zip(self.bases, state_dict["bases"], strict=True):
            base.load_state_dict(state)
        self._share_groups()
        self.step_index = state_dict["step_index"]
        self.peak_lr = state_dict["peak_lr"]
        self._load_own_state(state_dict)

    def _own_state(self) -> dict[str, Any]:
        """What a stabilizer itself carries from step to step."""
        return {}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        return

    @torch.no_grad()
    def eval(self) -> None:
        """Set the weights for evaluation, if a base evaluates other weights than it trains (Schedule-Free).

        Those are put on the projection's set or manifold too.
        """
        swapping = [base for base in self.bases if hasattr(base, "eval")]
        if not swapping or self._trained_at is not None:
            return
        self._trained_at = [p.detach().clone() for p in self.weights]
        for base in swapping:
            base.eval()
        for constrain in (self.project, self.retract):
            if constrain is not None:
                constrain()

    @torch.no_grad()
    def train(self) -> None:
        """Undo `eval`, bit for bit."""
        if self._trained_at is None:
            return
        for base in self.bases:
            getattr(base, "train", lambda: None)()
        torch._foreach_copy_(list[Tensor](self.weights), self._trained_at)
        self._trained_at = None

    @torch.no_grad()
    def renew_rows(self, parameter: nn.Parameter, rows: Tensor) -> None:
        """Forget what the bases know of some rows of a parameter, which now hold something new.

        Every state of the parameter's shape is zeroed there, and copies of the weights take their values.
        """
        for base in self.bases:
            copies = getattr(base, "weight_copies", ())
            for key, value in base.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[rows] = parameter[rows].to(value.dtype) if key in copies else 0

    def _lr_ratio(self) -> float:
        """The learning rate over its peak (the one that a scheduler keeps, or the first), at most 1."""
        group = self.param_groups[0]
        peak = float(group.get("max_lr", group.get("initial_lr", self.peak_lr)))
        return min(1.0, float(group["lr"]) / peak) if peak else 1.0

    # -- what a stabilizer overrides -------------------------------------------------------------------------

    def _prepare(self, t: int) -> None:
        """On the host, before anything else at step `t`: schedules."""

    def _begin(self, stats: StepStats) -> None:
        """On the device, before anything else: what is recorded of a skipped step too."""

    def _measures(self, t: int) -> bool:
        """Whether choosing the update at step `t` takes a forward on the batch."""
        return False

    def _limit_gradients(self, stats: StepStats, gradients: list[Tensor]) -> None:
        """Change the gradients in place and set `stats.gradient_scale`."""

    def _limit_update(self, stats: StepStats, proposal: Proposal) -> None:
        """The weights are at W + dW and `proposal.old` holds W (with `keeps_old`): leave the update to apply.

        `_apply(stats, proposal, c)` does so; `_give_up(stats, proposal)` restores W if no update is usable.
        """

    def _audited(self, stats: StepStats, proposal: Proposal) -> None:
        """After an audit: controllers."""

    # -- one step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        tokens: Any = None,
        logits: Any = None,
        mask: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        probe: tuple[Any, Tensor | None] | None = None,
    ) -> StepStats:
        """Apply one limited update from the gradients at hand.

        Args:
            tokens: the batch as `forward` takes it, rows first; may be None when nothing is to be measured.
            logits, mask, targets, probe: see `StepInputs`. Without logits, z(W) is computed again.
        Raises:
            NonFiniteUpdateError: the base proposed a non-finite update.
            ValueError: tokens are missing, or the batch has no row left for the audit.
        """
        return self.take_step(StepInputs(self.begin_step(), tokens, logits, mask, targets, probe))

    @torch.no_grad()
    def begin_step(self) -> int:
        """The host's part of `step`: count it, and update what depends on its number. -> t, 0-based.

        The step's learning rate must be set by then. A schedule of delta* that follows it reads it here.
        """
        t = self.step_index
        self.step_index += 1
        self._prepare(t)
        return t

    def kind(self, t: int) -> tuple[str, ...] | None:
        """What step `t` does beyond the usual; None if it reads values on the host or is like no other.

        Steps of one kind launch the same work, so that one graph serves them all.
        """
        if not self.capturable or self.project is not None or self.retract is not None:
            return None
        if self._curves(t) or self.radius_factor != 1:
            return None
        return ("audit",) if self._audits(t) else ()

    @torch.no_grad()
    def take_step(self, inputs: StepInputs) -> StepStats:
        """The device's part of `step`, after `begin_step` has returned `inputs.t`; errors as there.

        With `deferred` it reads nothing on the host, at steps that have a `kind`: a bad gradient or update
        shows in the StepStats alone, and the weights are as if it had been noticed.
        """
        gradients = [p.grad for p in self.weights if p.grad is not None]
        stats = self._start(gradients)
        if not self.deferred and stats.bad_gradient:
            stats.clip_coefficient = torch.zeros_like(stats.clip_coefficient)
            return stats
        audit = self._audits(inputs.t)
        curve = self._curves(inputs.t)
        held = audit or curve
        batch = self._batch(inputs, held) if held or self._measures(inputs.t) else None
        self._limit_gradients(stats, gradients)
        proposal = self._propose(stats, inputs.t, batch, keep=self.keeps_old or held)
        if self.project is not None:
            self.project()
        kl_curve = self._kl_curve(proposal) if curve else None
        if audit and stats.gradient_scale is None:
            stats.slope = self._slope(proposal)
        if self.deferred:
            stats.clip_coefficient = torch.where(proposal.sound, stats.clip_coefficient, 0.0)
        self._limit_update(stats, proposal)
        if self.retract is not None and not stats.skipped:
            self.retract()
        if curve and (self.deferred or not stats.skipped):
            stats.kl_curve = kl_curve
        if audit and (self.deferred or not stats.skipped):
            self._audit(stats, proposal)
            self._audited(stats, proposal)
        torch.clear_autocast_cache()
        return stats

    def _start(self, gradients: list[Tensor]) -> StepStats:
        """Check the gradients: the stats of a step that applies everything, or of one that is skipped."""
        norm = self.arithmetic.norm(gradients)
        bad = self._bad(gradients, norm)
        stats = StepStats(self._one, norm, skipped=bad, bad_gradient=bad, failed=self._flags[False])
        self._begin(stats)
        return stats

    def _propose(self, stats: StepStats, t: int, batch: Batch | None, keep: bool) -> Proposal:
        """Let the bases step; `keep` a copy of W. Raises NonFiniteUpdateError unless `deferred`."""
        if self._layout is None or not self._layout.holds():
            self._layout = Layout(self.weights, set(self.scaled))
        layout = self._layout
        kept = layout.kept if keep else None
        if kept is not None:
            kept.store()
        copies = self._state_copies() if keep else []
        for base in self.bases:
            if self.deferred:
                base.found_inf = stats.bad_gradient.float()  # type: ignore[attr-defined]
            base.step()
            if self.deferred:
                base.found_inf = None  # type: ignore[attr-defined]
        parts = layout.parts
        # torch's norm under any arithmetic: whether all elements are finite does not depend on its last bits
        stats.failed = failed = self._bad(parts, joint_norm(parts))
        sound = ~(stats.bad_gradient | failed) if self.deferred else self._flags[True]
        proposal = Proposal(t, batch, layout, kept, copies, sound, self.arithmetic)
        if not self.deferred and failed:
            if keep:
                proposal.restore()
            raise NonFiniteUpdateError(f"step {t}: the optimizer proposed a non-finite update.")
        return proposal

    def _bad(self, tensors: Sequence[Tensor], norm: Tensor) -> Tensor:
        """Whether an element of the tensors, whose joint norm is given, is not finite; 0-dim bool."""
        if self.deferred:
            return ~finite_flag(tensors, norm)
        return self._flags[not all_finite(tensors, norm)]

    def _audits(self, t: int) -> bool:
        return self.audit_every > 0 and t % self.audit_every == 0

    def _curves(self, t: int) -> bool:
        """Whether step `t` measures the KL at many scales of the proposal."""
        return self.curve_every > 0 and t > 0 and t % self.curve_every == 0

    def _batch(self, inputs: StepInputs, held: bool) -> Batch:
        """`held`: with the rows of an audit."""
        tokens = self.audit_tokens
        k = self.probe_sequences
        refusals = self.arithmetic.refusals
        weight = self.weights[0]
        return Batch(self.prober, inputs, weight, k=k, audit=held, audit_tokens=tokens, refusals=refusals)

    def _state_copies(self) -> list[StateCopy]:
        """Of W in the bases' states, as far as a step changes them."""
        return [
            StateCopy(i, base.state[p], key, base.state[p].get(key, p).detach().clone())
            for base in self.bases
            for key in getattr(base, "weight_copies", ())
            for group in base.param_groups
            for p in group["params"]
            if p.grad is not None and (i := self._index.get(id(p))) is not None
        ]

    def _slope(self, proposal: Proposal) -> Tensor:
        """<gradient, dW>, 0-dim float64."""
        pairs = zip(self.weights, proposal.old, strict=True)
        moved = [(p.grad, w, p) for p, w in pairs if p.grad is not None]
        if not moved:
            return torch.zeros_like(proposal.sound, dtype=torch.float64)
        gradients, old, new = zip(*moved, strict=True)
        return self.arithmetic.slope(gradients, old, new)

    def _apply(self, stats: StepStats, proposal: Proposal, c: Tensor) -> None:
        """Move the weights from W + dW to W + c·dW, and the states' copies of them likewise; c is 0-dim.

        If c is not finite: to W, and the step counts as skipped.
        """
        parts = proposal.layout.parts
        if not self.deferred:
            value = float(c)
            if not math.isfinite(value):
                self._give_up(stats, proposal)
                return
            stats.clip_coefficient = c
            if value < 1:
                proposal.scale_states(c, self.scaled)
                proposal.interpolate(c, parts)
            return
        usable = torch.isfinite(c) & proposal.sound
        stats.clip_coefficient = c = torch.where(usable, c, 0.0)
        stats.skipped = ~usable
        proposal.scale_states(c, self.scaled)
        proposal.interpolate(c, parts)
        for part, old in zip(parts, proposal.before.parts, strict=True):
            torch.where(usable, part, old, out=part)

    def _give_up(self, stats: StepStats, proposal: Proposal) -> None:
        """No usable update: restore W and count the step as skipped. The bases' finite state stays."""
        stats.skipped = torch.ones_like(stats.skipped)
        stats.clip_coefficient = torch.zeros_like(stats.clip_coefficient)
        proposal.scale_states(stats.clip_coefficient, range(len(self.weights)))
        proposal.restore()

    def _kl_curve(self, proposal: Proposal) -> Tensor:
        """The KL at CURVE_SCALES of the whole proposal, on the held rows; NaN where it is not finite."""
        assert proposal.batch is not None
        held = proposal.batch.held
        assert held is not None
        found = [proposal.kl(c, held, self.retract, whole=True) for c in CURVE_SCALES]
        curve = torch.stack(found).double().clamp(min=0)
        return torch.where(curve.isfinite() & proposal.sound, curve, torch.nan)

    def _audit(self, stats: StepStats, proposal: Proposal) -> None:
        """Measure how far the applied update moved the predictions on the held rows."""
        assert proposal.batch is not None
        held = proposal.batch.held
        assert held is not None
        z_new = proposal.batch.moved(held)
        stats.applied_kl = self.arithmetic.mean_kl(held.z, z_new, held.mask).clamp(min=0)
        stats.movement = self.arithmetic.movement(held.z, z_new, held.mask)
        if (
            self.deferred
        ):  # the host does not know yet whether the step was skipped, and a skipped one is not audited
            stats.applied_kl = torch.where(stats.skipped, torch.nan, stats.applied_kl)
            stats.movement = torch.where(stats.skipped, torch.nan, stats.movement)
        stats.audit_tokens = proposal.batch.held_tokens


def _check_counts(probe_sequences: int, curve_every: int) -> None:
    if probe_sequences < 1:
        raise ValueError(f"probe_sequences must be at least 1, not {probe_sequences}.")
    if curve_every < 0:
        raise ValueError(f"curve_every must be at least 0, not {curve_every}.")


def _trained(model: nn.Module, bases: Sequence[torch.optim.Optimizer]) -> dict[str, nn.Parameter]:
    """The parameters that the optimizers train, by name, in the model's order. Raises as the class says."""
    own = {id(p) for p in model.parameters()}
    held = [id(p) for base in bases for group in base.param_groups for p in group["params"]]
    if len(set(held)) < len(held):
        raise ValueError("a parameter belongs to two of the optimizers.")
    if not own.issuperset(held):
        raise ValueError("an optimizer holds a parameter that is not the model's.")
    known = set(held)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) in known}
    if not trained:
        raise ValueError("the optimizers hold no trainable parameter.")
    return trained


def all_finite(tensors: Sequence[Tensor], norm: Tensor) -> bool:
    """Whether every element is finite; each tensor is looked at only if their joint norm overflowed."""
    return math.isfinite(norm) or all(bool(torch.isfinite(t).all()) for t in tensors)


def finite_flag(tensors: Sequence[Tensor], norm: Tensor) -> Tensor:
    """`all_finite` as a 0-dim bool tensor, without reading a value on the host.

    Whether the norm overflowed is unknown then, so it is computed again in float64, whose range no float32
    exceeds.
    """
    if not tensors or tensors[0].dtype == torch.float64:
        return torch.isfinite(norm)
    return torch.isfinite(torch.stack(torch._foreach_norm(list(tensors), 2, torch.float64))).all()
