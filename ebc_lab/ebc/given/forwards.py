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

from . import checks

LABELS = ("labels", "num_items_in_batch")  # what a forward takes for its loss alone


@dataclass(frozen=True)
class Forward:
    """One training forward. It counts as used once a gradient has come back to its logits."""

    batch: dict[str, Any]  # `args` and `kwargs`, without labels
    logits: Tensor
    mask: Tensor | None
    named: bool
    autocast: torch.dtype | None  # the dtype of the autocast around it
    version: int | None  # of the weights, see `Capture`; None: unknown

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast that it ran in, since optimizers step outside of it."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.logits.device.type, self.autocast)


class Hook:
    """A forward hook that knows the one module it was made for, so that copies of the module do without it.

    A copy (an average of the weights, a saved module) has the same hook, or after pickling none.
    """

    def __init__(self, module: nn.Module, act: Callable[..., None]):
        self.module: nn.Module | None = module
        self.act: Callable[..., None] | None = act

    def __call__(self, module: nn.Module, *given: Any) -> None:
        if self.act is not None and module is self.module:
            self.act(*given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> Hook:
    hook = Hook.__new__(Hook)
    hook.module = None
    hook.act = None
    return hook


class Capture:
    """Keeps the last training forward of `model`.

    Args:
        model: its forward hooks are used; what measures calls it again, see `call`.
        logits_of: output of the model -> logits. Default: a tensor itself, or `.logits`.
        drop: keyword arguments that a measuring forward does without.
        before: called before each forward.
        version: a number that changes when the weights do.
    """

    def __init__(
        self,
        model: nn.Module,
        logits_of: Callable[[Any], Any] | None,
        drop: tuple[str, ...] | None,
        before: Callable[[], None],
        version: Callable[[], int],
    ):
        self.logits_of = logits_of or checks.logits_in
        if drop is None:
            config = getattr(model, "config", None)
            # an encoder-decoder shifts its labels into the decoder's input
            drop = () if getattr(config, "is_encoder_decoder", False) else LABELS
        self.drop = drop
        self.last: Forward | None = None
        self.paused = False
        self.naming = False
        self.ever = False  # whether any training forward was seen
        self._pending = False  # the last one has had no backward yet
        self._warned = False
        self._before = before
        self._version = version
        self._model = model
        self._forwards: list[Any] = []  # of the calls that are running
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
        self._pending = False

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
        """The logits on (some rows of) a kept batch."""
        with self.pause():
            return self.logits_of(model(*batch["args"], **batch["kwargs"]))

    def _begin(self, args: tuple[Any, ...]) -> None:
        self._forwards.append(self._model.forward)
        if not self.paused:
            self._before()

    def _keep(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Lightning under DDP has the wrapper's forward call `training_step` in the place of the module's own
        redirected = self._forwards.pop() != self._model.forward
        if redirected or self.paused or not torch.is_grad_enabled():
            return
        logits = checks.logits_in(self.logits_of(output))
        if not logits.requires_grad or (self.last is not None and self.last.named and not self.naming):
            return
        self.ever = True
        if self.last is not None and self._pending and not self._warned and not self.naming:
            self._warned = True
            warnings.warn(
                "two training forwards before one backward: the last one chooses c. To choose by another, "
                "call the model inside `with ebc.this_forward():`.",
                checks.EBCWarning,
                stacklevel=2,
            )
        kept = {name: value for name, value in kwargs.items() if name not in self.drop}
        mask = _mask(kwargs, logits)
        autocast = _autocast(logits.device.type)
        self._pending = not torch.compiler.is_compiling()
        version = self._version() if self._pending else None
        batch = {"args": args, "kwargs": kept}
        self.last = Forward(batch, logits.detach(), mask, self.naming, autocast, version)
        if self._pending:  # the loss may be of other tensors than these logits
            heard = [t for t in checks.tensors_in(output) if t.requires_grad] or [logits]
            register_multi_grad_hook(heard, self._used, mode="any")

    def _used(self, gradient: Tensor) -> None:
        self._pending = False


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _mask(kwargs: Mapping[str, Any], logits: Tensor) -> Tensor | None:
    """Which positions count: an attention mask of the logits' shape."""
    for name in ("decoder_attention_mask", "attention_mask"):
        mask = kwargs.get(name)
        if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]:
            return mask
    return None
