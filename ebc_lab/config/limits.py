"""Limits that several settings share: far beyond any real study, and near enough that a slip of the keyboard
is refused at once instead of planned for minutes."""

from __future__ import annotations

from typing import Any

STEPS = 10**8  # a run of a day at a thousand steps a second
TOKENS = 10**15  # to train on
SEED = 10**9  # every generator of random numbers takes it
SEEDS = 100  # of one stage
SECONDS = 10**7  # four months
EXTENSIONS = 20  # times a grid may double: a million-fold
LR: dict[str, Any] = {
    "low": 1e-12,
    "high": 1e6,
}  # what doubles or halves from there on stays a number above 0
# of a measured best value; smaller ones have no name of an arm
MULTIPLE: dict[str, Any] = {"low": 1e-4, "high": 1e4}
GRID: dict[str, Any] = {"low": 1e-9, "high": 1e9, "increasing": True}
