"""Energy budgets: each layer's gradient is limited to a share of the norm of its output at the same step.

For any training loop three lines, and nothing else of this project:

    clip = energy_budget_clip(model)
    ...
    loss.backward(); clip(); optimizer.step()

`monitor_ebc_ratio` measures the same ratios and changes nothing; `EnergyBudget` is the limit as a stabilizer
of the lab. All three use `ActivationRecord`: forward hooks that keep one number for each
layer on the device.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ebc_lab.ebc import EBCWarning, StabilizedOptimizer, StepStats
from ebc_lab.ebc.flat import all_finite
from ebc_lab.ebc.options import check_option
from ebc_lab.ebc.parallel.shards import shared_out
from ebc_lab.ebc.probe import LOW_PRECISION

NORMS = ("raw", "rms")
NON_FINITE = ("skip", "zero", "raise")
RATIO = 0.1  # gradient norm over output norm


def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each tensor, (n,) float64, summed up in float32 at least."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    wide = [t.float() if t.dtype in LOW_PRECISION else t for t in tensors]
    return torch.stack(torch._foreach_norm(wide)).double()


def output_norm(output: Tensor, norm: str) -> Tensor:
    """The size of a layer's output (..., features), 0-dim, float32 or better.

    `raw` is the Frobenius norm of all of it, as published: it grows with the square root of the number of
    tokens, and so does the budget. `rms` is the root of the mean over tokens (every position but the last
    axis) of the squared L2 norm over features, and does not depend on the batch's size.
    """
    wide = torch.float32 if output.dtype in LOW_PRECISION else None
    whole: Tensor = torch.linalg.vector_norm(output, dtype=wide)
    if norm == "raw":
        return whole
    tokens = output.numel() // max(output.shape[-1], 1) if output.ndim else 1
    return whole.div(max(tokens, 1) ** 0.5)


class Reading(NamedTuple):
    """The layers that hold gradients, L of them, in the model's order."""

    layers: list[str]
    gradients: list[list[Tensor]]
    norms: Tensor  # (L,) float64, of each layer's gradients taken together
    energies: Tensor  # (L,) float64, norms of their outputs; inf where none was recorded
    recorded: list[bool]


