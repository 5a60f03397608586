"""Rivals that no well-kept library has: fixed norms, distance over gradients, a tuner around Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Pair = tuple[Tensor, Tensor]  # a weight and its gradient
LEAST = 1e-12  # of a norm that something is divided by


class ShareOfRate(Optimizer):
    """An optimizer that takes a constant share of the learning rate of its group."""

    share = 1.0

    def taken(self, rate: Any) -> Any:
        """Return what a step takes in the place of the group's rate."""
        return rate * self.share

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = self.taken(rate)
            super().step()
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate


class PartialAdam(ShareOfRate, torch.optim.Adam):
    """Adam at a share of the rate of its group."""


class PartialAdamW(ShareOfRate, torch.optim.AdamW):
    """AdamW at a share of the rate of its group."""


class FixedNorm(Optimizer):
    """Every tensor keeps the Frobenius norm n that it has at its first step: W ← n·unit(W - lr·n·unit(u)).

    So lr is the length of a step over that of the weights. What a wrapper that shrinks steps leaves inside
    the sphere, the next step puts back on it.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["norm"] = torch.linalg.vector_norm(p)
                u = self.direction(p.grad, state, group)
                if group["lr"] == 0:
                    continue  # putting it back on the sphere would move it by rounding
                n = state["norm"]
                u = u / torch.linalg.vector_norm(u).clamp(min=LEAST)
                p.sub_(u.mul_(group["lr"]).mul_(n))
                p.mul_(n / torch.linalg.vector_norm(p).clamp(min=LEAST))

    def direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return the update before it is scaled, and renew the moments in `state`."""
        raise NotImplementedError


class Hyperball(FixedNorm):
    """Adam's update at a fixed norm, AdamH. Wen et al., arXiv:2606.16899."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float = 1e-8
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if "step" not in state:
            state.update(step=0, exp_avg=torch.zeros_like(g), exp_avg_sq=torch.zeros_like(g))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        m = state["exp_avg"].lerp_(g, 1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (v / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        u: Tensor = (m / (1 - beta1 ** state["step"])).div_(root)
        return u


class LionAR(FixedNorm):
    """The sign of a Nesterov momentum at a fixed norm. Kosson, Messmer & Jaggi, arXiv:2410.23922."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, beta: float):
        super().__init__(params, {"lr": lr, "beta": beta})

    def direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(g)
        m: Tensor = state["exp_avg"].lerp_(g, 1 - group["beta"])
        return g.lerp(m, group["beta"]).sign_()


class DoG(Optimizer):
    """Distance over gradients: a step is lr·r/√G times the gradient, for all tensors of a group together.

    r is the greatest distance from the start so far, at first `first`·(1 + norm of the weights); G is `eps`
    and the sum of all squared gradients so far. `weight_decay` is added to the gradient.
    Ivgi, Hinder & Carmon, arXiv:2302.12022.
    """

    weight_starts = ("start",)

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1.0,
        weight_decay: float = 0.0,
        first: float = 1e-6,
        eps: float = 1e-8,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "first": first, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            pairs = [(p, p.grad) for p in group["params"] if p.grad is not None]
            if group["weight_decay"]:
                pairs = [(p, g.add(p, alpha=group["weight_decay"])) for p, g in pairs]
            for part, known in self._parts(pairs, group):
                self._move(part, known, group)

    def _parts(
        self, pairs: Sequence[Pair], group: dict[str, Any]
    ) -> Iterable[tuple[Sequence[Pair], dict[str, Any]]]:
        """Return what shares one step size, weights with their gradients, and where its r and G are kept."""
        return [(pairs, group)] if pairs else []

    def _move(self, pairs: Sequence[Pair], known: dict[str, Any], group: dict[str, Any]) -> None:
        for p, _ in pairs:
            if "start" not in self.state[p]:
                self.state[p]["start"] = p.clone()
        squares = torch.stack([g.square().sum() for _, g in pairs]).sum()
        if "farthest" not in known:
            norm = torch.stack([p.norm() for p, _ in pairs]).norm()
            known["farthest"] = group["first"] * (1 + norm)
            known["squares"] = squares + group["eps"]
        else:
            apart = torch.stack([torch.norm(p - self.state[p]["start"]) for p, _ in pairs]).norm()
            known["farthest"] = torch.maximum(known["farthest"].to(apart), apart)
            known["squares"] = known["squares"].to(squares) + squares
        rate = float(group["lr"] * known["farthest"] / known["squares"].sqrt())
        for p, g in pairs:
            p.add_(g, alpha=-rate)


