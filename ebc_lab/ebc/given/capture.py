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

from ..probe import Prober
from . import checks, losses
from .arguments import Arguments
from .look import FIRST
from .numbers import Numbers
from .source import Source, tensors_of
from .state import Snapshot

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
    version: object  # of the weights, see `Capture`; None: unknown
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
        before: called before each forward; returns the model's state, if that moves.
        version: what is another when the weights are.
    """

    def __init__(
        self,
        model: nn.Module,
        logits_of: Callable[[Any], Any] | None,
        arguments: Arguments,
        axis: int,
        before: Callable[[], Snapshot | None],
        version: Callable[[], object],
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
        self.watched = FIRST  # forwards that are looked at for random numbers
        self.first: Callable[..., None] | None = None  # looks at the first forwards and what they return
        self.found = False  # whether a model that returns its loss has been seen to return logits
        self.certain = False  # whether a position was seen at which nothing is predicted
        self.keeping = False  # whether what the model returns to a measurement is kept, as `returned`
        self.returned: Any = None
        self._warned = False
        self._before = before
        self._version = version
        self.model = model
        self._forwards: list[Any] = []  # of the calls that are running, and random states when they began
        self.handles: list[Any] = []

    def watch(self) -> None:
        """See the model's forwards from now on."""
        self.handles = [
            self.model.register_forward_pre_hook(Hook(self.model, self._begin)),
            self.model.register_forward_hook(Hook(self.model, self._keep), with_kwargs=True),
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

    def find_logits(self, prober: Prober, forward: Forward) -> None:
        """Find out without which arguments a model that has returned its loss returns its logits.

        Those that hold no tensor and have a default may be what makes it return a loss, as a flag for a fused
        head does. Raises ValueError where neither way gives logits.
        """
        if forward.logits is not None or self.found:
            return
        arguments = self.arguments
        flags = () if arguments.chosen else arguments.flags(forward.batch)
        without = {k: v for k, v in forward.batch["kwargs"].items() if k not in flags}
        errors = []
        with self.pause(), forward.precision():
            for batch in (forward.batch, {**forward.batch, "kwargs": without})[: 1 + bool(flags)]:
                try:
                    with prober.measuring(), torch.no_grad():
                        prober.as_trained(batch)
                except ValueError as error:
                    errors.append(error)
                else:
                    self.found = True
                    break
        if not self.found:
            given = ", ".join(forward.batch["kwargs"]) or "its own"
            raise ValueError(
                "the model has returned a loss and no logits, and called without "
                f"{', '.join(arguments.drop)} it returned none either ({checks.failed(errors[0])}): name all "
                f"arguments that only its loss needs, of {given} too, in "
                f"drop=({arguments.drop[0]!r}, …), or attach to the module inside it that returns logits."
            ) from errors[0]
        if errors:
            arguments.drop = (*arguments.drop, *flags)
            forward.batch = batch

    def rows_first(self, x: Tensor) -> Tensor:
        """Logits, or a mask of them, with the batch's axis in front."""
        return x.movedim(self.axis, 0) if self.axis else x

    def _begin(self, args: tuple[Any, ...]) -> None:
        eager = not torch.compiler.is_compiling()
        watched = (self.first is not None or self.watched > 0) and not self.paused and eager
        start = None if self.paused or _transformed() else self._before()
        self._forwards.append((self.model.forward, Numbers() if watched else None, start))

    def _keep(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Lightning under DDP has the wrapper's forward call `training_step` in the place of the module's own
        forward, began_with, start = self._forwards.pop()
        if forward != self.model.forward or self.paused or not torch.is_grad_enabled() or _transformed():
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
            self.watched -= 1
            self.draws = self.draws or began_with.drawn()
        if self.first is not None:
            self.first(last, logits, graded, output)
        # the loss may be of other tensors than these logits
        if len(graded) == 1:
            graded[0].register_hook(lambda gradient: self._came_back(last))
        else:
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


def _transformed() -> bool:
    """Whether a transform of torch.func runs, whose tensors cannot be kept."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
