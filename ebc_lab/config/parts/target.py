"""A target loss: in how many steps, seconds and tokens runs reach it, and how surely an arm ends below it.

A target changes nothing in a run and is not part of a run's name, so the same runs can be judged by another
target. All figures about a target are computed from the loss curves of runs.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..fields import setting
from ..part import Figure, Head, Part

LOSS = ("loss",)
NOT_ON_A_TERMINAL = ("paper", "page")
Row = Sequence[Any]  # a point of a loss curve: step, loss on the fixed windows, seconds of training


def _arm_figure(key: str, unit: str, meaning: str, head: Head) -> Figure:
    """Return a figure that is computed once from all runs of an arm, rather than averaged over the runs."""
    return Figure(key, unit, meaning, head, averaged=False)


@dataclass
class TargetConfig(Part):
    """A loss that runs are to reach (docs/workloads.md)."""

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

    off = "none"
    place = 210
    timed = False
    figures = (
        _arm_figure(
            "target_loss",
            "nats/token",
            "the loss that runs are to reach; with `target=loss`",
            Head("Target", "target", "four_digits", note="target: a validation loss, as is the final one"),
        ),
        _arm_figure(
            "steps_to_target",
            "steps",
            "to the first evaluation on the fixed windows at or below the target, empty for a miss; of an "
            "arm the mean over its seeds, empty where one missed it",
            Head("Steps to the target", "steps"),
        ),
        _arm_figure(
            "steps_to_target_sd",
            "steps",
            "their standard deviation over the seeds",
            Head("σ of the steps", "σ steps", places=NOT_ON_A_TERMINAL),
        ),
        _arm_figure(
            "seconds_to_target",
            "s",
            "of training until then on the machine that trained, likewise",
            Head("Seconds to the target", "seconds", note="seconds: as the machine was loaded"),
        ),
        _arm_figure(
            "tokens_to_target",
            "tokens",
            "read until then (images under `workload=images`), likewise",
            Head("Tokens to the target", "tokens"),
        ),
        _arm_figure("target_reached", "runs", "that reached it", Head("Runs that reached it", "reached")),
        _arm_figure("target_runs", "runs", "that completed, n", Head("n", "n", note="n: completed runs")),
        _arm_figure(
            "target_final_loss",
            "nats/token",
            "mean validation loss after the last step, of the completed runs",
            Head("Final loss", "final loss", "four_digits"),
        ),
        _arm_figure(
            "target_final_sd",
            "nats/token",
            "its standard deviation over the seeds, σ",
            Head("σ of the final loss", "σ", places=NOT_ON_A_TERMINAL),
        ),
        _arm_figure(
            "target_p",
            "0–1",
            "that the mean final loss would come so far below the target by chance, one-sided",
            Head(
                "p of being below it", "p", note="p: one-sided, that the mean final loss is below the target"
            ),
        ),
        _arm_figure(
            "steps_surely_below",
            "steps",
            "to the first evaluation at which that p, of the losses on the fixed windows there, is below "
            "`target.level`",
            Head(
                "Steps until surely below",
                "sure at",
                note="surely below: p of the loss there below `target.level`",
            ),
        ),
        _arm_figure(
            "steps_difference",
            "steps",
            "steps to the target less those of the arm that it is compared with, paired by seed",
            Head("Steps less the reference’s", "Δ steps"),
        ),
        _arm_figure(
            "steps_difference_low", "steps", "lower end of its 95% interval, by itself", Head("from", "from")
        ),
        _arm_figure("steps_difference_high", "steps", "upper end", Head("to", "to")),
        _arm_figure(
            "seconds_ratio",
            "×",
            "seconds to the target over those of the arm that it is compared with, geometric mean over the "
            "seeds of both; empty where a run of these missed it",
            Head("Seconds over the reference’s", "× s", "two_digits"),
        ),
    )
    table = "Steps, seconds and tokens to the target"

    def reached(self, curve: Iterable[Row]) -> dict[str, float | None]:
        """Return the entries of result.json about the target: its loss in nats per token, and the number of
        steps until the run's curve reached it, None for a miss. Empty if there is no target."""
        if self.changes_nothing():
            return {}
        reached = first_at_or_below(curve, self.loss)
        return {"target_loss": self.loss, "steps_to_target": reached[0] if reached else None}


def finite_rows(curve: Iterable[Row]) -> list[tuple[int, float, float]]:
    """Return (step, loss, seconds of training) for each evaluation of a curve with a finite loss."""
    return [
        (int(step), float(loss), float(seconds))
        for step, loss, seconds in curve
        if loss is not None and math.isfinite(loss)
    ]


def first_at_or_below(curve: Iterable[Row], target: float) -> tuple[int, float] | None:
    """Return (steps, seconds of training) at the first evaluation whose loss is at or below the target, or
    None if there is none."""
    return next(((step, seconds) for step, loss, seconds in finite_rows(curve) if loss <= target), None)
