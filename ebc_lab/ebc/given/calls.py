"""An optimizer of somebody else's, as it is called: its step, its methods, its scaled gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType, MethodType
from typing import Any

import torch
from torch.optim import Optimizer

from ..parallel.shards import local
from .bases import parameters_of


class Replaced:
    """A method of an optimizer in whose place `act(method, …)` is called, until `remove`.

    It is bound to that one: a copy of the optimizer, or one that was pickled, has its class's own.
    """

    def __init__(self, optimizer: Optimizer, name: str, act: Callable[..., Any]):
        self.before = vars(optimizer).get(name)
        method = getattr(optimizer, name)

        def called(holder: Optimizer, *given: Any, **named: Any) -> Any:
            if holder is optimizer:
                return act(method, *given, **named)
            return getattr(type(holder), name)(holder, *given, **named)

        called.__name__ = name  # by which a bound method is pickled
        self.optimizer = optimizer
        self.method = MethodType(called, optimizer)
        setattr(optimizer, name, self.method)

    def remove(self) -> None:
        held = vars(self.optimizer)
        name = self.method.__name__
        if held.get(name) is not self.method:  # somebody else has replaced it since
            return
        if self.before is None:
            del held[name]
        else:
            held[name] = self.before


HOOKED = Optimizer.profile_hook_step(lambda self: None).__code__  # of what torch puts around each step


def step_of() -> FrameType | None:
    """The call of an optimizer's step around the hook that is running; None if that is not near."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(8):  # torch's decorators lie between
        if frame is None or frame.f_code is HOOKED:
            return frame
        frame = frame.f_back
    return None


def is_inside(frame: FrameType | None, outer: FrameType | None) -> bool:
    while frame is not None and frame is not outer:
        frame = frame.f_back
    return frame is not None


@torch.no_grad()
def unscale(optimizer: Optimizer) -> None:
    """A GradScaler leaves unscaling to an optimizer that can do it: do so before anything reads gradients."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    factor = 1 / scale.double()
    for p in parameters_of([optimizer]):
        if p.grad is not None:
            local(p.grad).mul_(factor.to(p.grad.dtype))
    optimizer.grad_scale = None  # type: ignore[attr-defined]
