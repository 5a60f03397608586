"""Is mine better? The arm that is asked about beside every other, and how much was tried of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from ebc_lab.records.decisions import Arm, Decision, Difference, StepCost, SuiteTrack, TunedArm
from ebc_lab.study.stages.stage import candidates_of
from ebc_lab.study.stages.statistics import centre_of, in_octaves, level
from ebc_lab.study.stages.suite import other_size

from . import words
from .arms import lr_window, point_in_words, test_loss
from .table import OPEN, PAGE, Cell, Column, Row, Table, filled, loss_column
from .words import NOTHING, brackets, brief, signed

TUNED_WINDOW = {"": "LR window: by the validation loss of the tuning", **OPEN}
STEP_TIME = {"": "time of a step against the reference’s", "[": "[its spread over the pairs]"}
NATS = "test loss in nats per token; a difference below zero is better"


def intervals_in_words(differences: Iterable[Difference | None]) -> str:
    """Return what a table's intervals are: how sure, for how many comparisons, and what they allow for."""
    known = [d for d in differences if d]
    luck = "; tuning noise included" if any("luck" in d for d in known) else ""
    return f"{level(known)} intervals, joint over all comparisons{luck}"


def pair_cells(difference: Difference | None) -> tuple[Cell, Cell, Cell]:
    """Return a paired difference, the interval that judges it, and the verdict: three cells."""
    if not difference:
        return Cell(NOTHING), Cell(NOTHING), Cell(NOTHING)
    centre = centre_of(difference)
    interval = Cell(limits(difference, "joint_low", "joint_high"), difference["joint_low"])
    return Cell(signed(centre, 3), centre), interval, verdict_cell(difference)


def limits(d: Mapping[str, Any], low: str, high: str) -> str:
    """Return an interval: a limit that is absent is infinite by rank, and not known by t."""
    if low not in d or (d[low] is None and d[high] is None and d.get("method") != "rank"):
        return NOTHING
    ends = brackets(d[low], d[high], partial(signed, digits=3))
    return "(−∞, ∞)" if ends == NOTHING else ends


def verdict_cell(difference: Difference) -> Cell:
    """Return what the joint interval says of a difference; nothing without a pair of runs."""
    if not difference["seeds"]:
        return Cell(NOTHING)
    verdict = words.verdict_of(difference)
    return Cell(verdict, tone=words.BADGES[verdict])


# -- is mine better? -----------------------------------------------------------------------------------------


def is_better(name: str, label: str, track: SuiteTrack, tuned: Mapping[str, TunedArm]) -> Table:
    """Return an arm asked about beside every other, best rival first: its tuning, and the difference from it.

    `tuned`: what `tune` chose for each arm; empty where nothing was tuned.
    """
    columns = (  # on a phone the first three are on screen
        Column("Arm", "name", short="arm", head=True),
        Column(f"{label} minus this arm", "figure", short="difference"),
        Column(f"{label} is", short=f"{label} is"),
        Column("Joint interval", "figure", short="joint interval"),
        loss_column("Test loss", "test loss"),
        Column("Best learning rate", "figure", brief, "best lr"),
        Column("Schedule", short="schedule", on=(PAGE,), optional=True),
        Column("Warm-up, steps", "figure", brief, "warm-up", on=(PAGE,), optional=True),
        Column("LR window, octaves", "figure", short="LR window", optional=True, notes=TUNED_WINDOW),
        Column("Time of a step", "figure", short="step", optional=True, notes=STEP_TIME),
    )
    answer = track["answers"][label]
    costs = track.get("steps_cost") or {}
    rivals = sorted((n for n in track["arms"] if n != label), key=lambda n: _place(n, track, answer["rival"]))
    rows = []
    for arm in (label, *rivals):
        settings = track["arms"][arm]
        difference, limits, verdict = pair_cells(answer["against"].get(arm))
        values = (
            _named(arm, label, track, answer["rival"]),
            Cell("itself") if arm == label else difference,
            Cell() if arm == label else verdict,
            Cell() if arm == label else limits,
            test_loss(settings, None),
            settings["lr"],
            schedule_in_words(settings),
            settings.get("warmup_steps"),
            _window(tuned.get(arm)),
            _cost(costs.get(arm)),
        )
        rows.append(filled(columns, values, chosen=arm == label))
    note = f"{NATS}; {intervals_in_words(answer['against'].values())}"
    paper = ("Arm", "Test loss", f"{label} minus this arm", "Joint interval", f"{label} is")
    return Table(name, f"{label} beside the others", columns, rows, note, paper=paper)


