"""From a step's values to its row in steps.csv."""

from __future__ import annotations

import torch
from torch import Tensor

from ebc_lab.ebc import StepStats
from ebc_lab.records.columns import STEP_COLUMNS

from .pending import Values

COUNTED = ("measurements", "audit_tokens")
RECORDED = {  # column of steps.csv -> name in StepStats
    name: {"grad_scale": "gradient_scale"}.get(name, name)
    for name in STEP_COLUMNS
    if name not in ("step", "lr", "c", "eta_eff", "skipped")
}


def recorded(stats: StepStats) -> Values:
    """What is to be recorded of a step's StepStats, by their names, not yet read."""
    counted = {name: getattr(stats, name) for name in COUNTED}
    found = {name: value for name, value in vars(stats).items() if isinstance(value, Tensor)}
    return found | {k: torch.full((), n, device=stats.skipped.device) for k, n in counted.items() if n}
