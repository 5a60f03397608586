"""What trainers log of EBC's steps, and of the energy clip's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ebc_lab.ebc import StepStats, energy_budget_clip


class Figures:
    """The numbers of the last step, and of the last audit, which few steps have."""

    def __init__(self) -> None:
        self._stats: StepStats | None = None
        self._applied_kl: float | Tensor | None = None

    def see(self, stats: StepStats | None) -> None:
        """After every step; reads nothing on the host."""
        self._stats = stats
        if stats is not None and stats.applied_kl is not None:
            self._applied_kl = stats.applied_kl

    def values(self) -> dict[str, float | Tensor]:
        """0-dim tensors: `ebc/c`; `ebc/delta` (nats per token) unless the target is infinite; from the first
        audit on, `ebc/applied_kl` (nats per token); beside a radius, `ebc/ruled`, its number in
        `options.RULED`. Empty before the first step."""
        if self._stats is None:
            return {}
        figures = {
            "ebc/c": self._stats.clip_coefficient,
            "ebc/applied_kl": self._applied_kl,
            "ebc/delta": self._stats.delta,
            "ebc/ruled": self._stats.ruled,
        }
        return {name: value for name, value in figures.items() if value is not None}


class EnergyFigures:
    """Energy clips of a model, one for what each optimizer trains, and the numbers of their last step."""

    def __init__(
        self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], options: Mapping[str, Any]
    ):
        held = [{p for g in o.param_groups for p in g["params"]} for o in optimizers]
        trained = [[p for p in model.parameters() if p in of] for of in held]
        self._clips = [energy_budget_clip(model, parameters=of, **options) for of in trained]
        self._worst: list[Tensor | None] = [None] * len(self._clips)

    def clip(self, index: int) -> None:
        """Before the step of the optimizer of that index, its gradients being those of the whole step."""
        shares = self._clips[index]()
        if shares:
            self._worst[index] = torch.stack(list(shares.values())).max()

    def values(self) -> dict[str, Tensor]:
        """0-dim tensors: `energy/worst`, the largest gradient over its budget, as it was before the clip, of
        all layers: above 1 it was limited; `energy/skipped`, the steps so far whose gradients were not
        finite. Empty before the first step."""
        worst = [w for w in self._worst if w is not None]
        if not worst:
            return {}
        skipped = sum(clip.skipped for clip in self._clips)
        return {"energy/worst": torch.stack(worst).max(), "energy/skipped": torch.tensor(float(skipped))}

    def remove(self) -> None:
        for clip in self._clips:
            clip.remove()


def check_alone(processes: int, compiled: bool = False) -> None:
    """Raises ValueError where an energy clip would let processes drift apart, or see nothing."""
    if processes > 1:
        raise ValueError(
            f"the energy clip goes by the outputs of one process, and the weights of {processes} would drift "
            "apart: train in one process."
        )
    if compiled:
        raise ValueError("compiled code may leave out the energy clip's hooks: train without torch_compile.")
