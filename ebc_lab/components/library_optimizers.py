"""What `optimizers` makes of `pytorch_optimizer`'s classes; see there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytorch_optimizer import SOAP, GaLore, ScheduleFreeAdamW
from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector


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


class ScheduleFree(ScheduleFreeAdamW):
    """Schedule-Free AdamW: gradients at y = b1·x + (1-b1)·z, steps of z, x the running mean of z.

    The model holds y in training and x after `eval()`; `train()` restores y up to rounding. The library
    divides the gradients by their root mean squares in place, so it is given copies. It also adds 1e-15 to
    the second moments: an eps below 3e-8 has no effect.
    """

    weight_copies = ("z",)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError("the weights are the averages of eval(): call train() before the next step.")
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
