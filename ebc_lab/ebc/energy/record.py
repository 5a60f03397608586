"""What the energy budget goes by: each layer's gradients, and the norm of its output at the same step."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..given.checks import EBCWarning, listed, tensors_in
from ..options import check_number, check_option, near
from ..parallel.shards import shared_out
from ..probe import LOW_PRECISION

NORMS = ("raw", "rms")
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
    gradients: list[dict[str, Tensor]]  # of each layer, by the parameter's name
    each: Tensor  # (P,) float64, the norms of these, layer by layer
    norms: Tensor  # (L,) float64, of each layer's gradients taken together
    energies: Tensor  # (L,) float64, norms of their outputs; inf where none was recorded
    recorded: list[bool]

    @property
    def all(self) -> list[Tensor]:
        """Every gradient, layer by layer."""
        return [g for gradients in self.gradients for g in gradients.values()]

    def over(self, budgets: Tensor, known: list[bool]) -> Ratios:
        """The gradients' norms over the (L,) `budgets`, of the layers `known`; 0 for a gradient of zero."""
        holds = [len(gradients) for gradients in self.gradients]
        of_each = torch.cat([budget.expand(n) for budget, n in zip(budgets, holds, strict=True)])
        whole = torch.where(self.norms == 0, 0.0, self.norms / budgets).unbind()
        each = torch.where(self.each == 0, 0.0, self.each / of_each).split(holds)
        ratios = Ratios()
        for i, layer in enumerate(self.layers):
            if known[i]:
                ratios[layer] = whole[i]
                ratios.parameters.update(zip(self.gradients[i], each[i].unbind(), strict=True))
        return ratios


