"""On what a run's bits depend: on the machine, or under determinism=verity on nothing but its settings.

The maths is in `ebc_lab.verity` (docs/verity.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ebc_lab.config.errors import UserError
from ebc_lab.config.modes import check_exact
from ebc_lab.config.schema import RunConfig
from ebc_lab.verity import Grids, VerityError, check_platform, ops, use_engine
from ebc_lab.verity.engine import engine_name, why_not_native
from ebc_lab.workloads.losses import mean_of

Forward = Callable[[Tensor], Tensor]


def start(run: RunConfig) -> None:
    """Choose the process's engine for a run under verity, and refuse a platform whose bits would be wrong,
    and a run that would be computed otherwise than its name says, whoever built it. Raises UserError.
    """
    if not run.determinism.exact:
        return
    check_exact(run)
    try:
        use_engine(run.determinism.engine)
        check_platform(run.device)
    except (ValueError, VerityError) as error:
        raise UserError(f"determinism=verity: {error}") from None


def engine_in_words(device: str) -> str:
    """Which engine computes on this device now, and why not the faster one: `eager: there is no compiler`."""
    name = engine_name(device)
    if name == "c":
        return name
    why = why_not_native() if device == "cpu" else f"c has no code for {device}"
    return f"{name}: {why}" if why else name


class Exact:
    """Gradients of a run under verity: integer sums over its batch, whose parts go one after another.

    Its state, the grids that the next step's sums lie on, belongs into the checkpoint.
    """

    def __init__(self, run: RunConfig, model: nn.Module):
        self.parts = run.determinism.micro_batches
        self.engine = run.determinism.engine
        self.grids = Grids(model)

    def backward(self, forward: Forward, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Leave the gradients of the mean loss in `p.grad`; inputs and targets (B, T) -> that loss, 0-dim
        float64, nats per token, and the logits (B, T, V), detached.

        Raises VerityError, with no gradient changed, where a value is not finite.
        """
        fits = False
        while not fits:  # twice at most: then the grids fit this batch
            logits, total = self.summed(forward, inputs, targets)
            fits = self.grids.finish(targets.numel())
        mean = mean_of(total, targets.numel())
        return torch.tensor(mean, dtype=torch.float64, device=targets.device), logits

    def summed(self, forward: Forward, inputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """Forward and backward of every part -> all logits, and the sum of all losses in units of 2^-32; the
        gradients' sums are left in `grids`."""
        use_engine(self.engine)  # a run beside this one, in the same process, may have chosen another
        logits = []
        total = 0
        for x, y in zip(inputs.chunk(self.parts), targets.chunk(self.parts), strict=True):
            z = forward(x)
            losses = ops.cross_entropy(z, y, reduction="none")
            torch.autograd.backward(losses, torch.ones_like(losses))
            total += ops.loss_total(losses.detach())
            logits.append(z.detach())
        return (logits[0] if self.parts == 1 else torch.cat(logits)), total

    def state_dict(self) -> dict[str, Any]:
        return self.grids.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises VerityError where the state is damaged, or another model's."""
        self.grids.load_state_dict(state)