def _place(name: str, track: SuiteTrack, rival: str | None) -> tuple[bool, float]:
    """Return the key that puts the rival that was picked beforehand first, then orders by test loss."""
    median = track["arms"][name]["test_median"]
    return name != rival, math.inf if median is None else median


def _named(arm: str, label: str, track: SuiteTrack, rival: str | None) -> Cell:
    notes = ["reference"] if arm == track["reference"] else []
    notes += ["best of the others by validation"] if arm == rival and not other_size(label, track) else []
    if size := other_size(arm, track):
        return Cell(f"{arm} ({size})", page=arm, note=", ".join([*notes, size]))
    return Cell(arm, page=arm, note=", ".join(notes))


def schedule_in_words(arm: Arm) -> str:
    """Return the shape of an arm's learning rate; empty where the decision does not say it."""
    return str(arm.get("lr_schedule") or "").replace("_", " ")


def _window(tuned: TunedArm | None) -> Cell:
    span = lr_window(tuned)
    return Cell(in_octaves(span).removesuffix(" octaves"), span["octaves"]) if span else Cell()


def _cost(cost: StepCost | None) -> Cell:
    """Return how many times the reference's step an arm's step takes."""
    if not cost:
        return Cell()
    low, high = cost.get("low"), cost.get("high")
    spread = f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else ""
    ratio = f"×{cost['ratio']:.2f}"
    return Cell(ratio, cost["ratio"], page=ratio + spread)


# -- what was tried ------------------------------------------------------------------------------------------


TRIED = (
    Column("Arm", "name", short="arm", head=True),
    Column("Points", "figure", brief, "points"),
    Column(
        "of these added",
        "figure",
        brief,
        "added",
        notes={"": "added: where the best one lay on an edge, or to end the LR window"},
    ),
    Column("Seeds", "figure", brief, "seeds"),
    Column("Runs", "figure", brief, "runs"),
    Column("Learning rates", short="learning rates", optional=True),
    Column("Schedules", "prose", short="schedules", optional=True),
    Column("Warm-ups, share", short="warm-ups", optional=True),
    Column("Chosen", "prose", short="chosen"),
)


Grids = Mapping[str, Mapping[str, Sequence[Any]]]  # arm -> setting -> the values asked for


def tried(name: str, decision: Decision, track: str, arms: Iterable[str], grids: Grids) -> Table | None:
    """Return how much was tried of each arm before its best point was taken: that all were tuned alike. None
    where none of the arms was tuned. `grids`: what was asked for."""
    tuned = words.tuned_arms(decision, track)
    rows: list[Row] = []
    for label in (arm for arm in arms if arm in tuned):
        chosen = tuned[label]
        runs = [c for c in candidates_of(track, decision) if c["role"] == label]
        points = len({c["arm"] for c in runs})
        rates = sorted({c["lr"] for c in runs})
        values = (
            label,
            points,
            len(chosen["extended"]),
            len({c["seed"] for c in runs}),
            chosen["runs"],
            f"{brief(rates[0])} to {brief(rates[-1])}" if rates else "",
            _values(grids.get(label, {}), "schedule"),
            _values(grids.get(label, {}), "warmup_share"),
            point_in_words(chosen),
        )
        rows.append(filled(TRIED, values))
    note = "points: settings tried, of which validation loss chose one"
    return Table(name, "What was tried of each arm", TRIED, rows, note) if rows else None


def _values(grid: Mapping[str, Sequence[Any]], key: str) -> str:
    """Return the values of a setting that were tried."""
    return ", ".join(v.replace("_", " ") if isinstance(v, str) else brief(v) for v in grid.get(key, ()))
