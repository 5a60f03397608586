"""The optimizers that propose updates: which can be limited, and the weights that they train now.

Which weights those are is asked at every step: a group may be added or a layer unfrozen in the middle of
training, and FSDP replaces the parameters of a model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..parallel.shards import local
from . import checks

COPIED = 3  # steps whose gradients are copied in any case

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def as_list(optimizers: Optimizers) -> list[torch.optim.Optimizer]:
    """The base optimizers. Raises ValueError for one that cannot be limited.

    An optimizer that another library has wrapped and that shows it as `.optimizer` (Accelerate, Lightning)
    stands for the wrapped one.
    """
    bases: list[Any] = list(optimizers) if isinstance(optimizers, Sequence) else [optimizers]
    if not bases:
        raise ValueError("no optimizer was given.")
    for i, base in enumerate(bases):
        if type(base).__module__.partition(".")[0] in ("accelerate", "lightning", "pytorch_lightning"):
            bases[i] = base = base.optimizer
        if not isinstance(base, torch.optim.Optimizer):
            raise TypeError(f"{type(base).__name__} is no torch.optim.Optimizer.")
        if isinstance(base, torch.optim.LBFGS):
            raise ValueError("LBFGS moves the weights several times in a step: it cannot be limited.")
        if isinstance(base, torch.optim.SparseAdam):
            raise ValueError("SparseAdam takes sparse gradients, which cannot be limited: use Adam.")
        name = type(base).__name__
        if hasattr(base, "fused_backward"):
            raise ValueError(f"{name} moves the weights inside backward, where nothing can limit it.")
        if hasattr(base, "second_step") and hasattr(base, "base_optimizer"):
            raise ValueError(f"{name} moves the weights twice in a step: `attach` to its base_optimizer.")
    return bases


def check_fused(base: torch.optim.Optimizer) -> None:
    """Raise ValueError where a loaded state has tensors of another form than the weights, and the optimizer
    is fused: that reads and writes as many numbers as a weight has, wherever they lie."""
    for group in base.param_groups:
        for p in group["params"] if group.get("fused") else ():
            for name, value in base.state[p].items() if p in base.state else ():
                whole = isinstance(value, Tensor) and value.shape == p.shape
                whole = whole and (value.is_contiguous() or not p.is_contiguous())
                if name != "step" and value is not None and not whole:
                    raise ValueError(f"{name} is no tensor of its weight's form")


def state_keeper(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer whose state dict has torch's hooks: this one, or one that it wraps and saves, too.

    Raises ValueError where its step or its state dict has none.
    """
    keeper = optimizer
    while not hasattr(keeper, "_optimizer_state_dict_post_hooks") and hasattr(keeper, "optimizer"):
        keeper = keeper.optimizer
    needed = (optimizer, "_optimizer_step_pre_hooks"), (keeper, "_optimizer_state_dict_post_hooks")
    if not all(hasattr(o, name) for o, name in needed) or not hasattr(type(optimizer).step, "hooked"):
        raise ValueError(
            f"{type(optimizer).__name__} was made without torch.optim.Optimizer's hooks: attach to the "
            "optimizer that it wraps."
        )
    return keeper