class ActivationRecord:
    """Forward hooks that keep the norm of every layer's output, to be read together with the gradients.

    A layer is a module with parameters of its own, by its path in `model` (`""` is the model itself): leaf
    modules, and also others that own some directly. A parameter of two modules belongs to the first;
    parametrised weights (weight norm …) belong to the module that they are the weights of. Of the forwards
    with gradients enabled the last one counts; one in evaluation mode, as `from_pretrained` leaves a model,
    only once a backward has gone through it, so that no probe or evaluation overwrites what training left.

    Some modules are never called because the module around them reads their weights (`out_proj` of
    `nn.MultiheadAttention`, q, k and v of this lab's model): for them the output of the nearest enclosing
    module that was called stands in. A layer for which there is none either is not limited.

    Args:
        model: watched until `remove`. A deep copy of it is watched by a copy of this record.
        norm: `raw` or `rms`, see `output_norm`.
        parameters: those that count; all if None.
    """

    def __init__(self, model: nn.Module, norm: str = "rms", parameters: Sequence[nn.Parameter] | None = None):
        check_option("norm", norm, NORMS)
        self.model = model
        self.norm = norm
        self.layers: dict[str, list[nn.Parameter]] = {}
        self.energies: dict[str, Tensor] = {}  # 0-dim, by module
        self.calls = 0  # of watched modules
        self.call_of: dict[str, int] = {}  # the call that gave a module's energy
        self.told: set[str] = set()  # what was said, and is not said again
        unclaimed = {id(p) for p in (model.parameters() if parameters is None else parameters)}
        modules = dict(model.named_modules())
        for name, module in modules.items():
            direct = [p for p in module.parameters(recurse=False) if id(p) in unclaimed]
            unclaimed.difference_update(map(id, direct))
            if direct:
                layer = f".{name}".partition(".parametrizations.")[0][1:]
                self.layers.setdefault(layer, []).extend(direct)
        if any(shared_out(p) for weights in self.layers.values() for p in weights):
            raise ValueError(
                "an energy budget cannot limit weights that fully_shard has shared out, since each process "
                "sees a part of a gradient: train in one process."
            )
        self.inside = {m: [n for n in self.layers if m in _enclosing(n)] for m in modules}
        self.handles = [
            module.register_forward_hook(functools.partial(self._keep, name))
            for name, module in modules.items()
            if name in self.layers or self.inside[name]
        ]

    def _keep(self, name: str, module: nn.Module, _: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        # what is called inside a module has been recorded before it
        open_layers = [name]
        if name not in self.layers:
            open_layers = [n for n in self.inside[name] if n not in self.energies]
        if not any(p.requires_grad for n in open_layers for p in self.layers[n]):
            return
        activations = _first_floating(output)
        if activations is None:
            return
        self.calls += 1
        count = functools.partial(self._count, name, self.calls, output_norm(activations.detach(), self.norm))
        if module.training or self.model.training or activations.grad_fn is None:
            count()
        else:
            activations.register_hook(count)

    def _count(self, name: str, call: int, energy: Tensor, _: Tensor | None = None) -> None:
        if call > self.call_of.get(name, 0):
            self.call_of[name] = call
            self.energies[name] = energy

    def _energy(self, layer: str) -> Tensor | None:
        return next((self.energies[n] for n in (layer, *_enclosing(layer)) if n in self.energies), None)

    def read(self) -> Reading | None:
        """What the layers' gradients and outputs measure now; None if there is no gradient at all."""
        gradients_of = {
            n: [p.grad for p in weights if p.grad is not None] for n, weights in self.layers.items()
        }
        gradients_of = {n: gradients for n, gradients in gradients_of.items() if gradients}
        if not gradients_of:
            return None
        squares = tensor_norms([g for gradients in gradients_of.values() for g in gradients]).square()
        by_layer = torch.split(squares, [len(gradients) for gradients in gradients_of.values()])
        norms = torch.stack([s.sum() for s in by_layer]).sqrt()
        energies = [self._energy(n) for n in gradients_of]
        limitless = torch.full_like(norms[0], torch.inf)
        stacked = torch.stack([limitless if e is None else e.to(norms) for e in energies])
        return Reading(
            list(gradients_of), list(gradients_of.values()), norms, stacked, [e is not None for e in energies]
        )

    def tell_limitless(self, reading: Reading, wanted: Container[str]) -> None:
        """Say, once, which of the `wanted` layers hold a gradient and have no recorded output to limit it by.
        Raises RuntimeError where that is all of them."""
        asked = [n for n in reading.layers if n in wanted]
        seen = dict(zip(reading.layers, reading.recorded, strict=True))
        unseen = [n for n in asked if not seen[n]]
        if unseen and len(unseen) == len(asked):
            raise RuntimeError(
                "no gradient can be limited: since the energy budget was made, no forward of the model has "
                "run with gradients enabled and led to a backward. Make it before the forward whose gradient "
                "it is to limit (and before torch.compile), and run that forward without torch.no_grad()."
            )
        if not unseen:
            return
        names = ", ".join(n or "the model itself" for n in unseen[:3]) + ", …" * (len(unseen) > 3)
        self._warn(
            f"the energy budget does not limit {len(unseen)} of {len(asked)} layers ({names}): no forward of "
            "them, or of a module around them, with gradients enabled was seen: there is no output to go by."
        )

    def tell_unwatched(self) -> None:
        """Say, once, which weights hold a gradient and were no part of the model when this began. Raises
        RuntimeError where no others do."""
        known = {id(p) for weights in self.layers.values() for p in weights}
        held = {name: p for name, p in self.model.named_parameters() if p.grad is not None}
        later = [name for name, p in held.items() if id(p) not in known]
        if not later:
            return
        what = f"{len(later)} weight(s) ({', '.join(later[:3])}{', …' * (len(later) > 3)})"
        message = (
            f"{what} came into the model after the energy budget was made, and are not limited: make it "
            "anew, after the last change of the model."
        )
        if len(later) == len(held):
            raise RuntimeError(message)
        self._warn(message)

    def _warn(self, message: str) -> None:
        if message not in self.told:
            self.told.add(message)
            warnings.warn(message, EBCWarning, stacklevel=5)

    def remove(self) -> None:
        """Stop watching."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def limit(reading: Reading, budgets: Tensor) -> Tensor:
    """Scale each layer's gradients in place to a norm of at most its budget -> the factors, (L,) float64."""
    factors = torch.where(reading.norms > budgets, budgets / reading.norms, 1.0)
    each = [f for f, gradients in zip(factors.unbind(), reading.gradients, strict=True) for _ in gradients]
    torch._foreach_mul_([g for gradients in reading.gradients for g in gradients], each)
    return factors


class EnergyBudget(StabilizedOptimizer):
    """At each step, each layer's joint gradient norm is at most `strength` times the norm of its output.

    Gradients and outputs share no unit: their ratio depends on the loss's scale. A layer whose output is
    exactly zero gets no gradient at all, so that a layer initialised to zero stays there. Layers as in
    `ActivationRecord`.

    Args:
        strength: gradient norm over output norm, > 0; None: 0.1.
        norm: of the output: `rms`, or `raw` as published, which grows with the square root of the number of
            tokens.
        common: see `StabilizedOptimizer`.
    Raises:
        ValueError: strength <= 0 or an unknown norm.
    """

    default = RATIO
    takes_arithmetic = False
    takes_shards = False

    def __init__(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        strength: float | None = None,
        norm: str = "rms",
        **common: Any,
    ):
        self.strength = self.default if strength is None else strength
        _check_ratio("strength", self.strength)
        super().__init__(model, optimizers, **common)
        self.record = ActivationRecord(model, norm, self.weights)

    def _weights_changed(self) -> None:
        raise ValueError("an energy budget watches the layers trained at its start: make a new one.")

    def _limit_gradients(self, stats: StepStats, gradients: list[Tensor]) -> None:
        reading = self.record.read()
        if reading is None:
            stats.gradient_scale = torch.ones_like(stats.clip_coefficient)
            return
        self.record.tell_limitless(reading, reading.layers)
        factors = limit(reading, self.strength * reading.energies)
        total = torch.linalg.vector_norm(reading.norms)
        limited = torch.linalg.vector_norm(factors * reading.norms)
        stats.gradient_scale = torch.where(total > 0, limited / total, 1.0)


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
    Raises:
        ValueError: a ratio that is not > 0 or is no layer's, an unknown norm or policy.
    """

    def __init__(
        self,
        model: nn.Module,
        ratio: float | Mapping[str, float] = RATIO,
        norm: str = "rms",
        non_finite: str = "skip",
    ):
        check_option("non_finite", non_finite, NON_FINITE)
        self.record = ActivationRecord(model, norm)
        self.model = model
        self.ratio = ratio
        self.non_finite = non_finite
        self.skipped = 0  # calls that met a non-finite gradient and left none
        try:
            self._check()
        except ValueError:
            self.remove()
            raise

    def _check(self) -> None:
        if not isinstance(self.ratio, Mapping):
            _check_ratio("ratio", self.ratio)
            return
        for layer, ratio in self.ratio.items():
            _check_ratio(f"ratio of {layer!r}", ratio)
            if layer not in self.record.layers:
                known = ", ".join(self.record.layers)
                raise ValueError(f"ratio names {layer!r}, which is no layer; those are {known}.")

    @torch.no_grad()
    def __call__(self) -> dict[str, Tensor]:
        """Limit the gradients in place -> {layer: ||gradient|| / (ratio·||output||)} as they were, 0-dim.

        Layers above 1 were limited; those without a gradient, a recorded output or a ratio are left out, and
        the first time an EBCWarning names those without an output. One whose output is not finite has a
        share of 0 or NaN, and is not limited.
        Raises RuntimeError where no layer has a recorded output, or all gradients are those of weights that
        came later; FloatingPointError under `raise`.
        """
        if not self.record.handles:
            return {}
        self.record.tell_unwatched()
        reading = self.record.read()
        if reading is None:
            return {}
        of = self.ratio if isinstance(self.ratio, Mapping) else dict.fromkeys(reading.layers, self.ratio)
        self.record.tell_limitless(reading, of)
        ratios = torch.tensor([of.get(layer, math.inf) for layer in reading.layers], dtype=torch.float64)
        budgets = reading.energies * ratios.to(reading.energies.device)
        limited = [
            known and layer in of for known, layer in zip(reading.recorded, reading.layers, strict=True)
        ]
        measured = _shares(reading, budgets, limited)

        if self.non_finite == "zero":
            bad = ~reading.norms.isfinite()
            for b, gradients in zip(bad.unbind(), reading.gradients, strict=True):
                for g in gradients:
                    g.masked_fill_(b, 0)
        elif not all_finite([g for gradients in reading.gradients for g in gradients], reading.norms.sum()):
            if self.non_finite == "raise":
                raise FloatingPointError(f"non-finite gradient in {', '.join(_non_finite_layers(reading))}.")
            self.skipped += 1
            self.model.zero_grad(set_to_none=True)
            return measured
        limit(reading, budgets)
        return measured

    def remove(self) -> None:
        """Take the hooks off the model; from now on a call does nothing."""
        self.record.remove()


class RatioMonitor:
    """Measure what `energy_budget_clip` would limit: `monitor = monitor_ebc_ratio(model)`; after backward
    `monitor()`.
    """

    def __init__(self, model: nn.Module, norm: str = "rms"):
        self.record = ActivationRecord(model, norm)

    @torch.no_grad()
    def __call__(self) -> dict[str, Tensor]:
        """{layer: ||gradient|| / ||output||}, 0-dim, of the layers that have both."""
        reading = self.record.read()
        return {} if reading is None else _shares(reading, reading.energies, reading.recorded)

    def remove(self) -> None:
        """Take the hooks off the model."""
        self.record.remove()


energy_budget_clip = EnergyClip
monitor_ebc_ratio = RatioMonitor


def _shares(reading: Reading, budgets: Tensor, known: list[bool]) -> dict[str, Tensor]:
    """{layer: gradient norm over budget}, 0-dim, of the layers `known`; 0 without a gradient."""
    shares = torch.where(reading.norms == 0, 0.0, reading.norms / budgets).unbind()
    return {layer: s for layer, s, use in zip(reading.layers, shares, known, strict=True) if use}


def _enclosing(name: str) -> list[str]:
    """The paths of the modules around one, nearest first: `a.b.c` -> `a.b`, `a`, ``."""
    parts = name.split(".") if name else []
    return [".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)]


def _first_floating(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    values: Iterable[Any] = ()
    if isinstance(output, Mapping):
        values = output.values()
    elif isinstance(output, tuple | list):
        values = output
    return next((t for t in map(_first_floating, values) if t is not None), None)


def _non_finite_layers(reading: Reading) -> list[str]:
    bad = [not all(bool(g.isfinite().all()) for g in gradients) for gradients in reading.gradients]
    return [n or "the model itself" for n, is_bad in zip(reading.layers, bad, strict=True) if is_bad]


def _check_ratio(name: str, ratio: float) -> None:
    if not ratio > 0:
        raise ValueError(f"{name} must be > 0, the gradient's norm over the output's, not {ratio}.")
