"""What a model keeps from one forward to the next beside its trained weights: modes, buffers, attributes.

A forward that only measures must leave all of it as it was. One that repeats a training forward must also
begin where that one began: a recurrent state that is carried on, the queue of a momentum encoder and the bias
of a router have moved since.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..parallel.shards import shared_out

CLOSELY = 12  # measurements in which every tensor is copied, and compared by its values
AGAIN = 20  # afterwards one measurement in this many does so
SMALL = 10_000  # elements: such a tensor is copied at every measurement
MANY = 1000  # entries: a longer list is data, not state
CONTAINERS = (list, dict, set, deque, tuple)
TORCHS_OWN = frozenset(vars(nn.Module()))  # attributes that every module has
# beside its attributes: a model may make modules and hooks of its own at its first forward
KEPT_TOO = (
    *("_modules", "_buffers", "_forward_hooks", "_forward_pre_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"),
)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Place = tuple[nn.Module, Any]  # a module, and the name of something that it keeps


class Kept:
    """What one module keeps, as it was: its attributes and the entries of `KEPT_TOO`, all by identity.

    `mutable`: those that can be changed in place. `lasting`: whether none of them has a graph, so that this
    may be held from step to step.
    """

    def __init__(self, module: nn.Module, frozen_too: bool):
        own = vars(module)
        self.module = module
        self.own = own
        self.entries = own.copy()
        weights = own["_parameters"]
        spaces = [own[name] for name in KEPT_TOO]
        self.filled = [(space, space.copy()) for space in spaces if space]
        self.empty = [space for space in spaces if not space]
        attributes = {name: own[name] for name in own.keys() - TORCHS_OWN}
        self.lasting = not any(isinstance(v, Tensor) and v.grad_fn is not None for v in attributes.values())
        if type(module) not in BATCH_NORMS:
            attributes |= own["_buffers"]
        if frozen_too:
            frozen = {n: p for n, p in weights.items() if p is not None and not p.requires_grad}
            attributes |= frozen
        self.mutable = [(name, value) for name, value in attributes.items() if _mutable(value)]

    def put_back(self) -> None:
        """Have it keep the same as then."""
        for space in self.empty:
            space.clear()
        for space, entries in ((self.own, self.entries), *self.filled):
            whole = space is not self.own
            for name in [n for n in space if n not in entries and (whole or n not in TORCHS_OWN)]:
                del space[name]
            for name, value in entries.items():
                if (whole or name not in TORCHS_OWN) and space.get(name, space) is not value:
                    space[name] = value

    def detached(self) -> Kept:
        """The same without the graphs of its tensors, which would live on."""
        for name, value in self.entries.items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                self.entries[name] = value.detach()
        return self


class Modules:
    """What all modules of a model keep, seen as one: in most models none of it ever changes."""

    def __init__(self, modules: list[Kept]):
        self.modules = modules
        weights = [m.own["_parameters"] for m in modules]
        pairs = [pair for m in modules for pair in ((m.own, m.entries), *m.filled)]
        pairs += [(space, space.copy()) for space in weights]
        self.spaces = [space for space, _ in pairs]
        self.sizes = [len(entries) for _, entries in pairs]
        self.values = list(chain.from_iterable(entries.values() for _, entries in pairs))
        self.empty = [space for m in modules for space in m.empty]
        self.lasting = all(m.lasting for m in modules)
        self.mutable = [((m.module, name), value) for m in modules for name, value in m.mutable]
        self.modes = [m.own for m in modules]
        # those with a `train` of their own, which may drop what they computed from older weights
        self.telling = [m.module for m in modules if type(m.module).train is not nn.Module.train]

    @property
    def changed(self) -> bool:
        """Whether one of them keeps something else now."""
        if any(self.empty) or list(map(len, self.spaces)) != self.sizes:
            return True
        return not all(map(is_, chain.from_iterable(map(dict.values, self.spaces)), self.values))

    def put_back(self) -> None:
        """Have them keep the same as then."""
        if self.changed:
            for module in self.modules:
                module.put_back()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Each in evaluation mode, without the time that `modules()` and __setattr__ take. Those with a
        `train` of their own are told by it."""
        before = [own["training"] for own in self.modes]
        telling = [module for module in self.telling if module.training]
        try:
            _tell(telling, False)
            for own in self.modes:
                own["training"] = False
            yield
        finally:
            _tell(telling, True)
            for own, training in zip(self.modes, before, strict=True):
                own["training"] = training


@dataclass
class Snapshot:
    """The state of a model at one moment."""

    kept: Modules
    containers: list[tuple[Any, Any]] = field(default_factory=list)  # each, and a shallow copy
    # each, its values, and its version: another one later means that it was written to
    tensors: list[tuple[Place, Tensor, Tensor, int]] = field(default_factory=list)
    closely: bool = False

    @property
    def lent(self) -> bool:
        """Whether torch.func has lent the model other weights than its own."""
        return any(type(p) is Tensor for m in self.kept.modules for p in m.own["_parameters"].values())

    def add(self, place: Place, tensor: Tensor) -> None:
        """Copy a tensor's values, unless it is a kind that nothing can be copied into."""
        if tensor.layout is torch.strided and not (shared_out(tensor) or tensor.is_inference()):
            self.tensors.append((place, tensor, tensor.detach().clone(), tensor._version))


