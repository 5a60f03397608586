"""The last training forward of a model, kept until the optimizer's step: what it was given and its logits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from ..parallel.shards import shared_out
from . import checks, losses
from .arguments import Arguments
from .numbers import Numbers
from .source import Source, tensors_of
from .state import Snapshot

FIRST = 3  # forwards of a training that are looked at closely
CERTAIN = 1000.0  # nats: how far below the largest logit all others lie where nothing is predicted


@dataclass
class Forward:
    """One training forward. It counts as used once a gradient has come back to its logits."""

    batch: dict[str, Any]  # `args` and `kwargs`, without what only the loss needs
    logits: Tensor | None  # None where it returned its loss alone
    mask: Tensor | None
    named: bool
    device: str
    autocast: torch.dtype | None  # the dtype of the autocast around it
    version: int | None  # of the weights, see `Capture`; None: unknown
    written: int | None  # the logits' version: another one later means that they were written to
    start: Snapshot | None = None  # where the model's own state stood when it began
    used: bool | None = False  # whether a gradient has come back; None: unknown
    # of the first forwards only
    gradient: losses.Gradient | None = None  # by the logits
    backwards: int = 0  # how many passes have made it
    source: Source | None = None  # where the logits are made of the output, and are no view of it

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast that it ran in, since optimizers step outside of it."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device, self.autocast)

    @property
    def overwritten(self) -> bool:
        """Whether the logits are no longer what the model returned."""
        if self.logits is None or self.written is None:
            return False
        return self.logits._version != self.written


class Hook:
    """A forward hook that knows the one module it was made for, so that copies of the module do without it.

    A copy (an average of the weights, a saved module) has the same hook, or after pickling none.
    """

    def __init__(self, module: nn.Module | None = None, act: Callable[..., None] | None = None):
        self.module = module
        self.act = act

    def __call__(self, module: nn.Module, *given: Any) -> None:
        if self.act is not None and module is self.module:
            self.act(*given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, ()


class Capture:
    """Keeps the last training forward of `model`.

    Args:
        model: its forward hooks are used; what measures calls it again, see `call`.
        logits_of: output of the model -> logits. Default: a tensor itself, or `.logits`.
        arguments: what a measuring forward is called with, and which positions count.
        axis: that of the batch, in what the model takes and returns.
        look: whether forwards are looked at closely, until `looking` is set to False.
        before: called before each forward; returns the model's state, if that moves.
        version: a number that changes when the weights do.
    """

    def __init__(
        self,
        model: nn.Module,
        logits_of: Callable[[Any], Any] | None,
        arguments: Arguments,
        axis: int,
        look: bool,
        before: Callable[[], Snapshot | None],
        version: Callable[[], int],
    ):
        self.logits_of = logits_of or checks.logits_in
        self.arguments = arguments
        self.axis = axis
        self.last: Forward | None = None
        self.paused = False
        self.naming = False
        self.ever = False  # whether any training forward was seen
        self.draws = False  # whether one has drawn random numbers
        self.used = 0  # forwards since the last step to which a gradient has come back
        self.looking = look  # whether the gradients that come back to the logits are kept
        self.close = FIRST  # forwards that are looked at for random numbers in any case
        self.certain = False  # whether a position was seen at which nothing is predicted
        self.keeping = False  # whether what the model returns to a measurement is kept, as `returned`
        self.returned: Any = None
        self._warned = False
        self._before = before
        self._version = version
        self._model = model
        self._forwards: list[Any] = []  # of the calls that are running, and random states when they began
        self.handles = [
            model.register_forward_pre_hook(Hook(model, self._begin)),
            model.register_forward_hook(Hook(model, self._keep), with_kwargs=True),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.clear()

    def clear(self) -> None:
        """The step has been taken."""
        self.last = None
        self.used = 0

    @contextmanager
    def named(self) -> Iterator[None]:
        self.naming = True
        try:
            yield
        finally:
            self.naming = False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Forwards meanwhile are measurements."""
        before = self.paused
        self.paused = True
        try:
            yield
        finally:
            self.paused = before

    def call(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """The logits on (some rows of) a kept batch, as the model returns them."""
        with self.pause():
            output = model(*batch["args"], **batch["kwargs"])
            if self.keeping:
                self.returned = output
            return self.logits_of(output)

    def rows_first(self, x: Tensor) -> Tensor:
        """Logits, or a mask of them, with the batch's axis in front."""
        return x.movedim(self.axis, 0) if self.axis else x

    def _begin(self, args: tuple[Any, ...]) -> None:
        eager = not torch.compiler.is_compiling()
        watched = (self.looking or self.close > 0) and not self.paused and eager
        start = None if self.paused or _transformed() else self._before()
        self._forwards.append((self._model.forward, Numbers() if watched else None, start))

    def _keep(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Lightning under DDP has the wrapper's forward call `training_step` in the place of the module's own
        forward, began_with, start = self._forwards.pop()
        if forward != self._model.forward or self.paused or not torch.is_grad_enabled() or _transformed():
            return
        if start is not None and start.lent:
            return
        batch, dropped = self.arguments.kept(args, kwargs)
        logits = self._logits(output, dropped and (self.arguments.chosen or checks.holds_a_loss(output)))
        graded = [t for t in tensors_of(output) if t.requires_grad]
        if logits is not None:
            graded = (graded or [logits]) if logits.requires_grad else []
        if not graded or (self.last is not None and self.last.named and not self.naming):
            return
        self.ever = True
        if self.last is not None and self.last.used is False and not self._warned and not self.naming:
            self._warned = True
            warnings.warn(
                "two training forwards before one backward: the last one chooses c. To choose by another, "
                "call the model inside `with ebc.this_forward():`.",
                checks.EBCWarning,
                stacklevel=2,
            )
        eager = not torch.compiler.is_compiling()
        device = graded[0].device.type
        self.last = last = Forward(
            batch,
            None if logits is None else logits.detach(),
            self.arguments.mask(args, kwargs, None if logits is None else logits.shape[:-1]),
            self.naming,
            device,
            _autocast(device),
            self._version() if eager else None,
            logits._version if eager and logits is not None else None,
            start,
            used=False if eager else None,
        )
        if not eager:
            return
        if began_with is not None:
            self.draws = self.draws or began_with.drawn()
            self._look_closely(last, logits, graded, output)
        # the loss may be of other tensors than these logits
        register_multi_grad_hook(graded, lambda gradient: self._came_back(last), mode="any")

    def _logits(self, output: Any, may_be_a_loss: bool) -> Tensor | None:
        try:
            return checks.logits_in(self.logits_of(output))
        except (TypeError, ValueError, LookupError, AttributeError):
            if may_be_a_loss:
                return None
            raise

    def _came_back(self, forward: Forward) -> None:
        self.used += not forward.used
        forward.used = True

    def leave_out_certain(self, forward: Forward) -> None:
        """Take positions at which nothing is predicted, as masked diffusion has them, from a forward's mask:
        no other class is given a probability, so that their KL is 0 and only thins out the mean."""
        logits, mask = forward.logits, forward.mask
        if logits is None:
            return
        first, second = logits.topk(2, -1).values.unbind(-1)
        certain = first.isfinite() & (first - second >= CERTAIN)
        counted = ~certain if mask is None else mask.bool() & ~certain
        if certain.any() and counted.any():
            self.certain = True
            forward.mask = counted

    def _look_closely(
        self, forward: Forward, logits: Tensor | None, graded: list[Tensor], output: Any
    ) -> None:
        """Keep the gradient that comes back to the output, of the tensors that the logits are made of."""
        self.close -= 1
        if not self.looking or logits is None or type(logits) is not Tensor:
            return
        shown = self.rows_first(logits.detach())
        alike = [t for t in graded if type(t) is Tensor and _same_memory(t, logits)]
        itself = [t for t in alike if t is logits]
        if itself or len(alike) == 1:  # of several views of one tensor the loss may use another
            (tensor,) = itself[:1] or alike

            def came(gradient: Tensor, of: Tensor = tensor.detach()) -> None:
                with torch.no_grad():  # backward may be differentiated itself
                    new = losses.gradient_of(shown, of, gradient)
                    old = forward.gradient
                    forward.gradient = new if old is None or new is None else old + new
                    forward.backwards += 1

            tensor.register_hook(came)
            return
        if any(type(t) is not Tensor for t in graded) or any(map(shared_out, self._model.parameters())):
            return
        try:
            source = Source(self._model, self.logits_of, output, shown, self.axis)
        except Exception:  # whatever it is that it cannot do twice
            return
        forward.source = source
        tensors = tensors_of(output)
        for place in source.places:

            def came_there(gradient: Tensor, place: int = place) -> None:
                with torch.no_grad():
                    source.came(place, gradient)
                    forward.gradient = source.by_logits()
                    forward.backwards += place == source.places[0]

            tensors[place].register_hook(came_there)


def _transformed() -> bool:
    """Whether a transform of torch.func runs, whose tensors cannot be kept."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
