"""The processes that train one model together, each on rows of its own, and what they must agree on.

Every rank has to find the same c, and take the same number of forwards under FSDP. So whatever a branch
depends on is summed over the processes first: a mean over tokens as its sum and their number, in float64. The
sums are all-reduced, and all ranks get the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    Group = dist.ProcessGroup | Literal["auto"] | None


class Workers:
    """The processes of a group, or this one alone, which it is until they `meet`.

    Args:
        asked: a process group; None: this process alone; "auto": the default group, where torch.distributed
            is initialized when they meet.
    """

    def __init__(self, asked: Group = "auto"):
        self.asked = asked
        self.met = False
        self.group: dist.ProcessGroup | None = None
        self.size = 1
        self.sharded = False  # whether each process holds a part of every weight (FSDP), not all of it
        self.device = torch.device("cpu")  # where the processes exchange numbers

    def __getstate__(self) -> dict[str, Any]:
        """Without the processes, which another one has to meet again."""
        return vars(Workers("auto" if self.asked is not None else None))

    def meet(self, sharing: dist.ProcessGroup | None, device: torch.device) -> None:
        """Find those who train weights on `device`; `sharing`: those to whom FSDP shared them out."""
        known = dist.is_available() and dist.is_initialized()
        if sharing is not None:
            self.group = sharing
        elif self.asked == "auto":
            self.group = dist.group.WORLD if known else None
        else:
            self.group = self.asked
        self.sharded = sharing is not None
        self.size = dist.get_world_size(self.group) if known and self.group is not None else 1
        self.device = device
        self.met = True

    @property
    def alone(self) -> bool:
        return self.size <= 1

    def total(self, *numbers: Tensor | float) -> Tensor:
        """Sums over the processes, (len(numbers),) float64, in one message."""
        local = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=self.device) for x in numbers])
        if not self.alone:
            dist.all_reduce(local, group=self.group)
        return local

    def mean(self, value: Tensor, count: Tensor | int) -> Tensor:
        """The mean over the tokens of all processes, of a mean over `count` of them here; 0-dim.

        Alone, that mean itself. A process without tokens contributes zero weight.
        """
        return value if self.alone else self.pooled(count, value)[0]

    def pooled(self, count: Tensor | int, *means: Tensor) -> Tensor:
        """Means over `count` tokens here -> those over the tokens of all processes, and the number of these.

        (len(means) + 1,) float64, from one message.
        """
        count = torch.as_tensor(count, dtype=torch.float64, device=self.device)
        weighted = [torch.where(count > 0, mean.to(count) * count, 0.0) for mean in means]
        sums = self.total(*weighted, count)
        return torch.cat([sums[:-1] / sums[-1], sums[-1:]])

    def rms(self, value: Tensor, count: Tensor | int) -> Tensor:
        """`mean` for a root of a mean square; 0-dim."""
        return value if self.alone else self.mean(value.double().square(), count).sqrt()

    def joined(self, part: Tensor) -> Tensor:
        """A sum over all elements of the weights; if they are sharded, `part` is this process's."""
        return self.total(part)[0].to(part.dtype) if self.sharded else part

    def joined_norm(self, part: Tensor) -> Tensor:
        """`joined` for a norm."""
        return self.joined(part.double().square()).sqrt().to(part.dtype) if self.sharded else part

    def any(self, flag: Tensor) -> Tensor:
        """Whether it is true of one process at least; 0-dim bool."""
        return flag if self.alone else self.total(flag)[0].bool()

    def any_and_norm(self, flag: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """`any` and `joined_norm` in one message."""
        if not self.sharded:
            return self.any(flag), part
        sums = self.total(flag, part.double().square())
        return sums[0].bool(), sums[1].sqrt().to(part.dtype)
