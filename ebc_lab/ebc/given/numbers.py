"""The random numbers that a forward draws: torch's on every device, `random`'s, numpy's if it is loaded."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Numbers:
    """Where the generators stand."""

    def __init__(self) -> None:
        self.generators = [torch.default_generator, *torch.cuda.default_generators]  # CUDA's once it is used
        self.states = [generator.get_state() for generator in self.generators]
        self.python = random.getstate()
        self.numpy: Any = _numpy().get_state() if "numpy" in sys.modules else None

    def drawn(self) -> bool:
        """Whether a number has been drawn since."""
        now = Numbers()
        of_numpy = self.numpy is not None and (
            now.numpy[2] != self.numpy[2] or (now.numpy[1] != self.numpy[1]).any()
        )
        of_torch = any(not torch.equal(a, b) for a, b in zip(now.states, self.states, strict=False))
        return now.python != self.python or bool(of_numpy) or of_torch

    def restore(self) -> None:
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)
        random.setstate(self.python)
        if self.numpy is not None:
            _numpy().set_state(self.numpy)


def _numpy() -> Any:
    return sys.modules["numpy"].random


@contextmanager
def kept() -> Iterator[None]:
    """Numbers that are drawn inside are not missed outside."""
    before = Numbers()
    try:
        yield
    finally:
        before.restore()
