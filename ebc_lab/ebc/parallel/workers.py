"""The processes that train one model together, each on rows of its own, and what they must agree on.

Every rank has to find the same c, and take the same number of forwards under FSDP. So whatever a branch
depends on is summed over the processes first: a mean over tokens as its sum and their number, in float64. The
sums are all-reduced, and all ranks get the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    Group = dist.ProcessGroup | Literal["auto"] | None


class Workers:
    """The processes of `group`, or this one alone.

    Args:
        group: a process group; None: this process alone; "auto": the default group, where torch.distributed
            is initialized.
        sharded: whether each process holds a part of every weight (FSDP), not all of it.
    """

    def __init__(self, group: Group = "auto", sharded: bool = False):
        known = dist.is_available() and dist.is_initialized()
        if group == "auto":
            group = dist.group.WORLD if known else None
        self.group = group
        self.size = dist.get_world_size(group) if group is not None and known else 1
        self.sharded = sharded

    @property
    def alone(self) -> bool:
        return self.size <= 1

    def total(self, *numbers: Tensor | float) -> Tensor:
        """Sums over the processes, (len(numbers),) float64."""
        device = next((x.device for x in numbers if isinstance(x, Tensor)), torch.device("cpu"))
        own = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in numbers])
        if not self.alone:
            dist.all_reduce(own, group=self.group)
        return own

    def mean(self, value: Tensor, count: Tensor | int) -> Tensor:
        """The mean over the tokens of all processes, of a mean over `count` of them here; 0-dim.

        Alone, that mean itself. A process without a token has no say.
        """
        if self.alone:
            return value
        count = torch.as_tensor(count, dtype=torch.float64, device=value.device)
        weighted = torch.where(count > 0, value.double() * count, 0.0)
        sums = self.total(weighted, count)
        return sums[0] / sums[1]

    def rms(self, value: Tensor, count: Tensor | int) -> Tensor:
        """`mean` for a root of a mean square; 0-dim."""
        return value if self.alone else self.mean(value.double().square(), count).sqrt()

    def joined(self, part: Tensor) -> Tensor:
        """A sum over all elements of the weights, of which each process has its part's if they are sharded."""
        return self.total(part)[0].to(part.dtype) if self.sharded else part

    def joined_norm(self, part: Tensor) -> Tensor:
        """`joined` for a norm."""
        return self.joined(part.double().square()).sqrt().to(part.dtype) if self.sharded else part

    def any(self, flag: Tensor) -> Tensor:
        """Whether it is true of one process at least; 0-dim bool."""
        return flag if self.alone else self.total(flag)[0].bool()
