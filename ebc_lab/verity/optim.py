"""Adam in float64 arithmetic with float32 state (Kingma & Ba, arXiv:1412.6980)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .bits import VerityError, all_finite
from .engine import engine_of


class VerityAdam(torch.optim.Optimizer):
    """Adam, each operation rounded once to float64 and the state to float32; decay is decoupled (AdamW).

    A gradient beyond 1e19 makes its second moment infinite, as in torch: that weight stays where it is.

    Raises:
        ValueError: a number out of its range, or a parameter that is not float32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= b < 1 for b in betas)):
            raise ValueError(
                "VerityAdam takes lr, eps and weight_decay >= 0 and betas in [0, 1), not "
                f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}."
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.dtype != torch.float32:
                raise ValueError(f"VerityAdam takes float32 parameters, not {p.dtype}.")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned. VerityError, and no change, where it is damaged or another's."""
        try:
            for group in state_dict["param_groups"]:
                VerityAdam([torch.zeros(0)], *(group[key] for key in ("lr", "betas", "eps", "weight_decay")))
            numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
            weights = [p for group in self.param_groups for p in group["params"]]
            states = [(p, state_dict["state"].get(i)) for i, p in zip(numbers, weights, strict=True)]
            sound = all(state in (None, {}) or _is_state(state, p) for p, state in states)
            if sound:
                super().load_state_dict(state_dict)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            sound = False
        if not sound:
            raise VerityError("the state of the optimizer is damaged, or another model's.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one update. VerityError, and nothing has changed, where there is no gradient at all (a step
        whose sums did not fit their grids), or one that is not finite."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        trained = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not trained:
            raise VerityError(
                "there is no gradient: where Grids.finish() returned False, repeat the backward calls of the "
                "batch and finish again before step()."
            )
        if not all_finite([p.grad for _, p in trained if p.grad is not None]):
            raise VerityError("a gradient is not finite.")
        for group, p in trained:
            self._update(group, p)
        return loss

    def _update(self, group: dict[str, Any], p: torch.nn.Parameter) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p), "powers": (1.0, 1.0)}
        beta1, beta2 = group["betas"]
        powers = state["powers"]
        state["powers"] = first, second = powers[0] * beta1, powers[1] * beta2
        lr = float(group["lr"])
        settings = (lr, beta1, beta2, group["eps"], lr * group["weight_decay"], 1.0 - first, 1.0 - second)
        engine_of(p.device).adam(p, p.grad, state["exp_avg"], state["exp_avg_sq"], *settings)


def _is_state(state: dict[str, Any], p: torch.Tensor) -> bool:
    """Say whether this is what an update leaves: the kernels read as many numbers as the weight has."""
    moments = [state["exp_avg"], state["exp_avg_sq"]]
    powers = state["powers"]
    tensors = all(isinstance(m, torch.Tensor) and m.is_floating_point() for m in moments)
    whole = tensors and all(m.shape == p.shape for m in moments)
    whole = whole and all(m.is_contiguous() or not p.is_contiguous() for m in moments)
    return whole and len(powers) == 2 and all(isinstance(x, float) for x in powers)
