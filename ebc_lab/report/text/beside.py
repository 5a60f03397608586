"""The table of a suite whose arms differ in what they keep beside the weights: its price in loss and time."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from ebc_lab.config.parts.memory import MemoryConfig
from ebc_lab.records.decisions import Arm, Difference, FinalsTrack, SuiteTrack

from . import words
from .arms import Results, results_of
from .table import Cell, Column, Table, filled, loss_column
from .words import NOTHING, percent, signed

KEPT = [figure.key for figure in MemoryConfig.figures]
COLUMNS = (
    Column("Arm", "name", short="arm", head=True),
    loss_column("Validation loss", "val. loss"),
    Column("Difference in test loss", "figure", short="difference"),
    Column("State", "figure", words.size, "state"),
    Column("Gradients", "figure", words.size, "gradients"),
    Column("Activations, packed", "figure", words.size, "activations", optional=True),
    Column("Steps/s", "figure", words.brief, "steps/s", optional=True),
    Column("KL within ±30%", "figure", percent, "KL ±30%", optional=True),
)
NOTE = (
    "means over the completed seeds; difference: arm minus its reference, paired by seed, with its "
    "interval by itself; bytes beside the weights: optimizer state, gradients at their height, and "
    "activations where they are packed; steps/s as the runs took them, several at a time"
)


def beside_weights(
    name: str,
    track: FinalsTrack | SuiteTrack,
    results: Results | None = None,
    names: Iterable[str] | None = None,
) -> Table | None:
    """Return what each arm keeps beside the weights, and what that costs, in the order of `names`; None where
    the arms do not differ in it."""
    if not any(set(KEPT) & set(arm.get("figures", ())) for arm in track["arms"].values()):
        return None
    rows = []
    for label in names or track["arms"]:
        arm = track["arms"][label]
        figures = arm["figures"]
        values = (
            label,
            figures.get("val_loss"),
            _difference(arm.get("difference")),
            *(figures.get(key, Cell(NOTHING)) for key in KEPT),
            None if track.get("steps_cost") else _steps_per_s(arm, results),  # that one is paired
            figures.get("kl_within_30pct") if arm["ebc"] else None,
        )
        rows.append(filled(COLUMNS, values, chosen=label == track.get("reference")))
    return Table(name, "Beside the weights", COLUMNS, rows, NOTE)


def _difference(d: Difference | None) -> Cell:
    if not d or d.get("mean") is None:
        return Cell(NOTHING)
    low, high = d.get("low"), d.get("high")
    interval = f" [{signed(low)}, {signed(high)}]" if low is not None and high is not None else ""
    return Cell(signed(d["mean"]) + interval, d["mean"])


def _steps_per_s(arm: Arm, results: Results | None) -> float | None:
    runs = results_of(arm, results) or ()
    done = [r for r in runs if r.get("outcome") == "completed" and r.get("train_s")]
    return statistics.fmean(r["steps"] / r["train_s"] for r in done) if done else None