def weight_copies(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The keys under which `optimizer.state[p]` holds copies of the weight p, which move with it.

    An optimizer names them in its attribute `weight_copies`; of those of other libraries the Schedule-Free
    ones are known: y is trained, x evaluated, and z kept.
    """
    return _known_copies(optimizer) or ()


def _known_copies(optimizer: torch.optim.Optimizer) -> tuple[str, ...] | None:
    named = getattr(optimizer, "weight_copies", None)
    if named is not None:
        return tuple(named)
    for cls in type(optimizer).__mro__:
        library = cls.__module__.partition(".")[0]
        if library == "schedulefree" or cls.__name__ == "ProdigyPlusScheduleFree":
            return ("x", "y", "z") if cls.__name__.endswith("Reference") else ("z",)
        if library == "pytorch_optimizer" and cls.__name__.startswith("ScheduleFree"):
            return ("z",)
        if library == "pytorch_optimizer" and cls.__name__ == "SPlus":  # evaluates an average of the weights
            return ()
        if library == "heavyball" and cls.__name__ in ("ScheduleFree", "MSAM"):
            return (optimizer._find_val_name("z"),)  # type: ignore[attr-defined]
    return None


def tell_of_copies(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Warn of an optimizer that evaluates other weights than it trains and does not say where they are."""
    for base in optimizers:
        swaps = all(callable(getattr(base, name, None)) for name in ("train", "eval"))
        if swaps and not isinstance(base, nn.Module) and _known_copies(base) is None:
            message = (
                f"{type(base).__name__} has train() and eval(): it seems to evaluate other weights than it "
                "trains, and EBC limits those that it trains. Name the keys under which optimizer.state[p] "
                "holds copies of a weight p, as optimizer.weight_copies = ('z',), and they are scaled with "
                "it; weight_copies = () says that there are none."
            )
            warnings.warn(message, checks.EBCWarning, stacklevel=2)


def is_as_loaded(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it has a state, of some steps, that no step has written to: it was loaded.

    Loading and copying leave a tensor at version 0 or 1, and each step in place adds to that.
    """
    states = [state for state in optimizer.state.values() if isinstance(state, dict)]
    counts = [holder["step"] for holder in (*states, *optimizer.param_groups) if "step" in holder]
    stepped = any(float(count) > 1 for count in counts) or any("momentum_buffer" in s for s in states)
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return stepped and len(tensors) > 0 and max(map(_version, tensors)) <= 1


def _refuse_strangers(strangers: Sequence[nn.Parameter], held: int) -> None:
    """Raises ValueError where optimizers hold parameters that are not the model's, of `held` ones in all."""
    if not strangers:
        return
    if len(strangers) == held:
        raise ValueError(
            "an optimizer holds a parameter that is not the model's: make it from the model's parameters, "
            "after anything that replaces them, as fully_shard does."
        )
    shapes = checks.listed(["without a shape yet" if is_lazy(p) else str(tuple(p.shape)) for p in strangers])
    raise ValueError(
        f"an optimizer holds a parameter that is not the model's: {shapes}. If it is of a loss with weights "
        "of its own, put model and loss into one module whose forward returns the logits, and attach to it; "
        "or give it a second optimizer, to which EBC is not attached and whose steps it does not limit. A "
        "module inside the one that is trained needs an optimizer of its own, too: one for its parameters, "
        "one for the rest."
    )


def _refuse_shared_memory(weights: dict[str, nn.Parameter]) -> None:
    """Raises ValueError where two parameters share memory, which c would scale twice."""
    spans = []
    for i, p in enumerate(weights.values()):
        t = local(p).detach()
        plain = t.layout is torch.strided and not is_traceable_wrapper_subclass(t)
        if plain and t.numel() and t.data_ptr():
            spans.append((t.data_ptr(), t.data_ptr() + _span(t) * t.element_size(), i, t))
    spans.sort(key=lambda span: span[:2])
    open_spans: list[tuple[int, int, int, Tensor]] = []
    for start, end, i, t in spans:
        open_spans = [span for span in open_spans if span[1] > start]
        for _, _, other, u in open_spans:
            # the columns of a matrix lie between each other and share nothing
            dense = _span(t) == t.numel() and _span(u) == u.numel()
            if dense or torch.isin(_places(t), _places(u)).any():
                first, second = (list(weights)[k] for k in sorted((i, other)))
                raise ValueError(
                    f"{first} and {second} are two parameters on one memory, which each of them moves: "
                    f"make them one, model.{second} = model.{first} in the place of assigning .data, before "
                    "the optimizer is made."
                )
        open_spans.append((start, end, i, t))


def _span(t: Tensor) -> int:
    """Elements of memory from its first to its last; as many as it has where it fills that memory."""
    return 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))


