"""The tables of a study that carries one constant of each unit to settings that it was not chosen on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean
from typing import Any

from ebc_lab.records.columns import UNIT_MEANINGS
from ebc_lab.records.decisions import BrokenRuns, Decision, Difference, UnitFound, UnitsTrack
from ebc_lab.study.stages.carry import STAGE, VERDICTS, against
from ebc_lab.study.stages.statistics import by_interval, centre_of

from . import words
from .table import PAGE, PAPER, Cell, Column, Table, filled, loss_column
from .words import NOTHING, brief, fixed, signed

ARMS = (
    Column("Arm", "name", short="arm", head=True),
    Column("Measured in", short="unit"),
    loss_column("Excess when carried", "excess"),
    Column("Worst setting", short="worst"),
    loss_column("Excess tuned in each setting", "tuned"),
    Column("Best constants spread over", "figure", short="octaves"),
    Column("Broken runs", "figure", short="broken"),
    Column("Minus the reference", "figure", short="difference"),
    Column("Interval", short="interval", on=(PAGE, PAPER)),
    Column("Verdict", short="verdict"),
)
SETTINGS = (
    Column("Setting", "name", short="setting", head=True),
    Column("What is different", short="about", on=(PAGE, PAPER)),
    Column("Best arm", "name", short="best arm"),
    Column("Its constant", "figure", brief, "constant"),
    loss_column("Test loss there", "test loss"),
)


def figures(decision: Decision, track: str) -> Iterator[dict[str, Any]]:
    """Yield one mapping for each arm in each setting, of the columns in UNIT_MEANINGS."""
    decided: UnitsTrack = decision["tracks"][track]
    for arm, found in decided["arms"].items():
        for setting, curve in found["curves"].items():
            one = found["carried"].get(setting)
            difference = decided["by_setting"].get(arm, {}).get(setting)
            row = {
                "track": track,
                "arm": arm,
                "unit": found["unit"],
                "over": found["over"],
                "setting": setting,
                "kept": decided["settings"][setting]["kept"],
                "best": curve["best"],
                "edge": curve["edge"],
                "best_val_loss": curve["loss"],
                "constant": one["constant"] if one else None,
                "regret": one["regret"] if one else None,
                "test_loss": fmean(one["test"].values()) if one else None,
                "excess": one["excess"] if one else None,
                "tuned_excess": one["tuned"] if one else None,
                "diverged": len(one["diverged"]) if one else None,
                "difference": centre_of(difference) if difference else None,
                "low": difference["low"] if difference else None,
                "high": difference["high"] if difference else None,
            }
            yield {key: row[key] for key in UNIT_MEANINGS}


def units(name: str, decision: Decision, track: str) -> Table:
    """Return what each arm loses when its constant is carried, the least first."""
    decided: UnitsTrack = decision["tracks"][track]
    order = sorted(decided["arms"], key=lambda arm: (_excess(decided["arms"][arm]), arm))
    rows = []
    for arm in order:
        found = decided["arms"][arm]
        tuned = [one["tuned"] for one in found["carried"].values()]
        difference, ends = _differs(decided, arm)
        values = (
            Cell(arm, page=arm, note=found["about"]),
            found["unit"],
            found["excess"],
            _worst(found),
            fmean(tuned) if tuned else None,
            _octaves(found),
            share(found["broken"]),
            difference,
            ends,
            _judged(decided, arm),
        )
        rows.append(filled(ARMS, values, chosen=arm == order[0]))
    settings = len(decided["settings"])
    note = (
        f"nats per token, test loss, mean of {settings} settings; excess: above the setting's best arm at "
        "its best constant; octaves between the lowest and the highest of the settings' best constants, ≥ "
        "where one lies on the edge of what was tried; broken runs at the carried constants: diverged, or "
        f"more than {decided['broken']:g} nats above their setting's median"
    )
    return Table(name, "One constant of each unit in every setting", ARMS, rows, note)


def _excess(found: UnitFound) -> float:
    return math.inf if found["excess"] is None else found["excess"]


def _worst(found: UnitFound) -> Cell:
    worst = found["worst"]
    return Cell(f"{worst} {signed(found['carried'][worst]['excess'], 3)}") if worst else Cell(NOTHING)


def _octaves(found: UnitFound) -> Cell:
    if found["octaves"] is None:
        return Cell(NOTHING)
    return Cell("≥ " * found["open"] + fixed(found["octaves"], 1), found["octaves"])


def share(runs: BrokenRuns) -> Cell:
    """Return `3 of 80`."""
    return Cell(f"{runs['broken']} of {runs['runs']}", runs["broken"] / max(1, runs["runs"]))


def _differs(decided: UnitsTrack, arm: str) -> tuple[Cell, Cell]:
    if arm == decided["reference"]:
        return Cell("reference"), Cell()
    d = by_interval(decided["against"][arm], joint=True)
    return Cell(signed(centre_of(d)), centre_of(d)), Cell(words.interval(d["low"], d["high"]))


def _judged(decided: UnitsTrack, arm: str) -> Cell:
    if arm not in decided["verdicts"]:
        return Cell()
    return Cell(VERDICTS[decided["verdicts"][arm]])


def settings(name: str, decision: Decision, track: str) -> Table:
    """Return the best that any arm reached in each setting."""
    decided: UnitsTrack = decision["tracks"][track]
    rows = []
    for setting, of in decided["settings"].items():
        kept = "kept for the judgement" if of["kept"] else ""
        values = (
            Cell(setting, page=setting, note=kept),
            of["about"],
            of["arm"] or NOTHING,
            of["value"],
            of["test_loss"],
        )
        rows.append(filled(SETTINGS, values))
    return Table(name, "The best in each setting", SETTINGS, rows, "nats per token, test loss")


def answer(track: UnitsTrack) -> dict[str, str]:
    """Return what the study found, in a word and a sentence."""
    won = [arm for arm, word in track["verdicts"].items() if word == "earns"]
    lost = all(word in ("loses", "no gain") for word in track["verdicts"].values())
    reference = track["reference"]
    if won:
        word = f"{' and '.join(won)} {'earns its' if len(won) == 1 else 'earn their'} cost over {reference}."
    elif lost:
        word = f"No challenger earns its cost over {reference}."
    else:
        word = f"Undecided whether {' or '.join(_undecided(track))} earns its cost over {reference}."
    places = worst_and_best(track)
    return {"word": word, "text": f"{STAGE.headline(track)}.{places}"}


def _undecided(track: UnitsTrack) -> list[str]:
    return [arm for arm, word in track["verdicts"].items() if word == "undecided"]


def worst_and_best(track: UnitsTrack) -> str:
    """Say, of each challenger, in which setting it gains and loses most, and what it comes to with the
    settings as the sample."""
    said = ""
    for arm in track["challengers"]:
        means = {name: m for name, d in track["by_setting"][arm].items() if (m := centre_of(d)) is not None}
        if not means:
            continue
        low, high = min(means, key=lambda n: means[n]), max(means, key=lambda n: means[n])
        said += f" {arm} from {track['reference']}: {signed(means[low])} at best ({low}), "
        said += f"{signed(means[high])} at worst ({high})"
        over: Difference = track["over_settings"][arm]
        said += f"; with the settings as the sample {against(over)}."
    return said
