"""The rivals of EBC: what else may limit a gradient or an update, on the same contract.

A stabilizer is a `StabilizedOptimizer`: a torch optimizer around the base optimizers whose `step(tokens,
logits)` returns `StepStats`, with the same audits and the same rules for failing steps for all. A new one is
a subclass that limits the gradient or the update, one line in `STABILIZERS`, and one file in
`conf/stabilizer`. The classes take a model and optimizers and know nothing of the lab's configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_
from torch.optim import Optimizer

from ebc_lab.ebc import (
    Proposal,
    Radius,
    StabilizedOptimizer,
    StepStats,
    clip_coefficient,
    group_parameters,
)
from ebc_lab.ebc.energy.record import tensor_norms
from ebc_lab.ebc.flat import joint_norm
from ebc_lab.ebc.options import check_option

PER = ("all", "group")
NORMS = ("latent", "effective")
HALVINGS = 10  # of c, until the effective weights move by no more than the radius


class Rival(StabilizedOptimizer):
    """One with a threshold, `strength` > 0, in the unit that its class states; None: the class's `default`.

    `common`: see `StabilizedOptimizer`. Raises ValueError where strength is not > 0.
    """

    default: ClassVar[float]
    takes_arithmetic = False
    takes_shards = False

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        *,
        strength: float | None = None,
        **common: Any,
    ):
        self.strength = self.default if strength is None else strength
        if not self.strength > 0:
            raise ValueError(f"strength must be > 0, not {self.strength}.")
        super().__init__(model, optimizers, **common)

    def _rates(self) -> list[float]:
        """The learning rate of each weight's parameter group."""
        rates = {id(p): float(group["lr"]) for group in self.param_groups for p in group["params"]}
        return [rates[id(p)] for p in self.weights]

    def _apply_each(self, stats: StepStats, proposal: Proposal, c: Tensor, norms: Tensor) -> None:
        """Scale each tensor's update by its own c; `norms` are those of the updates. Both (n,) float64."""
        stats.clip_coefficient = share(torch.linalg.vector_norm(c * norms), torch.linalg.vector_norm(norms))
        if not torch.isfinite(stats.clip_coefficient):
            self._give_up(stats, proposal)
            return
        scales = c.tolist()
        for copy in proposal.state_copies:
            if scales[copy.weight] < 1:
                copy.scale(scales[copy.weight])
        clipped = [i for i, scale in enumerate(scales) if scale < 1]
        if clipped:
            weights: list[Tensor] = [self.weights[i] for i in clipped]
            old = [proposal.old[i] for i in clipped]
            torch._foreach_lerp_(old, weights, [scales[i] for i in clipped])
            torch._foreach_copy_(weights, old)


def share(part: Tensor, whole: Tensor) -> Tensor:
    """part/whole, float64; 1 where the whole is zero."""
    return torch.where(whole > 0, part.double() / whole.double(), 1.0)


# -- what limits the gradient --------------------------------------------------------------------------------


class NormClip(Rival):
    """The global L2 norm of the gradient is at most `strength` (Pascanu et al., arXiv:1211.5063).

    torch's own: g · min(1, strength/(||g|| + 1e-6)).
    """

    default = 1.0

    def _limit_gradients(self, stats: StepStats, gradients: list[Tensor]) -> None:
        clip_grads_with_norm_(self.weights, self.strength, stats.grad_norm)
        applied = (self.strength / (stats.grad_norm + 1e-6)).clamp(max=1)
        stats.gradient_scale = torch.where(stats.grad_norm > 0, applied, 1.0).double()


class ValueClip(Rival):
    """Every element of the gradient lies within ±`strength`: its direction changes too (Mikolov 2012)."""

    default = 0.01

    def _limit_gradients(self, stats: StepStats, gradients: list[Tensor]) -> None:
        if gradients:  # torch's fails on none
            clip_grad_value_(self.weights, self.strength)
        stats.gradient_scale = share(joint_norm(gradients), stats.grad_norm)