class ModelState:
    """The state of a model; what forwards inside `undisturbed` change is put back.

    Attributes, lists and dicts are kept by their entries, small tensors by their values. Large ones, and
    frozen weights, are copied and compared at first, and now and then; in between those that were seen to
    change. Torch's own batch-norms change nothing in evaluation.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.start: Snapshot | None = None  # where the training forward that is measured began
        self._moving: set[Place] = set()  # tensors that some forward has changed in place
        self._closely = CLOSELY
        self._measurements = 0
        self._kept: Modules | None = None  # at the last snapshot, where it may be held
        self._parameters: list[nn.Parameter] | None = None
        frozen = [p for p in model.parameters() if not p.requires_grad]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        # as a momentum encoder is; what adapters are trained on is larger, and nothing moves it
        self._frozen_too = sum(p.numel() for p in frozen) <= 2 * trained and not any(map(shared_out, frozen))

    def remember(self) -> Snapshot:
        """Where a training forward begins."""
        return self._taken(self._closely > 0, for_later=True)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """In evaluation mode, from `start` on; afterwards the model is as it was."""
        self._measurements += 1
        now = self._taken(self._closely > 0 or self._measurements % AGAIN == 0)
        self._closely -= self._closely > 0
        for module in now.kept.telling:  # some merge weights there, which rounds them
            for name, p in vars(module)["_parameters"].items():
                if p is not None and module.training:
                    now.add((module, name), p)
        # computed before the weights have moved
        cached, parametrize._cache_enabled = parametrize._cache_enabled, 0
        try:
            if self.start is not None and not (self.start.kept is now.kept and not now.kept.mutable):
                self._put(self.start)
            with now.kept.evaluating():
                yield
        finally:
            parametrize._cache_enabled = cached
            self._put(now)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """The same in the modes that the modules are in, from where they are."""
        now = self._taken(closely=True)
        try:
            yield
        finally:
            self._put(now)

    def parameters(self) -> list[nn.Parameter]:
        """The model's, as they were when a snapshot was last taken, but for those that nothing can move."""
        if self._parameters is None:
            self._parameters = [p for p in self.model.parameters() if not p.is_inference()]
        return self._parameters

    def _taken(self, closely: bool, for_later: bool = False) -> Snapshot:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            closely = False  # which needs values on the host
        if self._kept is None or self._kept.changed:
            modules = [Kept(module, self._frozen_too) for module in self.model.modules()]
            self._parameters = None
            kept = Modules([m.detached() if for_later else m for m in modules])
            self._kept = kept if kept.lasting else None
        else:
            kept = self._kept
        snapshot = Snapshot(kept, closely=closely)
        for place, value in kept.mutable:
            self._copy(snapshot, place, value)
        return snapshot

    def _copy(self, snapshot: Snapshot, place: Place, value: Any, depth: int = 0) -> None:
        """Copy what of a value can be changed in place."""
        if isinstance(value, Tensor):
            # a recurrent layer has a list of its trained ones, too
            parameter = isinstance(value, nn.Parameter)
            small = value.numel() <= SMALL and not parameter
            if not (parameter and value.requires_grad) and (
                small or snapshot.closely or place in self._moving
            ):
                snapshot.add(place, value)
        elif type(value) in CONTAINERS and len(value) <= MANY and depth < 2:
            if not isinstance(value, tuple):
                snapshot.containers.append((value, value.copy()))
            for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
                if _mutable(entry):
                    self._copy(snapshot, (place[0], (place[1], key)), entry, depth + 1)

    @torch.no_grad()
    def _put(self, snapshot: Snapshot) -> None:
        """Put the model back to where the snapshot was taken, and note which tensors had changed in place."""
        snapshot.kept.put_back()
        for container, copy in snapshot.containers:
            _refill(container, copy)
        for place, tensor, values, version in snapshot.tensors:
            written = place in self._moving or tensor._version != version
            # fused operations and `.data` leave the version; a GPU would be waited for
            looked_at = snapshot.closely or not tensor.is_cuda
            if written or (looked_at and not torch.equal(tensor, values)):
                if tensor.shape != values.shape:
                    tensor.resize_(values.shape)
                tensor.copy_(values)
                self._moving.add(place)


def _tell(modules: list[nn.Module], mode: bool) -> None:
    for module in modules:
        if module.training is not mode:  # else the one around it has passed it on
            module.train(mode)


def _mutable(value: Any) -> bool:
    """Whether it can be changed in place, or holds something that can."""
    if type(value) is tuple:
        return any(map(_mutable, value))
    return isinstance(value, Tensor) or type(value) in CONTAINERS


def _refill(container: Any, copy: Any) -> None:
    """Give a list, dict, set or deque the entries of its copy again, if they are others now."""
    entries, before = ((list(c.items()) if isinstance(c, dict) else list(c)) for c in (container, copy))
    if len(entries) == len(before) and all(map(_alike, entries, before)):
        return
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(copy)


def _alike(a: Any, b: Any) -> bool:
    """Whether two entries, or items of dicts, are the same objects."""
    return a is b or (type(a) is type(b) is tuple and len(a) == len(b) == 2 and a[0] is b[0] and a[1] is b[1])
