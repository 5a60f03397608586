"""`StabilizedOptimizer`: the step that EBC and its rivals share, a torch optimizer around base optimizers.

In order: check the gradients → `_limit_gradients` → base optimizers step → projection → `_limit_update` →
retraction → at every audit, measure the applied KL on tokens that had no part in choosing c. `open_step` is
what comes before the bases' step and `close_step` what comes after it, so that `attach` can put the same step
around optimizers that someone else calls. A stabilizer is a subclass that overrides one of the two limits;
without any it is the plain optimizer, bit for bit. Failing steps follow the rules of docs/method.md, the same
for every stabilizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .flat import Copy, Layout, Shortened, all_finite, finite_flag, joint_norm, real
from .given import bases as given_bases
from .given import checks
from .given.rows import Choice, Chooser
from .options import CURVE_SCALES
from .parallel.shards import gradients_of, local, sharding_group, unwrapped
from .parallel.workers import Workers
from .probe import Batch, GivenLogits, Prober
from .proposal import Opened, Proposal, StateCopy, kept_in
from .scalars import Flag, Number, is_finite, most, negated, number, where
from .step import Arithmetic, NonFiniteUpdateError, StepInputs, StepStats, TorchArithmetic
from .wrapping import WrappingOptimizer

if TYPE_CHECKING:
    from .parallel.workers import Group


class StabilizedOptimizer(WrappingOptimizer):
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
    deferred = False  # reads nothing on the host: the bases must then heed `found_inf`, as torch's fused do
    watches_given = False  # whether audits look at the logits given, not only the first step

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
        self._one = torch.ones((), dtype=torch.float64, device=device)  # c of most steps; nothing changes it
        self._flags = tuple(torch.tensor(flag, device=device) for flag in (False, True))
        self._layout: Layout | None = None
        self.given = GivenLogits(self.prober, fresh_logits)
        self.last_c = 1.0  # of the last step, 0 if none was usable; where the host has read it
        self._stats: StepStats | None = None  # of the last step
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

    # -- what a stabilizer overrides -------------------------------------------------------------------------

    def _prepare(self, t: int) -> None:
        """On the host, before anything else at step `t`: schedules."""

    def _begin(self, stats: StepStats) -> None:
        """Before anything else that is measured: what is recorded of a skipped step too."""

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

    def _first_batch(self, batch: Batch) -> None:
        """Once the logits given with it have been looked at."""

    def _most_differing(self) -> float:
        """How far given logits may lie from the model's own, nats per token."""
        return 1e-3

    def _collapsed(self) -> float:
        """The c of the step before, where measurements on logits that were given chose it; else 1."""
        return 1.0

    # -- what is known of a step, and which steps do what ----------------------------------------------------

    @property
    def last(self) -> StepStats | None:
        """What the last step did, in 0-dim tensors; None before the first."""
        return None if self._stats is None else self._stats.as_tensors()

    @property
    def on_host(self) -> bool:
        """Whether a step's numbers are floats, see `scalars`."""
        return not self.deferred and self._one.device.type == "cpu"

    def number(self, measured: Tensor) -> Number:
        """A 0-dim tensor as the numbers of a step are."""
        return number(measured, self.on_host)

    def any_process(self, flag: bool) -> bool:
        """Return whether it is true in one of the processes that train together."""
        return flag if self.workers.alone else bool(self.workers.any(self._flags[flag]))

    def audits(self, t: int) -> bool:
        """Whether step `t` is one at which the applied KL is measured, if its batch has rows for that."""
        return self.audit_every > 0 and t % self.audit_every == 0

    def _curves(self, t: int) -> bool:
        """Whether step `t` measures the KL at many scales of the proposal."""
        return self.curve_every > 0 and t > 0 and t % self.curve_every == 0

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

    # -- one step, in order ----------------------------------------------------------------------------------

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
        return stats.as_tensors() if closure is None else loss

    def begin_step(self) -> int:
        """The host's part of `step`: count it, and update what depends on its number. -> t, 0-based.

        The step's learning rate must be set by then. A schedule of delta* that follows it reads it here.
        """
        self.sync_process_group()
        t = self.step_index
        self.step_index += 1
        self._prepare(t)
        return t

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

    def open_step(self, inputs: StepInputs, kept: Copy | None = None) -> Opened:
        """What comes before the bases' step, with the gradients at hand; `kept` is W if it is kept already.

        Where the result is `void`, the bases must not step. Autograd must be off, as for all that follows.
        """
        gradients = gradients_of(self.weights)
        stats = self._started(gradients)
        if not self.deferred and stats.bad_gradient:
            stats.clip_coefficient = torch.zeros_like(self._one)
            return Opened(inputs.t, stats, None, False, False, kept, [], void=True)

        # the rows that choose c, and those that audit it, with their logits at W
        inputs = self._rows_first(inputs)
        audit, curve = self._held(inputs)
        held = audit or curve
        batch = self._batch(inputs, held) if held or self._measures(inputs.t) else None

        self._limit_gradients(stats, gradients)
        self.gradients.forget()
        if not self.deferred and (audit or self._reads_gradients()):
            for base in self.bases:
                self.gradients.see(base)
        keep = self.keeps_old or held
        if keep and kept is None:
            kept = self.keep()
        copies = self._state_copies() if keep else []
        return Opened(inputs.t, stats, batch, audit, curve, kept, copies)

    def close_step(self, opened: Opened) -> StepStats:
        """What comes after the bases' step: limit the update, audit it. On an error the weights are at W."""
        self._stats = stats = opened.stats
        if opened.void:
            return stats
        layout, sound = self._checked(opened)
        constrained = self.project is not None or self.retract is not None
        try:
            if opened.kept is not None or constrained or self.deferred:  # else nothing limits or measures it
                self._limit(opened, self._proposal(opened, layout, sound))
        except BaseException:  # Ctrl-C, too, after which many save the weights
            if opened.kept is not None:
                opened.kept.restore()
            raise
        finally:
            self.gradients.forget()
        torch.clear_autocast_cache()
        return stats

    def _limit(self, opened: Opened, proposal: Proposal) -> None:
        stats = opened.stats
        if self.project is not None:
            self.project()
            proposal.layout.read()
        kl_curve = self._kl_curve(proposal) if opened.curve else None
        if opened.audit and stats.gradient_scale is None:
            stats.slope = self._slope(proposal)
        if self.deferred:
            stats.clip_coefficient = where(proposal.sound, stats.clip_coefficient, 0.0)
        self._limit_update(stats, proposal)
        if self.retract is not None and not stats.skipped:
            self.retract()
        if self.deferred or not stats.skipped:
            stats.kl_curve = kl_curve
            if opened.audit:
                self._audit(stats, proposal)
                self._audited(stats, proposal)

    def _started(self, gradients: list[Tensor]) -> StepStats:
        """Check the gradients: the stats of a step that applies everything, or of one that is skipped."""
        norm = self._gradient_norm(gradients)
        bad, norm = self.workers.any_and_norm(self._bad(gradients, norm), norm)
        stats = StepStats(self._one, norm, skipped=bad, bad_gradient=bad, failed=self._flags[False])
        self._begin(stats)
        return stats

    def _gradient_norm(self, gradients: list[Tensor]) -> Tensor:
        return self.arithmetic.norm(gradients)

    def _bad(self, tensors: Sequence[Tensor], norm: Tensor) -> Tensor:
        """Whether an element of the tensors, whose joint norm is given, is not finite; 0-dim bool."""
        if self.deferred:
            return ~finite_flag(tensors, norm)
        return self._flags[not all_finite(tensors, norm)]

    # -- the weights: as they are before a step, between two bases' steps, and as the bases propose them -----

    def keep(self) -> Copy:
        """A copy of the weights as they are now, until the next step."""
        weights = self._laid_out().kept
        weights.store()
        return weights

    def shorten(self, opened: Opened, c: float) -> Shortened:
        """Leave the weights at W + c·dW between the steps of two bases, which see W + dW."""
        assert opened.kept is not None
        if not self.workers.sharded:
            opened.kept.bring_home(self.weights)
        shortened = Shortened(self._laid_out(), opened.kept, c)
        torch.clear_autocast_cache()
        return shortened

    def lengthen(self, shortened: Shortened) -> bool:
        """Undo `shorten`. Returns False where somebody has moved the weights meanwhile: they stay there."""
        return shortened.undo(self._parts())

    def _laid_out(self) -> Layout:
        parts = self._parts()
        if self._layout is None or not self._layout.holds(parts):
            self._layout = Layout(parts, set(self.scaled), written=self.workers.sharded)
        return self._layout

    def _parts(self) -> list[Tensor]:
        """The weights, or what this process holds of them."""
        return [local(p) for p in self.weights] if self.workers.sharded else list(self.weights)

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

    def _checked(self, opened: Opened) -> tuple[Layout, Flag]:
        """The weights as the bases have made them, and whether they and the gradients are finite. Raises
        NonFiniteUpdateError unless `deferred`."""
        if opened.kept is not None and not self.workers.sharded:
            opened.kept.bring_home(self.weights)
        layout = self._laid_out()
        layout.read()
        stats = opened.stats
        # a sum is not finite where an element is not, whatever arithmetic forms it
        parts = layout.parts
        failed = self._bad(parts, real(parts[0]).sum() if len(parts) == 1 else joint_norm(parts))
        if self.workers.sharded:  # else all processes have the same weights
            failed = self.workers.any(failed)
        stats.failed = failed
        sound: Flag = ~(stats.bad_gradient | failed) if self.deferred else True
        if not self.deferred and failed:
            if opened.kept is not None:
                opened.kept.restore()
            raise NonFiniteUpdateError(f"step {opened.t}: the optimizer proposed a non-finite update.")
        return layout, sound

    def _proposal(self, opened: Opened, layout: Layout, sound: Flag) -> Proposal:
        """Describe the update that the weights have just made."""
        return Proposal(
            *(opened.t, opened.batch, layout, opened.kept, opened.copies, sound, self.on_host),
            *(self.arithmetic, self.workers, self.names, self.weights, self.scaled),
            *(self.gradients, self.retract),
            audited=opened.audit,
        )

    def _apply(self, stats: StepStats, proposal: Proposal, c: Number) -> None:
        """Move the weights from W + dW to W + c·dW, and the states' copies of them likewise.

        If c is not finite: to W, and the step counts as skipped.
        """
        if not self.deferred:
            value = float(c)
            self.last_c = value if math.isfinite(value) else 0.0
            if not math.isfinite(value):
                self._give_up(stats, proposal)
                return
            stats.clip_coefficient = c = value if self.on_host else torch.full_like(self._one, value)
            if value < 1:
                proposal.scale_states(c, self.scaled)
                proposal.apply(c)
            return
        usable = torch.as_tensor(is_finite(c) & proposal.sound)
        stats.clip_coefficient = c = where(usable, c, 0.0)
        stats.skipped = ~usable
        proposal.scale_states(c, self.scaled)
        proposal.apply(c)
        for part, old in zip(proposal.layout.parts, proposal.before.parts, strict=True):
            torch.where(usable, part, old, out=part)
        proposal.layout.write(range(len(proposal.layout.parts)))

    def _give_up(self, stats: StepStats, proposal: Proposal) -> None:
        """No usable update: restore W and count the step as skipped. The bases' finite state stays."""
        stats.skipped = torch.ones_like(stats.skipped)
        stats.clip_coefficient = torch.zeros_like(self._one)
        proposal.scale_states(0.0, range(len(self.weights)))
        proposal.restore()

    # -- the batch, and what an audit measures on the rows that had no part in choosing c --------------------

    def _rows_first(self, inputs: StepInputs) -> StepInputs:
        """With the batch's axis in front in all but what the model takes."""
        if not self.prober.axis:
            return inputs
        front = self.prober.rows_first
        return replace(
            inputs,
            logits=None if inputs.logits is None else front(checks.logits_in(inputs.logits)),
            mask=None if inputs.mask is None else front(inputs.mask),
            targets=None if inputs.targets is None else front(inputs.targets),
        )

    def _choice(self, inputs: StepInputs) -> Choice:
        """Which rows choose c."""
        logits = None if inputs.logits is None else checks.logits_in(inputs.logits)
        size = checks.rows_of(inputs.tokens, logits, inputs.mask, self.prober.axis)
        like = logits[..., 0] if logits is not None else inputs.mask
        if like is None:  # neither is given: tokens are one for each position, most of the time
            like = next(t for t in checks.tensors_in(inputs.tokens) if t.ndim > self.prober.axis)
            like = self.prober.rows_first(like)
        chooser = Chooser(self.probe_sequences, self.audit_every > 0)
        drawn_at = inputs.t if self.spread and not self.deferred else None
        return chooser.choose(size, like, None if self.deferred else inputs.mask, drawn_at)

    def _held(self, inputs: StepInputs) -> tuple[bool, bool]:
        """Whether this step is audited, and whether it draws a curve; neither on a batch too short for it."""
        audit = self.audits(inputs.t)
        curve = self._curves(inputs.t)
        if not audit and not curve:
            return False, False
        choice = self._choice(inputs)
        short = choice.size <= choice.k
        if inputs.mask is not None and not self.deferred:
            short = short or not bool(choice.taken(inputs.mask, choice.k, choice.size).any())
        return (False, False) if self.any_process(short) else (audit, curve)

    def _batch(self, inputs: StepInputs, held: bool) -> Batch:
        """`held`: with the rows of an audit. The logits that a step is given are looked at, too: wrong ones
        would make c fall to 0. Raises ValueError, at the first batch, where they are another batch's."""
        batch = self._batch_of(inputs, held)
        if self.deferred:
            return batch
        first = self.given.first
        limit = max(10 * batch.floor, self._most_differing())
        renewed = self.given.look(batch, inputs, self._collapsed(), limit, self.workers)
        if first:
            self._first_batch(batch)
        if self.watches_given and batch.few is not None and not self.workers.sharded and not renewed:
            kl = batch.check_given(batch.few)  # what the first batch was too short to show may grow
            if kl is not None and kl > limit:
                self.watches_given = False
                renewed = self.given.answer(batch, inputs, float(kl), self.workers.alone)
        return self._batch_of(inputs, held) if renewed else batch

    def _batch_of(self, inputs: StepInputs, held: bool) -> Batch:
        choice = self._choice(inputs)
        return Batch(self.prober, inputs, self.weights[0], choice, audit=held, audit_tokens=self.audit_tokens)

    def _slope(self, proposal: Proposal) -> Number:
        """<gradient, dW>."""
        triples = zip(proposal.gradients, proposal.old, proposal.layout.weights, strict=True)
        moved = [(g, w, new) for g, w, new in triples if g is not None]
        if not moved:
            return self.number(torch.zeros_like(self._one))
        gradients, old, new = zip(*moved, strict=True)
        return self.number(self.workers.joined(self.arithmetic.slope(gradients, old, new)))

    def _kl_curve(self, proposal: Proposal) -> Tensor:
        """The KL at CURVE_SCALES of the whole proposal, on the held rows; NaN where it is not finite."""
        kls = [proposal.kl(c, proposal.audit_rows, whole=True) for c in CURVE_SCALES]
        curve = torch.stack([torch.as_tensor(kl, dtype=torch.float64) for kl in kls]).clamp(min=0)
        return curve.masked_fill(~curve.isfinite() | torch.as_tensor(negated(proposal.sound)), torch.nan)

    def _audit(self, stats: StepStats, proposal: Proposal) -> None:
        """Measure how far the applied update moved the predictions on the held rows."""
        audit_rows = proposal.audit_rows
        z_new = proposal.batch.moved(audit_rows)
        kl = self.arithmetic.mean_kl(audit_rows.z, z_new, audit_rows.mask, self.on_host)
        movement = self.arithmetic.movement(audit_rows.z, z_new, audit_rows.mask)
        stats.audit_tokens = proposal.batch.held_tokens
        if not self.workers.alone:
            kl, square, counted = self.workers.pooled(audit_rows.count(), kl, movement.double().square())
            movement = square.sqrt()
            stats.audit_tokens = int(counted)
        # with `deferred` the host does not know yet whether the step was skipped: then it is not audited
        done = ~stats.skipped if self.deferred else True
        stats.applied_kl = where(done, most(self.number(kl), 0.0), math.nan)
        stats.movement = where(done, self.number(movement), math.nan)
        if proposal.kept is not None:
            proposal.layout.read()  # a stabilizer may have moved the weights themselves
            stats.applied_norm = where(done, proposal.norm(whole=True), math.nan)
