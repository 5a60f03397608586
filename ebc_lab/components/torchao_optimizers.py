"""What `components.optimizer` makes of torchao's Adams, which keep their moments in few bits; see there.

Two things are changed. torchao takes the learning rate as a tensor only, and the lab sets numbers. And it
compiles its step, which takes most of a minute in each process and a C++ compiler: here the same step runs
eagerly, slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchao.optim import Adam4bit, Adam8bit

from .rival_optimizers import ShareOfRate


class Eager(ShareOfRate):
    """A torchao optimizer that is not compiled and whose learning rate may be a number."""

    def taken(self, rate: Any) -> Any:
        return torch.as_tensor(rate, dtype=torch.float32)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        with torch.compiler.set_stance("force_eager"):
            super().step()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        rate = param_group.get("lr", self.defaults["lr"])
        super().add_param_group(param_group)  # which makes it a float32 tensor
        self.param_groups[-1]["lr"] = rate


class EagerAdam8bit(Eager, Adam8bit):  # type: ignore[misc]
    """Adam with moments in 8 bits: blocks of 256 of a tensor, a dynamic map of values."""


class EagerAdam4bit(Eager, Adam4bit):  # type: ignore[misc]
    """Adam with moments in 4 bits: blocks of 128 of a tensor."""