def _places(t: Tensor) -> Tensor:
    """The address of each element."""
    elements = torch.arange(_span(t)).as_strided(t.shape, t.stride())
    return t.data_ptr() + t.element_size() * elements.flatten()


def parameters_of(bases: Sequence[torch.optim.Optimizer]) -> Iterator[nn.Parameter]:
    """The parameters of the optimizers, in their order."""
    for base in bases:
        for group in base.param_groups:
            yield from group["params"]


def moving(bases: Sequence[torch.optim.Optimizer]) -> list[int]:
    """The ids of the parameters that a step may move, in the optimizers' order."""
    return [id(p) for p in parameters_of(bases) if p.requires_grad or p.grad is not None]


def trained(model: nn.Module, bases: Sequence[torch.optim.Optimizer]) -> tuple[list[str], list[nn.Parameter]]:
    """The parameters that the optimizers move, in the model's order: names and parameters.

    Raises ValueError for one that is not the model's, belongs to two optimizers, has no shape yet, shares
    memory with another one or has sparse gradients, and where there is none.
    """
    of_model = {id(p) for p in model.parameters()}
    given = list(parameters_of(bases))
    if len({id(p) for p in given}) < len(given):
        raise ValueError("a parameter belongs to two of the optimizers.")
    _refuse_strangers([p for p in given if id(p) not in of_model], len(given))
    known = set(moving(bases))
    weights = {n: p for n, p in model.named_parameters() if id(p) in known}
    if not weights:
        raise ValueError("the optimizers hold no trainable parameter.")
    lazy = [name for name, p in weights.items() if is_lazy(p)]
    if lazy:
        raise ValueError(
            f"{checks.listed(lazy)} has no shape before the first forward: call the model once on a batch, "
            "make the optimizer then, and attach after that."
        )
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) is True and id(getattr(module, "weight", None)) in known:
            raise ValueError(f"{name or type(module).__name__} has sparse gradients: set sparse=False.")
    _refuse_shared_memory(weights)
    return list(weights), list(weights.values())


class Gradients:
    """The weights' gradients as each optimizer finds them: some write to `p.grad` while they step.

    What was written to shows in its version. In the first steps copies are kept, and afterwards those of the
    optimizers that were seen to write; of others nothing is kept but the tensors themselves.
    """

    def __init__(self) -> None:
        self._copied = COPIED
        self._writing: set[int] = set()  # ids of optimizers
        self._found: dict[int, tuple[int, Tensor | None, int, Tensor | None]] = {}

    def see(self, optimizer: torch.optim.Optimizer) -> None:
        """Before it steps."""
        copies = self._copied > 0 or id(optimizer) in self._writing
        for p in parameters_of([optimizer]):
            g = None if p.grad is None else local(p.grad)
            copy = g.clone() if g is not None and copies else None
            self._found[id(p)] = (id(optimizer), g, _version(g), copy)

    def see_again(self, optimizer: torch.optim.Optimizer) -> None:
        """As it finds them now, if its step is one at which they were seen."""
        if self._found:
            self.see(optimizer)

    def of(self, weights: Iterable[nn.Parameter]) -> list[Tensor | None]:
        """The gradient of each weight, NaN where it was written to and no copy was kept.

        Those that were not seen are as they are now.
        """
        gradients = []
        for p in weights:
            now = None if p.grad is None else local(p.grad)
            optimizer, g, seen, copy = self._found.get(id(p), (0, now, _version(now), None))
            if g is not None and (_version(g) != seen or (copy is not None and not torch.equal(g, copy))):
                self._writing.add(optimizer)
                g = torch.full_like(g, torch.nan) if copy is None else copy
            gradients.append(g)
        return gradients

    def forget(self) -> None:
        """The step is over; nothing of its gradients is held any more."""
        self._copied -= len(self._found) > 0
        self._found = {}


def _version(t: Tensor | None) -> int:
    return 0 if t is None or t.is_inference() else t._version