class AdaptiveGradientClip(Rival):
    """Unit by unit, ||g|| is at most `strength` · max(||w||, 1e-3) (Brock et al., arXiv:2102.06171).

    A unit is what feeds one output: a row of a matrix (torch keeps outputs first; of an embedding, one
    token's vector), a filter of a convolution, a vector as a whole. The paper leaves the last layer out; here
    all are limited.
    """

    default = 0.01
    eps = 1e-3  # so that units initialised to zero can learn

    def __init__(self, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer], **options: Any):
        from pytorch_optimizer.optimizer.utils.gradient import unit_norm  # here: see `components.optimizer`

        super().__init__(model, optimizers, **options)
        self.unit_norm = unit_norm

    def _limit_gradients(self, stats: StepStats, gradients: list[Tensor]) -> None:
        for w in self.weights:
            if w.grad is not None:
                # the library takes a 3-dim weight's norm over one axis only, hence flat filters
                g, flat = (t.flatten(1) if t.ndim > 2 else t for t in (w.grad, w))
                most = self.unit_norm(flat).clamp_min_(self.eps).mul_(self.strength)
                norms = self.unit_norm(g)
                factor = torch.where(norms > most, most / norms, 1.0)
                # flat filters may be a copy: it is the gradient itself that is scaled
                w.grad.mul_(factor.view(-1, *[1] * (w.ndim - 1)) if w.ndim > 2 else factor)
        stats.gradient_scale = share(joint_norm(gradients), stats.grad_norm)


class ZClip(Rival):
    """Outliers among the gradient norms are pulled back (ZClip: Kumar et al., arXiv:2504.02507).

    z = (||g|| - mean)/std. Where z > `strength` the norm becomes mean + (strength²/z)·std: the further out,
    the nearer to the mean. Mean and variance are running averages (`alpha`) of the norms after that; the
    first `warm_up` steps only collect the norms from which both start. As in the authors' code the variance
    is taken around the new mean. Left out are their fixed ceiling on the norm, which is `NormClip`, and the
    1e-6 that they add to std, which fits no gradient's scale.
    """

    default = 2.5  # standard deviations
    alpha = 0.97
    warm_up = 25  # steps

    def __init__(self, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer], **options: Any):
        super().__init__(model, optimizers, **options)
        device = self.weights[0].device
        self.seen = 0  # norms collected in the warm-up
        self.collected = torch.zeros(self.warm_up, dtype=torch.float64, device=device)
        self.mean = torch.zeros((), dtype=torch.float64, device=device)
        self.variance = torch.zeros((), dtype=torch.float64, device=device)

    def _own_state(self) -> dict[str, Any]:
        return {
            "seen": torch.tensor(self.seen),
            "collected": self.collected.clone(),
            "mean": self.mean.clone(),
            "variance": self.variance.clone(),
        }

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self.seen = int(state["seen"])
        for name in ("collected", "mean", "variance"):
            setattr(self, name, state[name].to(self.mean.device, copy=True))

    def _limit_gradients(self, stats: StepStats, gradients: list[Tensor]) -> None:
        norm = stats.grad_norm.double()
        stats.gradient_scale = torch.ones_like(norm)
        if self.seen < self.warm_up:
            self.collected[self.seen] = norm
            self.seen += 1
            if self.seen == self.warm_up:
                self.mean = self.collected.mean()
                self.variance = self.collected.var(correction=0)
            return
        std = self.variance.sqrt()
        z = (norm - self.mean) / std
        limited = torch.where(z > self.strength, self.mean + self.strength**2 / z * std, norm)
        self.mean = self.alpha * self.mean + (1 - self.alpha) * limited
        self.variance = self.alpha * self.variance + (1 - self.alpha) * (limited - self.mean).square()
        stats.gradient_scale = share(limited, norm)
        if gradients:
            torch._foreach_mul_(gradients, stats.gradient_scale)


# -- what limits the update ----------------------------------------------------------------------------------


