"""`StabilizedOptimizer`: the step that EBC and its rivals share, a torch optimizer around one or several base optimizers.

In order: gradients checked → `_limit_gradients` → base optimizers step → projection → `_limit_update` → retraction → at every
audit the applied KL is measured on tokens that chose nothing. A stabilizer is a subclass that overrides one of the two
limits; without any it is the plain optimizer, bit for bit. The rules for failing steps are docs/method.md's, and the same
for every stabilizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from .logits import centre, mean_kl, rms_norm
from .probe import Batch, Prober


class NonFiniteUpdateError(ArithmeticError):
    """The base optimizer proposed a non-finite update from finite gradients. The weights are restored where they were kept."""


@dataclass
class StepStats:
    """What one step did. 0-dim tensors (`contributions` and `sensitivities`: (L,)); None where not measured."""

    clip_coefficient: Tensor  # c, in [0, 1]: the applied update's norm over the proposal's
    grad_norm: Tensor  # global L2 norm of the gradient, before anything limits it
    skipped: bool = False  # weights and, for a bad gradient, optimizer state untouched
    gradient_scale: Tensor | None = None  # the limited gradient's norm over the gradient's
    delta: Tensor | None = None  # the budget used, nats per token
    target_kl: float | None = None  # delta*, scheduled, nats per token
    radius: Tensor | None = None  # tau = 2·sqrt(delta), logits per token
    guard: Tensor | None = None  # g, the factor on tau
    trial: Tensor | None = None  # the last shadow trial scale
    trial_kl: Tensor | None = None  # the KL measured there, nats per token
    measurements: int = 0
    predicted_kl: Tensor | None = None  # q of the whole proposal, nats per token
    calibration: Tensor | None = None  # k of `calibrated`, KL over S²
    surrogate: Tensor | None = None  # S, logits per token
    contributions: Tensor | None = None  # s_g, logits per token
    sensitivities: Tensor | None = None  # beta_g, where measured at this step
    slope: Tensor | None = None  # <grad loss, dW> of the whole proposal, nats per token
    agreement: Tensor | None = None  # r, what the loss fell by over what was predicted
    applied_kl: Tensor | None = None  # on tokens that did not choose c, nats per token
    movement: Tensor | None = None  # T, logits per token, on the same tokens
    tightness: Tensor | None = None  # T/(c·S), T of the budgeted part
    audit_tokens: int = 0


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
        self._old: list[Tensor] | None = None  # the two copies of the weights that are held
        self._new: list[Tensor] | None = None
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

    def _begin(self, stats: StepStats, t: int) -> None:
        """Before anything else at step `t`: schedules."""

    def _measures(self, t: int) -> bool:
        """Whether choosing the update at step `t` takes a forward on the batch."""
        return False

    def _limit_gradients(self, stats: StepStats, gradients: list[Tensor]) -> None:
        """Change the gradients in place and say by how much in `stats.gradient_scale`."""

    def _limit_update(self, stats: StepStats, batch: Batch | None, t: int) -> None:
        """The weights are at the proposal, `_old` holds W (with `keeps_old`): leave what is to be applied.

        `_apply(c)` does so; `_give_up(stats)` restores W where no update is usable.
        """

    def _audited(self, stats: StepStats, batch: Batch, t: int) -> None:
        """After an audit: controllers."""

    # -- one step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        tokens: Any = None,
        logits: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        probe: tuple[Any, Tensor | None] | None = None,
    ) -> StepStats:
        """Apply one limited update from the gradients at hand.

        Args:
            tokens: the batch as `forward` takes it, batch first; may be None when nothing is to be measured.
            logits: the training forward's own, (B, ..., V), so that z(W) need not be computed again.
            mask: (B, ...) bool, the token positions that count; all if None.
            targets: (B, ...) class indices, for the rules that need the loss of a trial step.
            probe: (tokens, targets) of held-back training text to choose c on, instead of the batch's leading rows.
        Raises:
            NonFiniteUpdateError: the base proposed a non-finite update.
            ValueError: tokens are missing, or the batch has no row left for the audit.
        """
        t, self.step_index = self.step_index, self.step_index + 1
        one = torch.ones((), dtype=torch.float64, device=self.weights[0].device)
        gradients = [p.grad for p in self.weights if p.grad is not None]
        stats = StepStats(one, get_total_norm(gradients))
        self._begin(stats, t)
        if not all_finite(gradients, stats.grad_norm):
            stats.clip_coefficient, stats.skipped = 0 * one, True
            return stats

        audit = self.audit_every > 0 and t % self.audit_every == 0
        batch = self._batch(tokens, logits, mask, targets, probe, audit) if audit or self._measures(t) else None
        self._limit_gradients(stats, gradients)
        kept = self.keeps_old or audit
        if kept:
            self._save()
        for base in self.bases:
            base.step()
        self._refuse_non_finite(kept)
        if self.project is not None:
            self.project()
        if audit and stats.gradient_scale is None:
            stats.slope = self._slope()
        self._limit_update(stats, batch, t)
        if self.retract is not None and not stats.skipped:
            self.retract()
        if audit and not stats.skipped:
            assert batch is not None
            self._audit(stats, batch)
            self._audited(stats, batch, t)
        torch.clear_autocast_cache()
        return stats

    def _batch(
        self,
        tokens: Any,
        logits: Tensor | None,
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

    def _copy(self, buffers: list[Tensor] | None) -> list[Tensor]:
        if buffers is None:
            return [p.detach().clone() for p in self.weights]
        torch._foreach_copy_(buffers, self.weights)
        return buffers

    def _save(self) -> None:
        """Keep W, and what the bases' states hold of it."""
        self._old = self._copy(self._old)
        self._old_copies = [
            (i, base.state[p], key, base.state[p].get(key, p).detach().clone())
            for base in self.bases
            for key in getattr(base, "weight_copies", ())
            for group in base.param_groups
            for p in group["params"]
            if p.grad is not None and (i := self._index.get(id(p))) is not None
        ]

    def _refuse_non_finite(self, kept: bool) -> None:
        if all_finite(self.weights, get_total_norm(self.weights)):
            return
        if kept and self._old is not None:
            torch._foreach_copy_(self.weights, self._old)
        raise NonFiniteUpdateError(f"step {self.step_index - 1}: the optimizer proposed a non-finite update.")

    def _slope(self) -> Tensor:
        """<gradient, dW> of the proposal that the weights are at, float64."""
        assert self._old is not None
        moved = [(p.grad, p - w) for p, w in zip(self.weights, self._old, strict=True) if p.grad is not None]
        wide = torch.float64 if self.weights[0].dtype == torch.float64 else torch.float32
        parts = [torch.dot(g.flatten().to(wide), d.flatten().to(wide)) for g, d in moved]
        return torch.stack(parts).double().sum() if parts else torch.zeros((), dtype=torch.float64)

    def _apply(self, c: Tensor) -> None:
        """From W + dW, at which the weights are, to W + c·dW: lerp(W, W_new, c), exact at 0 and 1; states' copies alike."""
        assert self._old is not None
        if c >= 1:
            return
        self._scale_copies(c, self.scaled)
        weights, old = self._scaled(self.weights), self._scaled(self._old)
        torch._foreach_lerp_(old, weights, float(c))
        torch._foreach_copy_(weights, old)

    def _scale_copies(self, c: Tensor, scaled: Sequence[int]) -> None:
        for i, state, key, old in self._old_copies:
            if i in scaled:
                state[key].copy_(torch.lerp(old, state[key], float(c)))

    def _give_up(self, stats: StepStats) -> None:
        """No usable update: restore the weights by copy and count the step as skipped. The bases' finite state stays."""
        assert self._old is not None
        stats.skipped, stats.clip_coefficient = True, torch.zeros_like(stats.clip_coefficient)
        self._scale_copies(stats.clip_coefficient, range(len(self.weights)))
        torch._foreach_copy_(self.weights, self._old)

    def _scaled(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those of one list a weight that c scales."""
        return [tensors[i] for i in self.scaled]

    def _audit(self, stats: StepStats, batch: Batch) -> None:
        z_new = batch.logits(batch.held)
        stats.applied_kl = mean_kl(batch.z_held, z_new, batch.held_mask).clamp(min=0)
        stats.movement = rms_norm(centre(z_new) - centre(batch.z_held), batch.held_mask)
        stats.audit_tokens = batch.held_tokens


def all_finite(tensors: Sequence[Tensor], norm: Tensor) -> bool:
    """Whether every element is finite, given their joint norm; only a norm that overflowed needs a look at each."""
    return bool(torch.isfinite(norm)) or all(bool(torch.isfinite(t).all()) for t in tensors)
