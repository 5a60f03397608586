"""`Budget`: finds c at a step, within delta nats per token, and carries what it learns from that."""

from __future__ import annotations

import math
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..proposal import Proposal
from ..scalars import Flag, Number, where
from ..settings import ClipSettings
from ..step import StepStats


class Need(Enum):
    """What finding c takes at a step, beside the proposal."""

    MEASUREMENT = "forwards at trial weights"
    DERIVATIVES = "derivatives of the model"
    NOTHING = "nothing: c is known before the step"


class Budget:
    """One way of finding c. Subclasses say what they need, and how `find_c` follows from it.

    `initial` names the numbers that go from step to step, each a 0-dim float64 tensor and an attribute of
    that name. They change in place, because a CUDA graph reads the memory that it was captured with.
    """

    need: ClassVar[Need]
    bounded: ClassVar[bool] = False  # whether S is needed at every step
    reads_gradients: ClassVar[bool] = False  # whether c depends on the gradients at every step
    initial: ClassVar[dict[str, float]] = {}

    def __init__(self, settings: ClipSettings, audit_every: int, device: torch.device):
        self.settings = settings
        self.audit_every = audit_every
        self.floor = math.nan  # nats per token: the smallest KL that means anything; known at the first batch
        for name, value in self.initial.items():
            setattr(self, name, torch.tensor(value, dtype=torch.float64, device=device))

    def measures_kl(self, t: int) -> bool:
        """Whether c at step `t` is found as at most steps, not carried on from the last measurement."""
        return True

    def predicts(self, stats: StepStats) -> bool:
        """Whether this step takes q, the predicted KL, once the sensitivities that are due are in `stats`."""
        return False

    def find_c(self, stats: StepStats, proposal: Proposal) -> Number:
        """Return c, and record in `stats` what it follows from; NaN where no update is usable."""
        raise NotImplementedError

    def audited(self, stats: StepStats, proposal: Proposal) -> None:
        """Learn from the KL that an audit has measured, for the steps to come."""

    def known(self, name: str, proposal: Proposal) -> Number:
        """What was kept under `name`."""
        number: Tensor = getattr(self, name)
        return float(number) if proposal.on_host else number.clone()

    def carry(self, name: str, value: Number, proposal: Proposal, usable: Flag) -> None:
        """Keep a number for the next steps, if it is usable and the step is sound."""
        number: Tensor = getattr(self, name)
        number.fill_(where(proposal.sound & usable, value, number))

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).clone() for name in self.initial}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this budget's numbers from a state; those that another budget's lacks start anew."""
        for name, value in self.initial.items():
            getattr(self, name).copy_(torch.as_tensor(state.get(name, value)))

    def to(self, device: torch.device) -> None:
        for name in self.initial:
            setattr(self, name, getattr(self, name).to(device))
