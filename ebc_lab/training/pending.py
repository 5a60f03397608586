"""Values of steps that are still on their device, brought to the host in one copy for a block of steps.

On a CPU there is nothing to bring, and a block is one step. On a GPU each number read would stop the host
until the device has caught up, so nothing is read before the end of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Values = Mapping[str, Tensor | float]  # 0-dim, or (L,) with one element a group; floats on a CPU alone
Numbers = dict[str, float | list[float]]  # the same, read


@dataclass(frozen=True)
class Packed:
    """Values in one float64 vector, each name with the place of its numbers."""

    places: dict[str, slice | int]
    numbers: Tensor

    @classmethod
    def of(cls, values: Values) -> Packed:
        places: dict[str, slice | int] = {}
        at = 0
        tensors = {name: torch.as_tensor(value) for name, value in values.items()}
        for name, value in tensors.items():
            places[name] = slice(at, at + len(value)) if value.ndim else at
            at += value.numel()
        return cls(places, torch.cat([v.reshape(-1).double() for v in tensors.values()]))

    def read(self, numbers: Sequence[float]) -> Numbers:
        return {name: numbers[place] for name, place in self.places.items()}  # type: ignore[misc]


class PendingSteps:
    """The learning rates and values of up to `capacity` steps, in order.

    A step's values are loose tensors, or the `Packed` output of a graph, which is copied immediately because
    the next replay overwrites it.
    """

    def __init__(self, capacity: int, device: torch.device):
        self.capacity = capacity
        self.device = device
        self.steps: list[tuple[float, Values | Packed]] = []
        self._copies: Tensor | None = None  # (capacity, numbers of the longest record)

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, lr: float, values: Values | Packed) -> None:
        self.steps.append((lr, self._copied(values) if isinstance(values, Packed) else values))

    def _copied(self, values: Packed) -> Packed:
        n = len(values.numbers)
        if self._copies is None or self._copies.shape[1] < n:
            wider = torch.empty(self.capacity, n, dtype=torch.float64, device=self.device)
            if self._copies is not None:
                wider[:, : self._copies.shape[1]] = self._copies
            self._copies = wider
        place = self._copies[len(self.steps), :n]
        place.copy_(values.numbers, non_blocking=True)
        return Packed(values.places, place)

    def take(self) -> list[tuple[float, Numbers]]:
        """Remove all of them, in order, with their values as numbers; waits for the device once."""
        steps = self.steps
        self.steps = []
        if self.device.type == "cpu":
            return [(lr, _read(values)) for lr, values in steps]
        if not steps:
            return []
        packed = [v if isinstance(v, Packed) else Packed.of(v) for _, v in steps]
        numbers = torch.cat([p.numbers for p in packed]).tolist()
        taken: list[tuple[float, Numbers]] = []
        at = 0
        for (lr, _), p in zip(steps, packed, strict=True):
            taken.append((lr, p.read(numbers[at : at + len(p.numbers)])))
            at += len(p.numbers)
        return taken


def _read(values: Values | Packed) -> Numbers:
    if isinstance(values, Packed):
        return values.read(values.numbers.tolist())
    return {name: v.tolist() if isinstance(v, Tensor) else v for name, v in values.items()}
