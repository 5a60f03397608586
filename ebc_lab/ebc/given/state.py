"""What a model keeps from one forward to the next beside its trained weights: modes, buffers, attributes.

A forward that only measures must leave all of it as it was. One that repeats a training forward must also
begin where that one began: a recurrent state that is carried on, the queue of a momentum encoder and the bias
of a router have moved since.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    *("_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"),
)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Place = tuple[nn.Module, Any]  # a module, and the name of something that it keeps


@dataclass
class Snapshot:
    """The state of a model at one moment."""

    spaces: list[tuple[MutableMapping[str, Any], dict[str, Any]]] = field(default_factory=list)
    containers: list[tuple[Any, Any]] = field(default_factory=list)  # each, and a shallow copy
    # each, its values, and its version: another one later means that it was written to
    tensors: list[tuple[Place, Tensor, Tensor, int]] = field(default_factory=list)
    closely: bool = False
    lent: bool = False  # whether torch.func has lent the model other weights than its own

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
        frozen = [p for p in model.parameters() if not p.requires_grad]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        # as a momentum encoder is; what adapters are trained on is larger, and nothing moves it
        self._frozen_too = sum(p.numel() for p in frozen) <= 2 * trained and not any(map(shared_out, frozen))

    def remember(self) -> Snapshot:
        """Where a training forward begins."""
        snapshot = self._taken(self._closely > 0, for_later=True)
        snapshot.lent = any(type(p) is Tensor for m in self.model.modules() for p in m._parameters.values())
        return snapshot

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """In evaluation mode, from `start` on; afterwards the model is as it was."""
        self._measurements += 1
        modes = Modes(self.model)
        now = self._taken(self._closely > 0 or self._measurements % AGAIN == 0)
        self._closely -= self._closely > 0
        for module in modes.own:  # some merge weights there, which rounds them
            for name, p in vars(module)["_parameters"].items():
                if p is not None:
                    now.add((module, name), p)
        # computed before the weights have moved
        cached, parametrize._cache_enabled = parametrize._cache_enabled, 0
        try:
            modes.evaluate()
            if self.start is not None:
                self._put(self.start)
            yield
        finally:
            parametrize._cache_enabled = cached
            modes.restore()
            self._put(now)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """The same in the modes that the modules are in, from where they are."""
        now = self._taken(closely=True)
        try:
            yield
        finally:
            self._put(now)

    def _taken(self, closely: bool, for_later: bool = False) -> Snapshot:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            closely = False  # which needs values on the host
        snapshot = Snapshot(closely=closely)
        for module in self.model.modules():
            own = vars(module)
            attributes = {name: own[name] for name in own.keys() - TORCHS_OWN}
            buffers, weights = own["_buffers"], own["_parameters"]
            kept = {} if type(module) in BATCH_NORMS else buffers
            if weights and self._frozen_too:
                kept = kept | {
                    name: p for name, p in weights.items() if p is not None and not p.requires_grad
                }
            snapshot.spaces.append((own, attributes))
            for name in KEPT_TOO:
                snapshot.spaces.append((own[name], dict(own[name])))
            for name, value in (attributes | kept).items() if kept else attributes.items():
                self._copy(snapshot, (module, name), value)
                if for_later and isinstance(value, Tensor) and value.grad_fn is not None:
                    attributes[name] = value.detach()  # its graph would live on
        return snapshot

    def _copy(self, snapshot: Snapshot, place: Place, value: Any, depth: int = 0) -> None:
        """Copy what of a value can be changed in place."""
        if isinstance(value, Tensor):
            parameter = isinstance(
                value, nn.Parameter
            )  # a recurrent layer has a list of its trained ones, too
            small = value.numel() <= SMALL and not parameter
            if not (parameter and value.requires_grad) and (
                small or snapshot.closely or place in self._moving
            ):
                snapshot.add(place, value)
        elif type(value) in CONTAINERS and len(value) <= MANY and depth < 2:
            if not isinstance(value, tuple):
                snapshot.containers.append((value, value.copy()))
            for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
                self._copy(snapshot, (place[0], (place[1], key)), entry, depth + 1)

    @torch.no_grad()
    def _put(self, snapshot: Snapshot) -> None:
        """Put the model back to where the snapshot was taken, and note which tensors had changed in place."""
        for space, entries in snapshot.spaces:
            own = "_buffers" in space
            left = [name for name in space if name not in entries and not (own and name in TORCHS_OWN)]
            for name in left:
                del space[name]
            for name, value in entries.items():
                if space.get(name, space) is not value:
                    space[name] = value
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


class Modes:
    """The mode of each module, which `evaluate` changes and `restore` puts back.

    Modules with a `train` of their own, which may drop what they computed from older weights, are told by it.
    Others are told without `modules()` and __setattr__, which take longer than a small forward.
    """

    def __init__(self, model: nn.Module):
        self.states: list[tuple[dict[str, Any], bool]] = []
        self.own: list[nn.Module] = []  # those that train and have a `train` of their own
        modules = [model]
        for module in modules:
            state = module.__dict__
            self.states.append((state, state["training"]))
            if type(module).train is not nn.Module.train and state["training"]:
                self.own.append(module)
            modules += [child for child in state["_modules"].values() if child is not None]

    def evaluate(self) -> None:
        self._tell(False)
        for state, _ in self.states:
            state["training"] = False

    def restore(self) -> None:
        self._tell(True)
        for state, training in self.states:
            state["training"] = training

    def _tell(self, mode: bool) -> None:
        for module in self.own:
            if module.training is not mode:  # else the one around it has passed it on
                module.train(mode)
