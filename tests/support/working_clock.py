"""A clock that only work moves, so that what is measured by it is the same on every machine."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

LOOK_S = 1e-6  # what a look at it takes
NUMBER_S = (
    1e-6  # what a number takes that goes into a linear layer, and one that an optimizer steps, at first
)
SLOWER = 0.1  # a second: how much longer everything takes, so that no two rounds are alike


class WorkingClock:
    """Seconds of a machine that slows down."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += LOOK_S
        return self.now

    def _work(self, numbers: int) -> None:
        self.now += NUMBER_S * numbers * (1 + SLOWER * self.now)

    def _layer(self, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if isinstance(module, nn.Linear) and isinstance(inputs[0], torch.Tensor):
            self._work(inputs[0].numel())

    def _step(self, optimizer: Optimizer, *_: object) -> None:
        self._work(sum(p.numel() for group in optimizer.param_groups for p in group["params"]))


@contextmanager
def working_clock() -> Iterator[WorkingClock]:
    """`time.perf_counter` is one within the block."""
    clock = WorkingClock()
    hooks = [register_module_forward_hook(clock._layer), register_optimizer_step_post_hook(clock._step)]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "perf_counter", clock)
            yield clock
    finally:
        for hook in hooks:
            hook.remove()
