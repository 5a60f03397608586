"""`StabilizedOptimizer`: the step that EBC and its rivals share, a torch optimizer around base optimizers.

In order: check the gradients → `_limit_gradients` → base optimizers step → projection → `_limit_update` →
retraction → at every audit, measure the applied KL on tokens that had no part in choosing c. `open_step` is
what comes before the bases' step and `close_step` what comes after it, so that `attach` can put the same step
around optimizers that someone else calls. A stabilizer is
a subclass that overrides one of the two limits; without any it is the plain optimizer, bit for bit. Failing
steps follow the rules of docs/method.md, the same for every stabilizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .audits import AuditedOptimizer
from .flat import Copy, Layout, Shortened, all_finite, finite_flag, joint_norm
from .given import bases as given_bases
from .given import checks
from .parallel.shards import local, sharding_group, unwrapped
from .parallel.workers import Workers
from .probe import GivenLogits, Prober
from .proposal import Opened, Proposal, StateCopy, kept_in
from .step import Arithmetic, NonFiniteUpdateError, StepInputs, StepStats, TorchArithmetic

if TYPE_CHECKING:
    from .parallel.workers import Group


class StabilizedOptimizer(AuditedOptimizer):
    """Plain optimizers with audits and rules for failing steps; subclasses limit the gradient or the update.

    Args:
        model: the module whose predictions are audited.
        optimizers: one torch optimizer, or several that share out the parameters (Muon on matrices, Adam on
            the rest). One whose state holds copies of the weights names their keys in an attribute
            `weight_copies`: they are scaled too.
        probe_sequences: leading rows of the batch that an audit leaves out. None: as many as hold about
            `checks.ENOUGH_TOKENS` tokens that count, two at least; a quarter of the batch is left for audits.
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
            modules, or once the logits given are seen not to be the model's own.
        batch_dim: the axis of the batch in what the model takes, and in its logits and masks: 1 for (T, B).
        arithmetic: computes norms, KLs and trial weights instead of torch's own operations, see `Arithmetic`.
        process_group: the processes that train this model together (DDP, FSDP2): what is measured is the mean
            over their rows, so that all take the same c; `probe_sequences` and `audit_tokens` are those of
            each. "auto": torch.distributed's default group, where it is initialized at the first step; None:
            this process alone.
    Raises:
        ValueError: parameters outside `model`, or of two optimizers; a number out of its range; an optimizer
            that cannot be limited (LBFGS, sparse gradients); an `arithmetic` where not all that is computed
            would go through it.

    Whatever drives the training may set `radius_factor` before a step: those that keep updates within a
    radius (EBC, a trust region) multiply it by that. It is no part of a checkpoint. `last` is the StepStats
    of the last step.
    """

    radius_factor = 1.0  # see above
    keeps_old = False  # whether the update is limited, so that W is needed again after the base step
    inside_backward = False  # whether the bases move the weights there
    capturable = True  # whether steps may become CUDA graphs, see `kind`; a subclass says so for itself
    takes_arithmetic = True  # whether all that it computes goes through `arithmetic`
    takes_shards = True  # whether it can limit weights of which each process has a part

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        # a graph would repeat what Python did when it was captured: no subclass inherits that it may be
        cls.capturable = vars(cls).get("capturable", False)

    def __init__(
        self,
        model: nn.Module,
        optimizers: given_bases.Optimizers,
        *,
        probe_sequences: int | None = 2,
        audit_every: int = 20,
        audit_tokens: int = 512,
        curve_every: int = 0,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        compiled: nn.Module | None = None,
        project: Callable[[], None] | None = None,
        retract: Callable[[], None] | None = None,
        fresh_logits: bool | None = None,
        batch_dim: int = 0,
        arithmetic: Arithmetic | None = None,
        process_group: Group = "auto",
    ):
        checks.check_counts(audit_every=audit_every, curve_every=curve_every, batch_dim=batch_dim)
        checks.check_counts(probe_sequences=1 if probe_sequences is None else probe_sequences)
        self.bases = given_bases.as_list(optimizers)
        self._check_bases()
        if arithmetic is not None:
            self._check_arithmetic()
        model = unwrapped(model)
        super().__init__(model, self.bases)
        self.probe_sequences = probe_sequences
        self.audit_every = audit_every
        self.audit_tokens = audit_tokens
        self.curve_every = curve_every
        self.project = project
        self.retract = retract
        self.arithmetic = arithmetic or TorchArithmetic()
        self.prober = Prober(model, forward, fresh_logits, compiled, batch_dim, self.arithmetic.refusals)
        self.scaled = list(range(len(self.weights)))  # the weights that c scales
        device = self.weights[0].device
        self._one = torch.ones((), dtype=torch.float64, device=device)  # of most steps; nothing changes it
        self._flags = tuple(torch.tensor(flag, device=device) for flag in (False, True))
        self._layout: Layout | None = None
        self.given = GivenLogits(self.prober, fresh_logits)
        self.last_c = 1.0  # of the last step, 0 if none was usable; where the host has read it
        self.last: StepStats | None = None
        self.workers = Workers(process_group)
        self.gradients = given_bases.Gradients()
        self._moving = given_bases.moving(self.bases)  # ids of the weights at the last step

    def _check_bases(self) -> None:
        if any(getattr(base, "hooked", False) != self.inside_backward for base in self.bases):
            wanted = "with registered hooks" if self.inside_backward else "without hooks in backward"
            other = "register_hooks()" if self.inside_backward else "remove_hooks(), or use LaggedClip"
            raise ValueError(f"{type(self).__name__} needs a base optimizer {wanted}: {other}.")

    def _check_arithmetic(self) -> None:
        """Raises ValueError where something would be computed beside `arithmetic`."""
        copying = [base for base in self.bases if given_bases.weight_copies(base)]
        beside = [type(x).__name__ for x in (copying if self.takes_arithmetic else [self])]
        if beside:
            raise ValueError(f"{beside[0]} computes with torch's own operations: it takes no `arithmetic`.")

    # -- the weights and the processes, which may change from step to step -----------------------------------

    def sync_process_group(self) -> None:
        """See which weights are trained at this step, and at the first one by which other processes."""
        self._check_bases()  # hooks may have been registered since
        moving = given_bases.moving(self.bases)
        if moving != self._moving:
            self.names, self.weights = given_bases.trained(self.model, self.bases)
            self.scaled = list(range(len(self.weights)))
            self._moving = moving
            self._layout = None
            self.workers.met = False
            self._weights_changed()
        device = self.weights[0].device
        if device != self._one.device:
            self._move(device)
        if not self.workers.met:
            given_bases.trained(self.model, self.bases)  # fully_shard may have replaced the model's own
            self.workers.meet(sharding_group(self.model, self.weights), device)
            self._check_workers()
            self.prober.find_shards()

    def _weights_changed(self) -> None:
        """The bases train other weights than before."""

    def _move(self, device: torch.device) -> None:
        """The weights have moved to another device."""
        self._one = self._one.to(device)
        self._flags = tuple(flag.to(device) for flag in self._flags)

    def _check_workers(self) -> None:
        """Raises ValueError where several processes would not take the same step."""
        if not self.workers.alone and not isinstance(self.arithmetic, TorchArithmetic):
            raise ValueError("an `arithmetic` of its own sums over one process: give process_group=None.")
        if self.workers.sharded and not self.takes_shards:
            raise ValueError(f"{type(self).__name__} needs whole tensors, and FSDP shares them out: use DDP.")
        if self.workers.sharded and (self.project is not None or self.retract is not None):
            raise ValueError("a projection needs whole weights, and FSDP shares them out: use DDP.")

    def _parts(self) -> list[Tensor]:
        """The weights, or what this process holds of them."""
        return [local(p) for p in self.weights] if self.workers.sharded else list(self.weights)

    # -- what a stabilizer overrides -------------------------------------------------------------------------

    def _prepare(self, t: int) -> None:
        """On the host, before anything else at step `t`: schedules."""

    def _begin(self, stats: StepStats) -> None:
        """On the device, before anything else: what is recorded of a skipped step too."""

    def _measures(self, t: int) -> bool:
        """Whether choosing the update at step `t` takes a forward on the batch."""
        return False

    def _reads_gradients(self) -> bool:
        """Whether choosing the update reads the gradients after the bases' step."""
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
        closure: Callable[[], Any] | None = None,
    ) -> Any:
        """Apply one limited update from the gradients at hand.

        Args:
            tokens: the batch as `forward` takes it, rows first; may be None when nothing is to be measured.
            logits, mask, targets, probe: see `StepInputs`. Without logits, z(W) is computed again.
            closure: called first, with gradients on, to compute them. A function in the place of `tokens` is
                one, too.
        Returns:
            The StepStats; what `closure` returned if there is one, and the StepStats is `last`.
        Raises:
            NonFiniteUpdateError: the base proposed a non-finite update.
            ValueError: tokens are missing, or are not those of the logits.
        """
        if closure is None and callable(tokens):
            closure, tokens = tokens, None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stats = self.take_step(StepInputs(self.begin_step(), tokens, logits, mask, targets, probe))
        return stats if closure is None else loss

    @torch.no_grad()
    def begin_step(self) -> int:
        """The host's part of `step`: count it, and update what depends on its number. -> t, 0-based.

        The step's learning rate must be set by then. A schedule of delta* that follows it reads it here.
        """
        self.sync_process_group()
        t = self.step_index
        self.step_index += 1
        self._prepare(t)
        return t

    def never_captured(self) -> list[str]:
        """Name what keeps every step from being captured, `stabilizer` or `projection`; several processes do
        too, once they have met."""
        projects = self.project is not None or self.retract is not None
        return [*([] if self.capturable else ["stabilizer"]), *(["projection"] if projects else [])]

    def kind(self, t: int) -> tuple[str, ...] | None:
        """Return the CUDA-graph cache key of step `t`; None if the step cannot be captured.

        Steps of one kind launch the same work, so that one graph serves them all.
        """
        if self.never_captured() or not self.workers.alone:
            return None
        if self._curves(t) or self.radius_factor != 1:
            return None
        return ("audit",) if self.audits(t) else ()

    @torch.no_grad()
    def take_step(self, inputs: StepInputs) -> StepStats:
        """The device's part of `step`, after `begin_step` has returned `inputs.t`; errors as there.

        With `deferred` it reads nothing on the host, at steps that have a `kind`: a bad gradient or update
        shows in the StepStats alone, and the weights are as if it had been noticed.
        """
        opened = self.open_step(inputs)
        try:
            for base in () if opened.void else self.bases:
                if self.deferred:
                    base.found_inf = opened.stats.bad_gradient.float()  # type: ignore[attr-defined]
                base.step()
                if self.deferred:
                    base.found_inf = None  # type: ignore[attr-defined]
        except BaseException:
            if opened.kept is not None:
                opened.kept.restore()
            raise
        return self.close_step(opened)

    @torch.no_grad()
    def open_step(self, inputs: StepInputs, kept: Copy | None = None) -> Opened:
        """What comes before the bases' step, with the gradients at hand; `kept` is W if it is kept already.

        Where the result is `void`, the bases must not step.
        """
        inputs = self._rows_first(inputs)
        gradients = [local(p.grad) for p in self.weights if p.grad is not None]
        stats = self._start(gradients)
        if not self.deferred and stats.bad_gradient:
            stats.clip_coefficient = torch.zeros_like(stats.clip_coefficient)
            return Opened(inputs.t, stats, None, False, False, kept, [], void=True)
        audit, curve = self._held(inputs)
        audit_rows = audit or curve
        batch = self._batch(inputs, audit_rows) if audit_rows or self._measures(inputs.t) else None
        self._limit_gradients(stats, gradients)
        self.gradients.forget()
        if not self.deferred and (audit or self._reads_gradients()):
            for base in self.bases:
                self.gradients.see(base)
        keep = self.keeps_old or audit_rows
        if keep and kept is None:
            kept = self.keep()
        copies = self._state_copies() if keep else []
        return Opened(inputs.t, stats, batch, audit, curve, kept, copies)

    @torch.no_grad()
    def keep(self) -> Copy:
        """A copy of the weights as they are now, until the next step."""
        weights = self._laid_out().kept
        weights.store()
        return weights

    def has_moved(self, kept: Copy) -> bool:
        """Whether the weights are no longer what `kept` holds, in one process at least."""
        return self.any_process(not kept.equals_weights())

    @torch.no_grad()
    def close_step(self, opened: Opened) -> StepStats:
        """What comes after the bases' step: limit the update, audit it. On an error the weights are at W."""
        self.last = stats = opened.stats
        if opened.void:
            return stats
        proposal = self._proposed(opened)
        try:
            self._limit(opened, proposal)
        except BaseException:  # Ctrl-C, too, after which many save the weights
            if opened.kept is not None:
                proposal.restore()
            raise
        finally:
            self.gradients.forget()
        torch.clear_autocast_cache()
        return stats

    @torch.no_grad()
    def shorten(self, opened: Opened, c: float) -> Shortened:
        """Leave the weights at W + c·dW between the steps of two bases, which see W + dW."""
        assert opened.kept is not None
        if not self.workers.sharded:
            opened.kept.bring_home(self.weights)
        shortened = Shortened(self._laid_out(), opened.kept, c)
        torch.clear_autocast_cache()
        return shortened

    @torch.no_grad()
    def lengthen(self, shortened: Shortened) -> bool:
        """Undo `shorten`. Returns False where somebody has moved the weights meanwhile: they stay there."""
        return shortened.undo(self._parts())

    def _limit(self, opened: Opened, proposal: Proposal) -> None:
        stats = opened.stats
        if self.project is not None:
            self.project()
        kl_curve = self._kl_curve(proposal) if opened.curve else None
        if opened.audit and stats.gradient_scale is None:
            stats.slope = self._slope(proposal)
        if self.deferred:
            stats.clip_coefficient = torch.where(proposal.sound, stats.clip_coefficient, 0.0)
        self._limit_update(stats, proposal)
        if self.retract is not None and not stats.skipped:
            self.retract()
        if opened.curve and (self.deferred or not stats.skipped):
            stats.kl_curve = kl_curve
        if opened.audit and (self.deferred or not stats.skipped):
            self._audit(stats, proposal)
            self._audited(stats, proposal)

    def _start(self, gradients: list[Tensor]) -> StepStats:
        """Check the gradients: the stats of a step that applies everything, or of one that is skipped."""
        norm = self.arithmetic.norm(gradients)
        bad, norm = self.workers.any_and_norm(self._bad(gradients, norm), norm)
        stats = StepStats(self._one, norm, skipped=bad, bad_gradient=bad, failed=self._flags[False])
        self._begin(stats)
        return stats

    def _laid_out(self) -> Layout:
        parts = self._parts()
        if self._layout is None or not self._layout.holds(parts):
            self._layout = Layout(parts, set(self.scaled), written=self.workers.sharded)
        return self._layout

    def _proposed(self, opened: Opened) -> Proposal:
        """What the bases have made of the weights. Raises NonFiniteUpdateError unless `deferred`."""
        if opened.kept is not None and not self.workers.sharded:
            opened.kept.bring_home(self.weights)
        layout = self._laid_out()
        parts = layout.parts
        stats = opened.stats
        # torch's norm under any arithmetic: whether all elements are finite does not depend on its last bits
        failed = self._bad(parts, joint_norm(parts))
        if self.workers.sharded:  # else all processes have the same weights
            failed = self.workers.any(failed)
        stats.failed = failed
        sound = ~(stats.bad_gradient | failed) if self.deferred else self._flags[True]
        proposal = self._proposal(opened, sound)
        if not self.deferred and failed:
            if opened.kept is not None:
                proposal.restore()
            raise NonFiniteUpdateError(f"step {opened.t}: the optimizer proposed a non-finite update.")
        return proposal

    def _proposal(self, opened: Opened, sound: Tensor) -> Proposal:
        """Describe the update that the weights have just made."""
        return Proposal(
            *(opened.t, opened.batch, self._laid_out(), opened.kept, opened.copies, sound),
            *(self.arithmetic, self.workers, self.names, self.weights, self.scaled),
            *(self.gradients.of(self.weights), self.retract),
            audited=opened.audit,
        )

    def _bad(self, tensors: Sequence[Tensor], norm: Tensor) -> Tensor:
        """Whether an element of the tensors, whose joint norm is given, is not finite; 0-dim bool."""
        if self.deferred:
            return ~finite_flag(tensors, norm)
        return self._flags[not all_finite(tensors, norm)]

    def _state_copies(self) -> list[StateCopy]:
        """Return the copies of W in the bases' states, as far as a step changes them."""
        copies = []
        for base in self.bases:
            for key in given_bases.weight_copies(base):
                of_base = {id(p) for group in base.param_groups for p in group["params"]}
                for i, p in enumerate(self.weights):
                    if id(p) in of_base and p.grad is not None:
                        before = kept_in(base.state[p], key)
                        before = local(p if before is None else before).detach().clone()
                        copies.append(StateCopy(i, base.state[p], key, before))
        return copies

    def _apply(self, stats: StepStats, proposal: Proposal, c: Tensor) -> None:
        """Move the weights from W + dW to W + c·dW, and the states' copies of them likewise; c is 0-dim.

        If c is not finite: to W, and the step counts as skipped.
        """
        parts = proposal.layout.parts
        if not self.deferred:
            value = float(c)
            if c.device != stats.skipped.device:
                c = torch.full_like(stats.clip_coefficient, value)
            self.last_c = value if math.isfinite(value) else 0.0
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
