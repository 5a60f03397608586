"""`energy_budget_clip` and `monitor_ebc_ratio`: the limit, and the same ratios measured alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..flat import all_finite
from ..options import ENERGY_ELSEWHERE, check_names, check_option
from .record import RATIO, ActivationRecord, Ratios, Reading, check_ratio, limit, watching

NON_FINITE = ("skip", "zero", "raise")


class EnergyClip:
    """Limit every layer's gradient to `ratio` times the norm of its output, in any training loop.

    `clip = energy_budget_clip(model)`, then `loss.backward(); clip(); optimizer.step()`. Under a GradScaler
    unscale first. `clip.remove()` ends it.

    Args:
        model: any module; its layers are `ActivationRecord`'s.
        ratio: gradient norm over output norm, > 0, or one by layer (those not named are not limited).
        norm: of the output: `rms` or `raw`, see `output_norm`.
        non_finite: what a NaN or infinite gradient does. `skip`: all gradients become None, so that the
            optimizer's step does nothing, and `clip.skipped` counts it. `zero`: all of that layer's gradient
            becomes zero (a gradient whose norm overflows float32 too), the others are limited. `raise`:
            FloatingPointError naming the layers, nothing is changed.
        parameters: those that are limited; all if None.
        foreign: nothing; what ebc-clip has under another name is told.
    Raises:
        ValueError: a ratio that is not > 0 or is no layer's, an unknown norm or policy.
        TypeError: no module, no number, an argument that there is not.
    """

    def __init__(
        self,
        model: nn.Module,
        ratio: float | Mapping[str, float] = RATIO,
        norm: str = "rms",
        non_finite: str = "skip",
        parameters: Sequence[nn.Parameter] | None = None,
        **foreign: Any,
    ):
        check_names("energy_budget_clip", foreign, ("ratio", "norm", "non_finite"), ENERGY_ELSEWHERE)
        check_option("non_finite", non_finite, NON_FINITE)
        of_layers = ratio if isinstance(ratio, Mapping) else {}
        for layer, of_layer in of_layers.items():
            check_ratio(f"ratio of {layer!r}", of_layer)
        if not isinstance(ratio, Mapping):
            check_ratio("ratio", ratio)
        self.record = ActivationRecord(model, norm, parameters)
        self.model = model
        self.parameters = parameters
        self.ratio = ratio
        self.non_finite = non_finite
        self.skipped = 0  # calls that met a non-finite gradient and left none
        unknown = [layer for layer in of_layers if layer not in self.record.layers]
        if unknown:
            self.remove()
            known = ", ".join(self.record.layers)
            raise ValueError(f"ratio names {unknown[0]!r}, which is no layer; those are {known}.")

    @torch.no_grad()
    def __call__(self) -> Ratios:
        """Limit the gradients in place -> {layer: ||gradient|| / (ratio·||output||)} as they were, 0-dim.

        Layers above 1 were limited; those without a gradient, a recorded output or a ratio are left out, and
        the first time an EBCWarning names those without an output. One whose output is not finite has a
        share of 0 or NaN, and is not limited.
        Raises RuntimeError where no layer has a recorded output, or all gradients are those of weights that
        came later; FloatingPointError under `raise`.
        """
        if not self.record.handles:
            return Ratios()
        if self.parameters is None:
            self.record.tell_unwatched()
        reading = self.record.read()
        if reading is None:
            self.record.tell_nothing()
            return Ratios()
        of = self.ratio if isinstance(self.ratio, Mapping) else dict.fromkeys(reading.layers, self.ratio)
        self.record.tell_limitless(reading, of)
        ratios = torch.tensor([of.get(layer, math.inf) for layer in reading.layers], dtype=torch.float64)
        budgets = reading.energies * ratios.to(reading.energies.device)
        limited = [
            known and layer in of for known, layer in zip(reading.recorded, reading.layers, strict=True)
        ]
        measured = reading.over(budgets, limited)

        if self.non_finite == "zero":
            bad = ~reading.norms.isfinite()
            for b, gradients in zip(bad.unbind(), reading.gradients, strict=True):
                for g in gradients.values():
                    g.masked_fill_(b, 0)
        elif not all_finite(reading.all, reading.norms.sum()):
            if self.non_finite == "raise":
                raise FloatingPointError(f"non-finite gradient in {', '.join(_non_finite_layers(reading))}.")
            self.skipped += 1
            for p in self.model.parameters() if self.parameters is None else self.parameters:
                p.grad = None
            return measured
        limit(reading, budgets)
        return measured

    def remove(self) -> None:
        """Take the hooks off the model; from now on a call does nothing."""
        self.record.remove()


class RatioMonitor(Mapping[str, Tensor]):
    """Measure what `energy_budget_clip` would limit: `monitor = monitor_ebc_ratio(model)`; after backward
    `monitor()`, or `monitor["h.17.mlp.c_proj.weight"]` for one layer or parameter of it.

    As a mapping it is what it measures when it is asked. Made after the forward, it goes by what an
    `energy_budget_clip` of the same norm on the same model has seen.

    Args:
        norm: of the output; None: that of the clip on the model, else `rms`.
    """

    def __init__(self, model: nn.Module, norm: str | None = None):
        clip = watching(model) if isinstance(model, nn.Module) else None
        self.record = ActivationRecord(model, norm or (clip.norm if clip else "rms"))
        if clip is not None and clip.norm == self.record.norm:
            self.record.energies.update(clip.energies)

    @torch.no_grad()
    def __call__(self) -> Ratios:
        """{layer: ||gradient|| / ||output||}, 0-dim, of the layers that have both."""
        reading = self.record.read()
        return Ratios() if reading is None else reading.over(reading.energies, reading.recorded)

    def __getitem__(self, name: str) -> Tensor:
        return self()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self())

    def __len__(self) -> int:
        return len(self())

    def __repr__(self) -> str:
        return repr(self())

    def remove(self) -> None:
        """Take the hooks off the model."""
        self.record.remove()


energy_budget_clip = EnergyClip
monitor_ebc_ratio = RatioMonitor


def _non_finite_layers(reading: Reading) -> list[str]:
    of_layers = zip(reading.layers, reading.gradients, strict=True)
    return [
        n or "the model itself" for n, of in of_layers if not all(g.isfinite().all() for g in of.values())
    ]
