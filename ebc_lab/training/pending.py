"""Values of steps that are still on their device: kept there, and brought over in one copy when a block of steps is read.

On a CPU there is nothing to bring, and a block is one step. On a GPU each number read would stop the host until the device has
caught up, so nothing is read before the block's end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Values = Mapping[str, Tensor]  # 0-dim, or (n,) for one value a group


@dataclass(frozen=True)
class Packed:
    """Values in one float64 vector, each name with the place that its numbers take."""

    places: dict[str, slice | int]
    numbers: Tensor

    @classmethod
    def of(cls, values: Values) -> Packed:
        places: dict[str, slice | int] = {}
        at = 0
        for name, value in values.items():
            places[name] = slice(at, at + len(value)) if value.ndim else at
            at += value.numel()
        return cls(places, torch.cat([v.reshape(-1).double() for v in values.values()]))

    def read(self, numbers: Sequence[float]) -> dict[str, float | list[float]]:
        return {name: numbers[place] for name, place in self.places.items()}  # type: ignore[misc]


class PendingSteps:
    """The values of up to `capacity` steps, in order.

    A step is added as loose tensors, or `Packed` by a graph whose next replay would overwrite them: those are copied at once.
    """

    def __init__(self, capacity: int, device: torch.device):
        self.capacity, self.device = capacity, device
        self.steps: list[Values | Packed] = []
        self._ring: Tensor | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, values: Values | Packed) -> None:
        if isinstance(values, Packed):
            n = len(values.numbers)
            if self._ring is None or self._ring.shape[1] < n:
                wider = torch.empty(self.capacity, n, dtype=torch.float64, device=self.device)
                if self._ring is not None:
                    wider[:, : self._ring.shape[1]] = self._ring
                self._ring = wider
            place = self._ring[len(self.steps), :n]
            place.copy_(values.numbers, non_blocking=True)
            values = Packed(values.places, place)
        self.steps.append(values)

    def take(self) -> list[dict[str, float | list[float]]]:
        """All of them as numbers, in order, waiting once for the device; there are none left then."""
        steps, self.steps = self.steps, []
        if self.device.type == "cpu":
            return [_numbers(s) for s in steps]
        packed = [s if isinstance(s, Packed) else Packed.of(s) for s in steps]
        if not packed:
            return []
        numbers = torch.cat([p.numbers for p in packed]).tolist()
        out, at = [], 0
        for p in packed:
            out.append(p.read(numbers[at : at + len(p.numbers)]))
            at += len(p.numbers)
        return out


def _numbers(step: Values | Packed) -> dict[str, float | list[float]]:
    return (
        step.read(step.numbers.tolist())
        if isinstance(step, Packed)
        else {k: v.tolist() for k, v in step.items()}
    )
