"""From the values of a step to its row in steps.csv, and the two streams of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ebc_lab.ebc import StepStats
from ebc_lab.records.columns import CURVE_COLUMNS, EVAL_COLUMNS, FURTHER_STEP_MEANINGS, STEP_COLUMNS
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.streams import Mark, Stream

from .pending import Values

COUNTED = ("measurements", "audit_tokens")
RECORDED = {  # column of steps.csv -> name in StepStats
    name: {"grad_scale": "gradient_scale"}.get(name, name)
    for name in (*STEP_COLUMNS, *FURTHER_STEP_MEANINGS)
    if name not in ("step", "lr", "c", "eta_eff", "skipped", *CURVE_COLUMNS)
}
BY_GROUP = {"s": "contributions", "beta": "sensitivities"}  # the same for columns <kind>_<group>
KEPT_OF_FAILED = ("loss",)  # what is recorded of a step that ended the run
KEPT_OF_BAD_GRADIENT = ("loss", "delta", "target_kl", "radius", "grad_norm")


def recorded(stats: StepStats) -> Values:
    """What is recorded of a step's StepStats, by their names, not read from the device yet."""
    device = stats.skipped.device
    if device.type != "cpu":
        stats.as_tensors()
    counted = {name: getattr(stats, name) for name in COUNTED}
    numbers = {
        k: v for k, v in vars(stats).items() if k not in COUNTED and isinstance(v, Tensor | float | int)
    }
    return numbers | {k: torch.full((), n, device=device) for k, n in counted.items() if n}


def step_row(
    step: int, lr: float, figures: Mapping[str, Any], groups: Sequence[str], *, failed: bool
) -> dict[str, Any]:
    """The row of a step at learning rate `lr` with these values; `failed`: it ended the run."""
    c = 0.0 if failed else figures["clip_coefficient"]
    skipped = failed or bool(figures["skipped"])
    if failed or figures["bad_gradient"]:
        recorded_columns = KEPT_OF_FAILED if failed else KEPT_OF_BAD_GRADIENT
        figures = {name: figures[name] for name in recorded_columns if name in figures}
    row: dict[str, Any] = {"step": step, "lr": lr, "c": c, "eta_eff": c * lr, "skipped": skipped}
    for column, name in RECORDED.items():
        value = figures.get(name)
        measured = value is not None and not math.isnan(value)
        if measured or name == "loss":
            row[column] = int(figures[name]) if column in COUNTED else value
    for kind, name in BY_GROUP.items():
        if name in figures:
            of_groups = zip(groups, figures[name], strict=True)
            row |= {f"{kind}_{group}": value for group, value in of_groups if not math.isnan(value)}
    curve = zip(CURVE_COLUMNS, figures.get("kl_curve", ()), strict=False)
    return row | {column: value for column, value in curve if not math.isnan(value)}


class Recording:
    """steps.csv and evals.csv of one run, without what an earlier attempt wrote after its last checkpoint.

    `groups` are those whose contributions and sensitivities are recorded, `marks` where that checkpoint left
    the streams, `further` columns of steps.csv beside the usual ones, `further_evals` of evals.csv.
    """

    def __init__(
        self,
        files: RunFiles,
        groups: Sequence[str],
        marks: Mapping[str, Mark],
        further: Sequence[str] = (),
        further_evals: Sequence[str] = (),
    ):
        self.groups = groups
        self.of_workload = [name for name in further if name not in RECORDED and name not in CURVE_COLUMNS]
        self.further_evals = further_evals
        by_group = [f"{kind}_{group}" for kind in BY_GROUP for group in groups]
        columns = [*STEP_COLUMNS, *further, *by_group]
        self.steps = Stream(files.steps, columns, marks.get(files.steps.name))
        self.evals = Stream(files.evals, [*EVAL_COLUMNS, *further_evals], marks.get(files.evals.name))
        self.streams: tuple[Stream, ...] = (self.steps, self.evals)

    def marks(self) -> dict[str, Mark]:
        """Everything recorded so far, by file name."""
        return {stream.path.name: stream.mark() for stream in self.streams}

    def step(self, step: int, lr: float, figures: Mapping[str, Any], *, failed: bool) -> None:
        row = step_row(step, lr, figures, self.groups, failed=failed)
        of_workload = {name: figures[name] for name in self.of_workload if name in figures}
        self.steps.append(row | {name: value for name, value in of_workload.items() if not math.isnan(value)})

    def evaluation(self, step: int, figures: Mapping[str, float], *, tokens: int, train_s: float) -> None:
        """What an evaluation after `step` steps, or `tokens` tokens, found on the fixed windows."""
        row = {"step": step, "val_loss": figures["loss"], "val_se": figures["se"], "tokens": tokens}
        further = {name: figures[name] for name in self.further_evals if not math.isnan(figures[name])}
        self.evals.append({**row, "train_s": train_s, **further})

    def flush(self) -> None:
        """Let a reader see every row appended so far."""
        for stream in self.streams:
            stream.file.flush()

    def sync(self) -> None:
        """Every row appended so far is on disk when this returns."""
        for stream in self.streams:
            stream.sync()

    def close(self) -> None:
        for stream in self.streams:
            if not stream.file.closed:
                stream.close()


class Unrecorded(Recording):
    """The streams of a process that is not the first of its run, which alone evaluates: there are none."""

    def __init__(self) -> None:
        self.streams = ()

    def step(self, step: int, lr: float, figures: Mapping[str, Any], *, failed: bool) -> None:
        return
