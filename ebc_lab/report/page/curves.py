"""The loss curves that the page holds as data: its script draws them, and lets the reader read them off.

Losses have four decimals. Where a run has more steps than a screen can show, each point is the median of a
block of them.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ebc_lab.config.errors import UserError
from ebc_lab.records.figures import RunResult
from ebc_lab.records.paths import RunFiles, SpecRecord
from ebc_lab.records.streams import read_columns

MOST_RUNS = 600  # of a study; the stages that end it come first
MOST_POINTS = 120  # of a curve; the screen has few more for it
FEWER_POINTS = 40  # of the training loss, where there are many runs
MANY_RUNS = 150
DIGITS = 4

Run = tuple[str, SpecRecord, RunResult]  # id, spec, result (empty while there is none)
Points = tuple[tuple[int, ...], tuple[float | None, ...]]  # steps, losses


def curves(
    runs: Sequence[Run],
    files: Callable[[str], RunFiles],
    stages: Sequence[str],
    name: Callable[[str, str], str],
    places: Mapping[str, int],
) -> tuple[dict[str, Any], list[str]]:
    """Return the curves of runs as the page's script reads them, and what of their files is damaged.

    `stages`: in the order in which they are offered; `name`: stage and arm -> how the page calls the arm;
    `places`: of arms in the palette, where they have one throughout.
    """
    found: list[tuple[Run, Points | None, Points | None]] = []
    damaged: list[str] = []
    points = FEWER_POINTS if len(runs) > MANY_RUNS else MOST_POINTS
    order = sorted(runs, key=lambda run: stages.index(run[1]["stage"]))
    for run in order[:MOST_RUNS]:
        paths = files(run[0])
        try:
            validation = _curve(paths.evals, "val_loss", MOST_POINTS)
            training = _curve(paths.steps, "loss", points)
        except UserError as error:
            damaged.append(str(error))
            continue
        if validation or training:
            found.append((run, validation, training))
    return {**_packed(found, name, places), "leftOut": max(0, len(runs) - MOST_RUNS)}, damaged


def _packed(
    found: Iterable[tuple[Run, Points | None, Points | None]],
    name: Callable[[str, str], str],
    places: Mapping[str, int],
) -> dict[str, Any]:
    """Return runs that refer to their arm and to their steps by number, since most have these in common."""
    arms: dict[tuple[str, str], int] = {}
    steps: dict[tuple[int, ...], int] = {}
    runs = []
    for (run_id, spec, result), validation, training in found:
        arm = arms.setdefault((spec["stage"], spec["arm"]), len(arms))
        run: dict[str, Any] = {"id": run_id, "arm": arm, "seed": spec["config"]["seed"]}
        if (outcome := result.get("outcome") or "open") != "completed":
            run["outcome"] = outcome
        for kind, curve in (("validation", validation), ("training", training)):
            if curve:
                run[kind] = [steps.setdefault(curve[0], len(steps)), curve[1]]
        runs.append(run)
    named = [{"stage": stage, "name": name(stage, arm), "place": places.get(arm)} for stage, arm in arms]
    return {"arms": named, "steps": list(steps), "runs": runs}


def as_script(data: Mapping[str, Any]) -> str:
    """Return data as JSON that cannot end the element that it stands in."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _curve(path: Path, column: str, most: int) -> Points | None:
    """Return a column of a stream at `most` steps; None where it has no rows. Raises UserError."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return _read(path, column, most, status.st_mtime_ns, status.st_size) if status.st_size else None


@functools.lru_cache(maxsize=2 * MOST_RUNS)  # `watch` makes the page again whenever a run moves on
def _read(path: Path, column: str, most: int, modified: int, size: int) -> Points | None:
    """Return the median of each block of steps, at the block's last step: where there are few, every step."""
    read = read_columns(path, ("step", column), alone=True)
    steps, losses = read["step"], read[column]
    if not len(steps):
        return None
    blocks = np.array_split(np.arange(len(steps)), min(len(steps), most))
    medians = [float(np.median(losses[block])) for block in blocks]
    rounded = (round(loss, DIGITS) if math.isfinite(loss) else None for loss in medians)
    return tuple(int(steps[block[-1]]) for block in blocks), tuple(rounded)
