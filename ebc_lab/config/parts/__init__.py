"""The parts of a run, in the order in which they show in its name."""

from __future__ import annotations

from typing import Any

from ..part import Part
from .budget import BUDGET
from .controller import CONTROLLER
from .data import DATA
from .determinism import DETERMINISM
from .ebm import DECODER, EBM_PART, ENCODER, INDEX, SAMPLER
from .lr_schedule import LR_SCHEDULE
from .memory import MEMORY
from .model import MODEL
from .optimizer import OPTIMIZER
from .partition import PARTITION
from .policy import POLICY
from .projection import PROJECTION
from .quantizer import QUANTIZER
from .shock import SHOCK
from .stabilizer import STABILIZER
from .tokens import TOKENS
from .workload import WORKLOAD

PARTS: tuple[Part[Any], ...] = (
    *(DATA, OPTIMIZER, PROJECTION, STABILIZER, BUDGET, CONTROLLER, LR_SCHEDULE, MODEL, SHOCK),
    *(QUANTIZER, MEMORY, PARTITION, POLICY),
    *(WORKLOAD, TOKENS, ENCODER, DECODER, INDEX, SAMPLER, EBM_PART, DETERMINISM),
)
PART: dict[str, Part[Any]] = {part.name: part for part in PARTS}
