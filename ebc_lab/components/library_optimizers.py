"""What `components.optimizer` makes of `pytorch_optimizer`'s classes; see there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from pytorch_optimizer import (
    ADOPT,
    SOAP,
    DAdaptAdam,
    GaLore,
    Lion,
    MuonClip,
    NorMuon,
    Prodigy,
    ScheduleFreeAdamW,
)
from pytorch_optimizer.optimizer.scion import LMONorm
from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector
from torch import Tensor, nn
from torch.optim import Optimizer

from .rival_optimizers import ShareOfRate

SQUARES_EPS = 1e-15  # what the library adds to second moments


class OnCopies(Optimizer):
    """An optimizer that would write into its gradients: it is given copies of them."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        gradients = [
            (p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        try:
            for p, gradient in gradients:
                p.grad = gradient.clone()
            super().step()
        finally:
            for p, gradient in gradients:
                p.grad = gradient


class OneRate(Optimizer):
    """An optimizer that takes the rate of its first group for all: groups at rate 0 are left out.

    The authors' own implementations leave those out too.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if group["lr"] > 0]
            if self.param_groups:
                super().step()
        finally:
            self.param_groups = groups


class PromptSOAP(SOAP):
    """SOAP that moves the weights at its first step too.

    The library uses the first gradient for the eigenbases alone, and a step that proposes nothing has no KL
    to measure. Here the same gradient is then applied in the bases made from it. What the library added to
    the preconditioners while it made the bases is removed, because `step` adds the same gradient again.
    """

    def init_group(self, group: dict[str, Any], **kwargs: Any) -> None:
        fresh = [p for p in group["params"] if p.grad is not None and not self.state.get(p)]
        super().init_group(group, **kwargs)
        group["step"] = max(group["step"], 1)  # the library applies nothing while this is 0
        for p in fresh:
            for gram in self.state[p]["GG"]:
                if len(gram):  # an empty list means a side without preconditioner
                    gram.zero_()


class ScheduleFree(OnCopies, ScheduleFreeAdamW):
    """Schedule-Free AdamW: gradients at y = b1·x + (1-b1)·z, steps of z, x the running mean of z.
    `weight_decay` acts at y. Defazio et al., arXiv:2405.15682.

    The model holds y in training and x after `eval()`; `train()` restores y up to rounding. The library
    divides the gradients by their root mean squares in place. It also adds 1e-15 to the second moments: an
    eps below 3e-8 has no effect.

    With a learning rate on the device it counts there, too, and heeds `found_inf`, so that a CUDA graph can
    hold its step: where that is 1, nothing changes.
    """

    weight_copies = ("z",)
    counted: ClassVar[dict[str, float]] = {"step": 0, "weight_sum": 0.0, "lr_max": -1.0}  # of a group

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError("the weights are the averages of eval(): call train() before the next step.")
        if not isinstance(self.param_groups[0]["lr"], Tensor):
            super().step()
            return
        for group in self.param_groups:
            self._step_on_device(group)

    def _step_on_device(self, group: dict[str, Any]) -> None:
        self.init_group(group)
        params = [p for p in group["params"] if p.grad is not None]
        rate: Tensor = group["lr"].double()
        for key in self.counted:
            group[key] = torch.as_tensor(group[key], dtype=torch.float64).to(rate.device)
        step, weight_sum, lr_max = (group[key] for key in self.counted)
        bad = getattr(self, "found_inf", None)
        taken = torch.ones_like(rate) if bad is None else 1 - bad.double()
        beta1, beta2 = group["betas"]

        # the share of z in the mean
        step.add_(taken)
        lr_max.copy_(torch.where(taken > 0, torch.maximum(lr_max, rate), lr_max))
        weight = taken * step ** group["r"] * lr_max.clamp(min=0) ** group["weight_lr_power"]
        weight_sum.add_(weight)
        share = torch.where(weight_sum > 0, weight / weight_sum, 0.0)

        gradients = [torch.where(taken > 0, p.grad, 0.0) for p in params]
        squares = [self.state[p]["exp_avg_sq"] for p in params]
        keep = torch.where(taken > 0, beta2, 1.0)
        new = torch._foreach_mul(gradients, gradients)
        torch._foreach_mul_(new, 1 - keep)
        torch._foreach_mul_(squares, keep)
        torch._foreach_add_(squares, new)
        sizes = torch._foreach_div(squares, torch.where(step > 0, 1 - beta2**step, 1.0))
        torch._foreach_add_(sizes, SQUARES_EPS)
        torch._foreach_sqrt_(sizes)
        torch._foreach_add_(sizes, group["eps"])
        torch._foreach_div_(gradients, sizes)
        if group["weight_decay"]:
            torch._foreach_add_(gradients, torch._foreach_mul(params, group["weight_decay"]))

        rate = rate * taken
        zs = [self.state[p]["z"] for p in params]
        for p, z in zip(params, zs, strict=True):
            p.lerp_(z, share.to(p.dtype))
        torch._foreach_add_(params, torch._foreach_mul(gradients, rate * (beta1 * (1 - share) - 1)))
        torch._foreach_sub_(zs, torch._foreach_mul(gradients, rate))


class TensorRateLion(Lion):
    """Lion that takes a learning rate on the device and heeds `found_inf`, so that a CUDA graph can hold its
    step: where that is 1, nothing changes."""

    def _step_foreach(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor]
    ) -> None:
        lr = group["lr"]
        if not isinstance(lr, Tensor):
            super()._step_foreach(group, params, grads, exp_avgs)
            return
        bad = getattr(self, "found_inf", None)
        if bad is not None:
            lr = lr * (1 - bad)
            # a momentum that follows itself stays
            grads = [torch.where(bad > 0, m, g) for m, g in zip(exp_avgs, grads, strict=True)]
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        beta1, beta2 = group["betas"]
        updates = torch._foreach_lerp(exp_avgs, grads, weight=1 - beta1)
        torch._foreach_sign_(updates)
        torch._foreach_mul_(updates, -lr)
        torch._foreach_lerp_(exp_avgs, grads, weight=1 - beta2)
        torch._foreach_add_(params, updates)


PROJECTOR = ("ortho_matrix", "last_svd_step")  # what it carries from step to step


class PlainGaLore(GaLore):
    """GaLore whose state_dict holds tensors and numbers only: the library keeps its projectors as objects."""

    def state_dict(self) -> dict[str, Any]:
        exported = super().state_dict()
        plain = {i: dict(state) for i, state in exported["state"].items()}
        for state in plain.values():
            if "projector" in state:
                state["projector"] = {key: getattr(state["projector"], key) for key in PROJECTOR}
        return {**exported, "state": plain}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for p in group["params"]:
                saved = self.state[p].get("projector")
                if saved is not None:
                    self.state[p]["projector"] = _projector(group, saved)


def _projector(group: dict[str, Any], saved: dict[str, Any]) -> GaLoreProjector:
    projector = GaLoreProjector(
        rank=group["rank"],
        update_proj_gap=group["update_proj_gap"],
        scale=group["scale"],
        projection_type=group["projection_type"],
    )
    for key in PROJECTOR:
        setattr(projector, key, saved[key])
    return projector


class PlainProdigy(OneRate, Prodigy):
    """Prodigy, which leaves out groups at rate 0; its state holds the weights of the start."""

    weight_starts = ("p0",)


class PlainDAdaptAdam(OneRate, DAdaptAdam):
    """D-Adaptation's Adam at lr·d, d a lower bound of the distance to the solution; no groups at rate 0.

    Defazio & Mishchenko, arXiv:2301.07733. A gradient enters the momentum at the rate of its step.
    """

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state; torch leaves tensors in the groups where the state has them."""
        super().load_state_dict(state)
        for group in self.param_groups:
            device = group["params"][0].device
            moved = {key: value.to(device) for key, value in group.items() if isinstance(value, Tensor)}
            group.update(moved)


class PromptADOPT(ADOPT):
    """ADOPT, whose gradients are divided by the moments before them, and which moves at its first step too.

    Taniguchi et al., arXiv:2411.02853. In the paper the first gradient gives the second moments alone, and a
    step that proposes nothing has no KL to measure. Here that gradient is applied as well, over the moments
    made from it. So this step t is the paper's step t, with g0 = g1, and its clip is the fourth root of t.
    """

    def __init__(self, params: Iterable[nn.Parameter], **options: Any):
        super().__init__(params, **options, clip_lambda=lambda step: (step - 1) ** 0.25)

    def init_group(self, group: dict[str, Any], **kwargs: Any) -> None:
        fresh = [p for p in group["params"] if p.grad is not None and not self.state.get(p)]
        super().init_group(group, **kwargs)
        group["step"] = max(group["step"], 1)  # at its step 1 the library makes the moments and nothing else
        for p in fresh:
            self.state[p]["exp_avg_sq"].addcmul_(p.grad, p.grad)


class PlainNorMuon(OnCopies, NorMuon):
    """NorMuon, which writes its momentum into the gradients it is given."""


class LargestLogits:
    """The largest logit of each head of attention in the training forwards since `taken` was last called."""

    def __init__(self, blocks: Mapping[str, nn.Module]):
        """`blocks`: those that have `largest_logits`, which is given what their forward is given."""
        self.seen: dict[str, Tensor] = {}
        for name, block in blocks.items():
            block.register_forward_pre_hook(functools.partial(self._look, name))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _look(self, name: str, block: nn.Module, given: tuple[Any, ...]) -> None:
        if not (block.training and torch.is_grad_enabled()):
            return
        with torch.no_grad():
            now = block.largest_logits(*given)  # type: ignore[operator]
        self.seen[name] = torch.maximum(self.seen[name], now) if name in self.seen else now

    def taken(self) -> dict[str, Tensor]:
        """Return block -> (heads,), and begin anew."""
        seen, self.seen = self.seen, {}
        return seen


class WatchedMuonClip(MuonClip):
    """MuonClip of the logits that it sees by itself; it leaves matrices alone that are not trained."""

    watched: LargestLogits

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        frozen = {
            group.get("attention_name")
            for group in self.param_groups
            if not all(p.requires_grad for p in group["params"])
        }
        logits = {name: seen for name, seen in self.watched.taken().items() if name not in frozen}
        MuonClip.step(self, closure, attention_max_logits=logits)


class PartialLion(ShareOfRate, Lion):
    """Lion at a share of the rate of its group."""


SCION_NORMS: dict[str, dict[str, Any]] = {  # plain numbers, which a checkpoint may hold
    "spectral": {"norm_type": int(LMONorm.SPECTRAL)},
    "sign": {"norm_type": int(LMONorm.SIGN), "scale": 60.0},
    "rms": {"norm_type": int(LMONorm.BIAS)},
}
