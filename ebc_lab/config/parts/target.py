"""A loss that runs are to reach: how soon each does, and how surely an arm's runs end below it.

It changes nothing in a run, and is no part of its name: the same runs can be judged by another target. What a
result says of it is told from the run's curve, and so is what a suite says of an arm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..fields import setting
from ..part import Figure, Part

LOSS = ("loss",)
Row = Sequence[Any]  # of a curve: step, loss on the fixed windows, seconds of training


@dataclass
class TargetConfig:
    """A loss that runs are to reach (docs/field.md)."""

    name: str = setting("none", "whether there is one", group="target", in_run_id=False)
    loss: float = setting(
        3.28, "loss to be reached, at or below", "nats/token", above=0, high=100, only=LOSS, in_run_id=False
    )
    sigma: float = setting(
        0.0,
        "standard deviation of final losses over seeds, where it is known: then p is a z-test's; 0: it is "
        "estimated from the arm's own runs, and p is a t-test's",
        "nats/token",
        low=0,
        high=10,
        only=LOSS,
        in_run_id=False,
    )
    level: float = setting(
        0.001, "p below which an arm is surely below the target", above=0, below=1, only=LOSS, in_run_id=False
    )


def finite_rows(curve: Iterable[Row]) -> list[tuple[int, float, float]]:
    """Return the evaluations of a curve that have a loss: step, loss, seconds of training."""
    return [
        (int(step), float(loss), float(seconds))
        for step, loss, seconds in curve
        if loss is not None and math.isfinite(loss)
    ]


def first_at_or_below(curve: Iterable[Row], target: float) -> tuple[int, float] | None:
    """Return the steps and the seconds of training until the first evaluation whose loss is at or below the
    target; None where there is none."""
    return next(((step, seconds) for step, loss, seconds in finite_rows(curve) if loss <= target), None)


def of_run(target: TargetConfig, curve: Iterable[Row]) -> Mapping[str, Any]:
    """Return what result.json says of a target: the loss, and the steps to it, None for a miss."""
    if target.name == "none":
        return {}
    reached = first_at_or_below(curve, target.loss)
    return {"target_loss": target.loss, "steps_to_target": reached[0] if reached else None}


def _of_arm(key: str, unit: str, meaning: str, title: str, short: str, form: str = "brief") -> Figure:
    """A figure that the stage `ablation` finds of an arm's runs together."""
    return Figure(key, unit, meaning, title, short, form, averaged=False)


TARGET = Part(
    "target",
    TargetConfig,
    place=210,
    neutral=lambda target: target.name == "none",
    timed=False,
    figures=(
        _of_arm(
            "target_loss",
            "nats/token",
            "the loss that runs are to reach; with `target=loss`",
            "Target",
            "target",
            "four_digits",
        ),
        _of_arm(
            "steps_to_target",
            "steps",
            "to the first evaluation on the fixed windows at or below the target, empty for a miss; of an "
            "arm the mean over its seeds, empty where one missed it",
            "Steps to the target",
            "steps",
        ),
        _of_arm(
            "steps_to_target_sd",
            "steps",
            "their standard deviation over the seeds",
            "σ of the steps",
            "σ steps",
        ),
        _of_arm("target_reached", "runs", "that reached it", "Runs that reached it", "reached"),
        _of_arm("target_runs", "runs", "that completed, n", "n", "n"),
        _of_arm(
            "target_final_loss",
            "nats/token",
            "mean validation loss after the last step, of the completed runs",
            "Final loss",
            "final loss",
            "four_digits",
        ),
        _of_arm(
            "target_final_sd",
            "nats/token",
            "its standard deviation over the seeds, σ",
            "σ of the final loss",
            "σ",
            "brief",
        ),
        _of_arm(
            "target_p",
            "0–1",
            "that the mean final loss would come so far below the target by chance, one-sided",
            "p of being below it",
            "p",
        ),
        _of_arm(
            "steps_surely_below",
            "steps",
            "to the first evaluation at which that p, of the losses on the fixed windows there, is below "
            "`target.level`",
            "Steps until surely below",
            "sure at",
        ),
        _of_arm(
            "steps_difference",
            "steps",
            "steps to the target less those of the arm that it is compared with, paired by seed",
            "Steps less the reference’s",
            "Δ steps",
        ),
        _of_arm("steps_difference_low", "steps", "lower end of its 95% interval, by itself", "from", "from"),
        _of_arm("steps_difference_high", "steps", "upper end", "to", "to"),
    ),
    table="Steps to the target",
    note="n: completed runs; p: one-sided, that the mean final loss is below the target; surely below: p of "
    "the fixed windows' loss below `target.level`",
)