class LDoG(DoG):
    """The same for each tensor by itself."""

    def _parts(
        self, pairs: Sequence[Pair], group: dict[str, Any]
    ) -> Iterable[tuple[Sequence[Pair], dict[str, Any]]]:
        return [([(p, g)], self.state[p]) for p, g in pairs]


class Mechanic(torch.optim.AdamW):
    """A tuner around AdamW: the weights are start + s·Δ, Δ the sum of Adam's steps, s learned by a bet.

    Cutkosky, Defazio & Mehta, arXiv:2306.00144.
    The bet is won where the gradient points against Δ; s is the sum of six bettors, which forget at the rates
    `FORGET`. Δ is taken from the weights as they are, so that what a wrapper made of a step counts.
    """

    FORGET = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
    FIRST = 1e-8  # s of the start, in the units of the bet
    DECAY = 0.01  # the paper's lambda
    EPS = 1e-8
    weight_starts = ("start",)

    def __init__(self, params: Iterable[nn.Parameter], **options: Any):
        super().__init__(params, **options)
        bettors = torch.zeros(len(self.FORGET))
        names = ("s", "squares", "reward", "largest")
        self.param_groups[0]["tuner"] = {name: bettors.clone() for name in names}
        self.param_groups[0]["tuner"]["largest"] += 1e-6

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        moving = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not moving:
            return
        old = [p.clone() for p in moving]
        super().step()
        tuner = self.param_groups[0]["tuner"]
        for name, bettors in tuner.items():
            tuner[name] = bettors.to(moving[0].device)
        scale = tuner["s"].sum()
        sums = []
        for p, before in zip(moving, old, strict=True):
            start = self.state[p].setdefault("start", before.clone())
            sums.append((before - start) / (scale + self.EPS))
        tuner["s"] = self._bet(tuner, self._product(moving, sums, scale))
        for p, before, delta in zip(moving, old, sums, strict=True):
            delta.add_(p - before)
            p.copy_(self.state[p]["start"] + delta * tuner["s"].sum())

    def _product(self, moving: Sequence[Tensor], sums: Sequence[Tensor], scale: Tensor) -> Tensor:
        """Return the product of Δ with the gradient, to which a pull towards 0 is added."""
        flat = [p.flatten() for p in moving]
        gradients = [p.grad.flatten() for p in moving if p.grad is not None]
        size = torch.sqrt(torch.stack([torch.dot(w, w) for w in flat]).sum())
        steep = torch.sqrt(torch.stack([torch.dot(g, g) for g in gradients]).sum())
        product = torch.zeros_like(scale)
        for w, g, delta in zip(flat, gradients, sums, strict=True):
            pull = self.DECAY * w * scale * steep / (size + self.EPS)
            product = product + torch.dot(delta.flatten(), g + pull)
        return product

    def _bet(self, tuner: dict[str, Tensor], product: Tensor) -> Tensor:
        """Return the bettors' new s after a gradient whose product with Δ is given."""
        forget = torch.tensor(self.FORGET, device=product.device)
        tuner["largest"] = torch.maximum(forget * tuner["largest"], product.abs())
        tuner["squares"] = tuner["squares"] * forget**2 + product.square()
        tuner["reward"] = (tuner["reward"] * forget - tuner["s"] * product).clamp(min=0)
        wealth = tuner["largest"] * self.FIRST / len(forget) + tuner["reward"]
        return wealth / (tuner["squares"].sqrt() + self.EPS)