class Ratios(dict[str, Tensor]):
    """What is measured of each layer, 0-dim, by the layer's name; a parameter's name is answered too.

    A layer's gradient is that of all its parameters taken together; a parameter's is its own alone, over the
    same output of its layer, so that it is at most the layer's. Iterating and printing go by layer.
    """

    def __init__(self, *layers: Any):
        super().__init__(*layers)
        self.parameters: dict[str, Tensor] = {}

    def __missing__(self, name: str) -> Tensor:
        if name in self.parameters:
            return self.parameters[name]
        if not self:
            raise KeyError(f"{name!r} has no ratio yet: make the clip or the monitor before the forward.")
        raise KeyError(
            f"{name!r} is no layer, and no parameter, with a gradient and a recorded output"
            f"{near(name, [*self, *self.parameters])}."
        )

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.parameters

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self:
            return default
        return self[name]


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
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"an energy budget takes the model, which it watches, not a {type(model).__name__}: "
                "energy_budget_clip(model)."
            )
        check_option("norm", norm, NORMS)
        self.model = model
        self.norm = norm
        self.layers: dict[str, dict[str, nn.Parameter]] = {}  # the parameters by their names in `model`
        self.energies: dict[str, Tensor] = {}  # 0-dim, by module
        self.calls = 0  # of watched modules
        self.call_of: dict[str, int] = {}  # the call that gave a module's energy
        self.told: set[str] = set()  # what was said, and is not said again
        unclaimed = {id(p) for p in (model.parameters() if parameters is None else parameters)}
        modules = dict(model.named_modules())
        for name, module in modules.items():
            own = module.named_parameters(name, recurse=False)
            direct = {n: p for n, p in own if id(p) in unclaimed}
            unclaimed.difference_update(map(id, direct.values()))
            if direct:
                layer = f".{name}".partition(".parametrizations.")[0][1:]
                self.layers.setdefault(layer, {}).update(direct)
        if any(map(shared_out, self.weights())):
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

    def weights(self) -> list[nn.Parameter]:
        """Those that are watched, in the order of the layers."""
        return [p for weights in self.layers.values() for p in weights.values()]

    def _keep(self, name: str, module: nn.Module, _: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        # what is called inside a module has been recorded before it
        inside = (n for n in self.inside[name] if n not in self.energies)
        goes_by_it = [name] if name in self.layers else inside
        activations = next((t for t in tensors_in(output) if t.is_floating_point()), None)
        trained = any(p.requires_grad for n in goes_by_it for p in self.layers[n].values())
        if activations is None or not trained:
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
        gradients_of = {}
        for layer, weights in self.layers.items():
            gradients = {n: p.grad for n, p in weights.items() if p.grad is not None}
            if gradients:
                gradients_of[layer] = gradients
        if not gradients_of:
            return None
        layers, held = list(gradients_of), list(gradients_of.values())
        each = tensor_norms([g for gradients in held for g in gradients.values()])
        by_layer = torch.split(each.square(), list(map(len, held)))
        norms = torch.stack([squares.sum() for squares in by_layer]).sqrt()
        found = [self._energy(n) for n in layers]
        limitless = torch.full_like(norms[0], torch.inf)
        energies = torch.stack([limitless if e is None else e.to(norms) for e in found])
        return Reading(layers, held, each, norms, energies, [e is not None for e in found])

    def tell_limitless(self, reading: Reading, wanted: Container[str]) -> None:
        """Say, once, which of the `wanted` layers hold a gradient and have no recorded output to limit it by.
        Raises RuntimeError where that is all of them."""
        asked = {n: seen for n, seen in zip(reading.layers, reading.recorded, strict=True) if n in wanted}
        unseen = [n for n, seen in asked.items() if not seen]
        if unseen and len(unseen) == len(asked):
            raise RuntimeError(
                "no gradient can be limited: since the energy budget was made, no forward of the model has "
                "run with gradients enabled and led to a backward. Make it before the forward whose gradient "
                "it is to limit (and before torch.compile), and run that forward without torch.no_grad()."
            )
        if not unseen:
            return
        names = listed([n or "the model itself" for n in unseen])
        self._warn(
            f"the energy budget does not limit {len(unseen)} of {len(asked)} layers ({names}): no forward of "
            "them, or of a module around them, with gradients enabled was seen: there is no output to go by."
        )

    def tell_unwatched(self) -> None:
        """Say, once, which weights hold a gradient and were no part of the model when this began. Raises
        RuntimeError where no others do."""
        known = set(map(id, self.weights()))
        held = {name: p for name, p in self.model.named_parameters() if p.grad is not None}
        later = [name for name, p in held.items() if id(p) not in known]
        if not later:
            return
        message = (
            f"{len(later)} weight(s) ({listed(later)}) came into the model after the energy budget was made, "
            "and are not limited: make it anew, after the last change of the model."
        )
        if len(later) == len(held):
            raise RuntimeError(message)
        self._warn(message)

    def tell_nothing(self) -> None:
        """Say, once, that there was no gradient to limit."""
        self._warn(
            "the energy budget found no gradient to limit: call it between loss.backward() and "
            "optimizer.step(), on the model that is trained, and without hooks that move weights in backward."
        )

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
    torch._foreach_mul_(reading.all, each)
    return factors


def watching(model: nn.Module) -> ActivationRecord | None:
    """The record whose hooks are on the model, or on most of its modules; None if there is none."""
    for module in model.modules():
        for hook in module._forward_hooks.values():
            record = getattr(getattr(hook, "func", None), "__self__", None)
            if isinstance(record, ActivationRecord) and record.model is model:
                return record
    return None


def check_ratio(name: str, ratio: Any) -> None:
    """Raises TypeError where that is no number, ValueError where it is not > 0."""
    if ratio is None:
        raise TypeError(f"{name}=None is no limit: leave it out for the default, {RATIO}.")
    check_number(name, ratio, RATIO)
    if not ratio > 0:
        raise ValueError(f"{name} must be > 0, the gradient's norm over the output's, not {ratio}.")


def _enclosing(name: str) -> list[str]:
    """The paths of the modules around one, nearest first: `a.b.c` -> `a.b`, `a`, ``."""
    parts = name.split(".") if name else []
    return [".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)]
