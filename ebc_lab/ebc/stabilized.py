"""`StabilizedOptimizer`: the step that EBC and its rivals share, a torch optimizer around one or several base optimizers.

In order: gradients checked → `_limit_gradients` → base optimizers step → projection → `_limit_update` → retraction → at every
audit the applied KL is measured on tokens that chose nothing. A stabilizer is a subclass that overrides one of the two
limits; without any it is the plain optimizer, bit for bit. The rules for failing steps are docs/method.md's, and the same
for every stabilizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from .flat import Copy, Segment, addresses, segments
from .logits import centre, mean_kl, rms_norm
from .probe import Batch, Prober
from .step import NonFiniteUpdateError, StepStats


class StabilizedOptimizer(torch.optim.Optimizer):
    """The plain optimizers with audits and rules for failing steps; subclasses limit the gradient or the update.

    Args:
        model: the module whose predictions are audited.
        optimizers: one torch optimizer, or several that share out the parameters (Muon on matrices, Adam on the rest). One
            whose state holds copies of the weights names their keys in an attribute `weight_copies`: they are scaled too.
        probe_sequences: leading rows of the batch that an audit leaves out.
        audit_every: steps between measurements of the applied KL; 0 never.
        audit_tokens: how many tokens an audit needs at least.
        forward: (model, inputs) -> logits (B, ..., V), or an object with `.logits`. Default: call the model.
        compiled: `torch.compile(model)` where training calls that: measurements of the KL call it as well. It goes through
            `forward` in the model's place; sensitivities, which swap weights, keep to `model`.
        project: called after the base step, sets the weights to their projection on a convex set.
        retract: called after the update was limited, puts the weights back on their manifold.
        fresh_logits: compute z(W) anew without dropout. Default: if the model holds dropout or batch-norm modules.
    Raises:
        ValueError: parameters outside `model`, or of two optimizers.
    """

    keeps_old = False  # whether the update is limited, so that W is needed again after the base step
    capturable = True  # whether a step without host reads exists at all, see `kind`

    def __init__(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        probe_sequences: int = 2,
        audit_every: int = 10,
        audit_tokens: int = 512,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        compiled: nn.Module | None = None,
        project: Callable[[], None] | None = None,
        retract: Callable[[], None] | None = None,
        fresh_logits: bool | None = None,
    ):
        if probe_sequences < 1:
            raise ValueError(f"probe_sequences must be at least 1, not {probe_sequences}.")
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
        self.probe_sequences, self.audit_every, self.audit_tokens = probe_sequences, audit_every, audit_tokens
        self.project, self.retract = project, retract
        self.prober = Prober(model, forward, fresh_logits, compiled)
        self.step_index = 0
        self.peak_lr = float(self.param_groups[0]["lr"])
        self._trained_at: list[Tensor] | None = None
        self.scaled = list(range(len(self.weights)))  # the weights that c scales
        self._index = {id(p): i for i, p in enumerate(self.weights)}
        self.deferred = (
            False  # read nothing on the host: the bases must heed `found_inf`, as torch's fused ones do
        )
        self._where: list[int] = []
        self._segments: list[Segment] = []
        self._moving: list[
            tuple[Tensor, int]
        ] = []  # of what c scales: a segment's memory, its place in every `Copy`
        self._kept: Copy | None = None  # W: one of the two copies of the weights that are held
        self._old_copies: list[tuple[int, dict[str, Any], str, Tensor]] = []

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
            "peak_lr": self.peak_lr,
            **self._own_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for base, state in zip(self.bases, state_dict["bases"], strict=True):
            base.load_state_dict(state)
        self._share_groups()
        self.step_index, self.peak_lr = state_dict["step_index"], state_dict["peak_lr"]
        self._load_own_state(state_dict)

    def _own_state(self) -> dict[str, Any]:
        """What a stabilizer itself carries from step to step."""
        return {}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        return

    @torch.no_grad()
    def eval(self) -> None:
        """Set the weights for evaluation, for bases that train at other weights than they are judged by (Schedule-Free).

        What they are judged by is put on the projection's set or manifold too.
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
        torch._foreach_copy_(self.weights, self._trained_at)
        self._trained_at = None

    def _lr_ratio(self) -> float:
        """The learning rate over its peak, at most 1: torch's schedulers keep the peak in the group, else it is the first."""
        group = self.param_groups[0]
        peak = float(group.get("max_lr", group.get("initial_lr", self.peak_lr)))
        return min(1.0, float(group["lr"]) / peak) if peak else 1.0

    # -- what a stabilizer overrides -----------------------------------------------------------------------------------

    def _prepare(self, t: int) -> None:
        """On the host, before anything else at step `t`: schedules."""

    def _begin(self, stats: StepStats) -> None:
        """On the device, before anything else: what the step's record begins with."""

    def _measures(self, t: int) -> bool:
        """Whether choosing the update at step `t` takes a forward on the batch."""
        return False

    def _limit_gradients(self, stats: StepStats, gradients: list[Tensor]) -> None:
        """Change the gradients in place and say by how much in `stats.gradient_scale`."""

    def _limit_update(self, stats: StepStats, batch: Batch | None, t: int) -> None:
        """The weights are at the proposal, `_old` holds W (with `keeps_old`): leave what is to be applied.

        `_apply(stats, c)` does so; `_give_up(stats)` restores W where no update is usable.
        """

    def _audited(self, stats: StepStats, batch: Batch, t: int) -> None:
        """After an audit: controllers."""

    # -- one step ------------------------------------------------------------------------------------------------------

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
            tokens: the batch as `forward` takes it, batch first; may be None when nothing is to be measured.
            logits: the training forward's own, (B, ..., V), or its output, which has them as `.logits`, so that z(W) need not
                be computed again.
            mask: (B, ...) of bools, or of ones and zeros, the token positions that count; all if None.
            targets: (B, ...) class indices, for the rules that need the loss of a trial step.
            probe: (tokens, targets) of held-back training text to choose c on, instead of the batch's leading rows.
        Raises:
            NonFiniteUpdateError: the base proposed a non-finite update.
            ValueError: tokens are missing, or the batch has no row left for the audit.
        """
        return self.take_step(self.begin_step(), tokens, logits, mask, targets=targets, probe=probe)

    @torch.no_grad()
    def begin_step(self) -> int:
        """The host's part of `step`: count it, and put what depends on its number where the device's part finds it. -> t."""
        t, self.step_index = self.step_index, self.step_index + 1
        self._prepare(t)
        return t

    def kind(self, t: int) -> tuple[str, ...] | None:
        """What step `t` does beside the usual: steps of one kind launch the same work, so that a graph of one serves all.

        None where the step reads values on the host, or is like no other.
        """
        if not self.capturable or self.project is not None or self.retract is not None:
            return None
        return ("audit",) if self._audits(t) else ()

    @torch.no_grad()
    def take_step(
        self,
        t: int,
        tokens: Any = None,
        logits: Any = None,
        mask: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        probe: tuple[Any, Tensor | None] | None = None,
    ) -> StepStats:
        """The device's part of `step`, after `begin_step` has returned `t`; arguments and errors as there.

        With `deferred` it reads nothing on the host, at steps that have a `kind`: a bad gradient or update shows in the
        StepStats alone, and the weights are as if it had been noticed.
        """
        self._arrange()
        gradients = [p.grad for p in self.weights if p.grad is not None]
        grad_norm = get_total_norm(gradients)
        sound = self._finite(gradients, grad_norm)
        one = torch.ones((), dtype=torch.float64, device=self.weights[0].device)
        stats = StepStats(one, grad_norm, ~sound, ~sound, torch.zeros_like(sound))
        self._begin(stats)
        if not self.deferred and not sound:
            stats.clip_coefficient = 0 * one
            return stats

        audit = self._audits(t)
        batch = (
            self._batch(tokens, logits, mask, targets, probe, audit) if audit or self._measures(t) else None
        )
        self._limit_gradients(stats, gradients)
        kept = self.keeps_old or audit
        if kept:
            self._save()
        for base in self.bases:
            if self.deferred:
                base.found_inf = stats.bad_gradient.float()  # type: ignore[attr-defined]
            base.step()
            if self.deferred:
                base.found_inf = None  # type: ignore[attr-defined]
        parts = [s.tensor for s in self._segments]
        norm = get_total_norm(parts) if len(parts) > 1 else torch.linalg.vector_norm(parts[0])
        finite = self._finite(parts, norm)
        if not self.deferred and not finite:
            if kept:
                self._restore()
            raise NonFiniteUpdateError(f"step {t}: the optimizer proposed a non-finite update.")
        stats.failed = ~finite
        self._sound = sound & finite
        if self.project is not None:
            self.project()
        if audit and stats.gradient_scale is None:
            stats.slope = self._slope()
        if self.deferred:
            stats.clip_coefficient = torch.where(self._sound, one, 0.0)
        self._limit_update(stats, batch, t)
        if self.retract is not None and not stats.skipped:
            self.retract()
        if audit and (self.deferred or not stats.skipped):
            assert batch is not None
            self._audit(stats, batch)
            self._audited(stats, batch, t)
        torch.clear_autocast_cache()
        return stats

    def _finite(self, tensors: Sequence[Tensor], norm: Tensor) -> Tensor:
        if self.deferred:
            return finite_flag(tensors, norm)
        return torch.full((), all_finite(tensors, norm), dtype=torch.bool, device=norm.device)

    def _audits(self, t: int) -> bool:
        return self.audit_every > 0 and t % self.audit_every == 0

    def _forget_copies(self) -> None:
        self._kept = None

    def _arrange(self) -> None:
        """See how the weights lie in memory, at first and after somebody has moved them."""
        where = addresses(self.weights)
        if where != self._where:
            scaled = set(self.scaled)
            self._where = where
            self._forget_copies()
            self._segments = segments(self.weights, [i in scaled for i in range(len(self.weights))])
            self._moving = [(s.tensor, i) for i, s in enumerate(self._segments) if s.members[0] in scaled]

    def _batch(
        self,
        tokens: Any,
        logits: Any,
        mask: Tensor | None,
        targets: Tensor | None,
        probe: tuple[Any, Tensor | None] | None,
        audit: bool,
    ) -> Batch:
        return Batch(
            self.prober,
            tokens,
            logits,
            mask,
            self.weights[0],
            k=self.probe_sequences,
            audit=audit,
            audit_tokens=self.audit_tokens,
            targets=targets,
            probe=probe,
        )

    @property
    def _old(self) -> list[Tensor] | None:
        """W, one tensor a weight, where it was kept."""
        return None if self._kept is None else self._kept.views

    def _save(self) -> None:
        """Keep W, and what the bases' states hold of it."""
        self._kept = self._kept or Copy(self.weights, self._segments)
        self._kept.store()
        self._old_copies = [
            (i, base.state[p], key, base.state[p].get(key, p).detach().clone())
            for base in self.bases
            for key in getattr(base, "weight_copies", ())
            for group in base.param_groups
            for p in group["params"]
            if p.grad is not None and (i := self._index.get(id(p))) is not None
        ]

    def _restore(self) -> None:
        assert self._kept is not None
        torch._foreach_copy_([s.tensor for s in self._segments], self._kept.parts)

    def _slope(self) -> Tensor:
        """<gradient, dW> of the proposal that the weights are at, float64."""
        assert self._old is not None
        moved = [(p.grad, p - w) for p, w in zip(self.weights, self._old, strict=True) if p.grad is not None]
        wide = torch.float64 if self.weights[0].dtype == torch.float64 else torch.float32
        parts = [torch.dot(g.flatten().to(wide), d.flatten().to(wide)) for g, d in moved]
        return (
            torch.stack(parts).double().sum() if parts else torch.zeros_like(self._sound, dtype=torch.float64)
        )

    def _interpolate(self, c: Tensor, out: Sequence[Tensor]) -> None:
        """Set what c scales to lerp(W, W + dW, c), exact at 0 and 1, in `out`; the weights are at W + dW."""
        assert self._kept is not None
        for w, i in self._moving:
            torch.lerp(self._kept.parts[i], w, c.to(w.dtype), out=out[i])

    def _apply(self, stats: StepStats, c: Tensor) -> None:
        """From W + dW, at which the weights are, to W + c·dW, states' copies of the weights alike.

        Where c is not finite: to W, and the step counts as skipped.
        """
        usable = torch.isfinite(c) & self._sound
        if not self.deferred and not usable:
            self._give_up(stats)
            return
        stats.clip_coefficient = c = torch.where(usable, c, 0.0)
        stats.skipped = ~usable
        if self.deferred or c < 1:
            self._scale_copies(c, self.scaled)
            self._interpolate(c, [s.tensor for s in self._segments])
        if self.deferred:
            assert self._kept is not None
            for s, old in zip(self._segments, self._kept.parts, strict=True):
                torch.where(usable, s.tensor, old, out=s.tensor)

    def _scale_copies(self, c: Tensor, scaled: Sequence[int]) -> None:
        for i, state, key, old in self._old_copies:
            if i in scaled:
                state[key].copy_(torch.lerp(old, state[key], c.to(old.dtype)))

    def _give_up(self, stats: StepStats) -> None:
        """No usable update: restore the weights by copy and count the step as skipped. The bases' finite state stays."""
        stats.skipped = torch.ones_like(stats.skipped)
        stats.clip_coefficient = torch.zeros_like(stats.clip_coefficient)
        self._scale_copies(stats.clip_coefficient, range(len(self.weights)))
        self._restore()

    def _audit(self, stats: StepStats, batch: Batch) -> None:
        z_new = batch.logits(batch.held)
        stats.applied_kl = mean_kl(batch.z_held, z_new, batch.held_mask).clamp(min=0)
        stats.movement = rms_norm(centre(z_new) - centre(batch.z_held), batch.held_mask)
        if self.deferred:  # nobody has looked whether the step was skipped, and a skipped one is not audited
            stats.applied_kl = torch.where(stats.skipped, torch.nan, stats.applied_kl)
            stats.movement = torch.where(stats.skipped, torch.nan, stats.movement)
        stats.audit_tokens = batch.held_tokens


def all_finite(tensors: Sequence[Tensor], norm: Tensor) -> bool:
    """Whether every element is finite, given their joint norm; only a norm that overflowed needs a look at each."""
    return bool(torch.isfinite(norm)) or all(bool(torch.isfinite(t).all()) for t in tensors)


def finite_flag(tensors: Sequence[Tensor], norm: Tensor) -> Tensor:
    """`all_finite` as a 0-dim bool tensor that nobody has read.

    Since nobody can know whether the norm overflowed, it is taken again in float64, whose range no float32 can leave.
    """
    if not tensors or tensors[0].dtype == torch.float64:
        return torch.isfinite(norm)
    return torch.isfinite(torch.stack(torch._foreach_norm(list(tensors), 2, torch.float64))).all()