class TrustRegion(Rival):
    """The complete update's Frobenius norm is at most a radius w (`ebc_lab.ebc.Radius`).

    c = min(1, w/||dW||), w = `strength`·sqrt(m(t))·min(1, (t+1)/`ramp`)·`radius_factor`.

    This is EBC with one group whose sensitivity is always 1 and target_kl = strength²/4: it bounds how far
    weights move and ignores what that does to predictions. `strength` is a weight norm, or with
    radius_unit="initial" the share of ||W|| before the first step. Bounding an
    update by a norm of the weights is what Bernstein et al., arXiv:2002.03432, do for each layer, relative to
    its weights' norm.

    Args:
        schedule, total_steps, radius_unit, ramp: see `Radius`.
        per: `all`; or `group`: each group of parameters has a c of its own, min(1, w·sqrt(n_g/n)/||dW_g||),
            n_g of all n weights being its own, so that the whole still stays within w.
        grouping: of `per=group`, see `group_parameters`; every parameter must be in a group.
        norm: `latent`, of the weights that the optimizer moves; or `effective`, of those that the forward
            makes of them: c is the largest of 1, 1/2, 1/4 … 2^-10 with ||What(W + c·dW) - What(W)|| <= w, and
            the step is skipped if there is none.
        effective: What: the weights as the forward uses them at the model's present ones, a tensor each;
            those that are used as they are belong to them too.
    Raises:
        ValueError: an unknown name, `effective` is missing, a grouping that leaves parameters out, or a norm
            of effective weights by group.
    """

    default = 1.0
    keeps_old = True

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        *,
        schedule: str = "constant",
        total_steps: int | None = None,
        radius_unit: str = "absolute",
        ramp: int = 0,
        per: str = "all",
        norm: str = "latent",
        grouping: str | Mapping[str, Sequence[str]] = "block",
        effective: Callable[[], Sequence[Tensor]] | None = None,
        **options: Any,
    ):
        check_option("per", per, PER)
        check_option("norm", norm, NORMS)
        if norm == "effective" and per == "group":
            raise ValueError("norm='effective' halves the whole update until it fits: use per='all'.")
        if norm == "effective" and effective is None:
            raise ValueError("norm='effective' needs `effective`, which returns the weights of the forward.")
        if norm == "effective" and radius_unit != "absolute":
            raise ValueError("radius_unit='initial' is of latent weights: use norm='latent'.")
        super().__init__(model, optimizers, **options)
        self.radius = Radius(
            self.strength, unit=radius_unit, schedule=schedule, total_steps=total_steps, ramp=ramp
        )
        self.radius.to(self.weights[0].device)
        self.per = per
        self.norm = norm
        self.effective = effective
        self.grouping = grouping
        self.groups: dict[str, list[int]] = {}
        self.shares: list[float] = []  # of the radius, by group
        self._weights_changed()

    def _weights_changed(self) -> None:
        self.groups = self._grouped(self.grouping) if self.per == "group" else {}
        total = sum(w.numel() for w in self.weights)
        elements = [sum(self.weights[i].numel() for i in members) for members in self.groups.values()]
        self.shares = [(n / total) ** 0.5 for n in elements]

    def _grouped(self, grouping: str | Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
        """The groups, as indices of weights. Raises ValueError if one is in none."""
        shapes = {name: p.shape for name, p in zip(self.names, self.weights, strict=True)}
        named = group_parameters(self.names, grouping, shapes)
        index = {name: i for i, name in enumerate(self.names)}
        groups = {group: [index[name] for name in names] for group, names in named.items()}
        if sum(map(len, groups.values())) < len(self.names):
            raise ValueError(
                f"per='group' limits every parameter, and grouping={grouping!r} leaves some out: use another."
            )
        return groups

    def _own_state(self) -> dict[str, Any]:
        start = self.radius.state_dict()
        return {"radius": start} if start else {}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self.radius.load_state_dict(state.get("radius", {}))

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        self.radius.to(device)

    def _prepare(self, t: int) -> None:
        self.radius.move(t, self._lr_ratio())

    def _limit_update(self, stats: StepStats, proposal: Proposal) -> None:
        self.radius.see(proposal)
        width = float(self.radius.now) * self.radius_factor
        if self.effective is not None and self.norm == "effective":
            self._limit_effective(stats, proposal, width, self.effective)
            return
        norms = tensor_norms(proposal.updates())
        if self.per == "group":
            self._limit_groups(stats, proposal, width, norms)
            return
        self._apply(stats, proposal, clip_coefficient(width, torch.linalg.vector_norm(norms)))

    def _limit_groups(self, stats: StepStats, proposal: Proposal, width: float, norms: Tensor) -> None:
        c = torch.ones_like(norms)
        for part, members in zip(self.shares, self.groups.values(), strict=True):
            moved = torch.linalg.vector_norm(norms[members])
            allowed = width * part
            c[members] = torch.where(moved > allowed, allowed / moved, 1.0)
        self._apply_each(stats, proposal, c, norms)

    def _limit_effective(
        self,
        stats: StepStats,
        proposal: Proposal,
        width: float,
        effective: Callable[[], Sequence[Tensor]],
    ) -> None:
        trial = proposal.layout.trial
        with proposal.before.standing_in(self.weights):
            # detached here: a weight that is used as it is would otherwise be the moved one afterwards
            before = [w.detach() for w in effective()]
        for halvings in range(HALVINGS + 1):
            c = 0.5**halvings
            proposal.interpolate(c, trial.parts)
            with trial.standing_in(self.weights):
                moved = torch.linalg.vector_norm(tensor_norms(torch._foreach_sub(list(effective()), before)))
            if moved <= width:
                self._apply(stats, proposal, torch.full_like(moved, c))
                return
        self._give_up(stats, proposal)


class KLClip(Rival):
    """K-FAC's clip of the update by its predicted KL (Ba, Grosse & Martens 2017; `kl_clip` in K-FAC codes).

    c = min(1, sqrt(strength/(lr²·Σ V·g))) with the direction V = -dW/lr, that is sqrt(strength/(lr·|<g,
    dW>|)). For a natural gradient V·g is V'FV and lr²·V'FV/2 the update's KL in nats; other optimizers' V·g
    only predicts the fall of the loss, so `strength` is in nats for K-FAC alone. g is the gradient, lr that
    of each weight's parameter group.
    """

    default = 1e-3
    keeps_old = True

    def _limit_update(self, stats: StepStats, proposal: Proposal) -> None:
        parts = [
            lr * torch.dot(p.grad.flatten().float(), (p - w).flatten().float())
            for p, w, lr in zip(self.weights, proposal.old, self._rates(), strict=True)
            if p.grad is not None
        ]
        if parts:
            promised = torch.stack(parts).double().sum().abs()
            self._apply(stats, proposal, clip_coefficient(self.strength**0.5, promised.sqrt()))


class RMSClip(Rival):
    """Each tensor's update in units of the learning rate, u = dW/lr, is divided by max(1, rms(u)/`strength`).

    The clip of Adafactor (Shazeer & Stern, arXiv:1804.04235) on whatever an optimizer proposes. StableAdamW
    (Wortsman et al., arXiv:2304.13013; also in `pytorch_optimizer`) is Adam with the same formula on
    rms(g/sqrt(v)): it looks at the gradient of the step alone, not at the momentum that is applied, and
    weight decay is added after it, not clipped with it. No unit: an update of Adam has an rms of about 1
    while gradients agree.
    """

    default = 1.0
    keeps_old = True

    def _limit_update(self, stats: StepStats, proposal: Proposal) -> None:
        norms = tensor_norms(proposal.updates())
        largest = [
            self.strength * lr * p.numel() ** 0.5 for p, lr in zip(self.weights, self._rates(), strict=True)
        ]
        allowed = torch.tensor(largest, dtype=torch.float64, device=norms.device)
        c = torch.where(norms > allowed, allowed / norms, 1.0)
        self._apply_each(stats, proposal, c, norms)
