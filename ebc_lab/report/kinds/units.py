"""One constant of each unit, carried to settings that it was not chosen on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean
from typing import Any

from ebc_lab.records.columns import UNIT_MEANINGS
from ebc_lab.records.decisions import BrokenRuns, UnitFound, UnitsTrack
from ebc_lab.study.stages.carry import STAGE, VERDICTS, against
from ebc_lab.study.stages.statistics import by_interval, centre_of

from ..text.glance import intervals_in_words
from ..text.table import PAGE, PAPER, Cell, Column, Table, filled, loss_column, noted
from ..text.words import NOTHING, brief, fixed, interval, percent, signed
from .kind import Answer, Evidence, Kind, Tile, difference_tile

EXCESS = {"": "excess: above the setting's best arm at its best constant, by validation loss"}
OCTAVES = {
    "": "octaves between the lowest and the highest of the settings' best constants",
    "≥": "≥ where one lies on the edge of what was tried",
}
ARMS = (  # on a phone the first three are on screen
    Column("Arm", "name", short="arm", head=True),
    Column("Minus the reference", "figure", short="difference"),
    Column("Verdict", short="verdict"),
    Column("Interval", short="interval", on=(PAGE, PAPER)),
    Column("Measured in", short="unit"),
    loss_column("Excess when carried", "excess", notes=EXCESS),
    Column("Worst setting", short="worst"),
    loss_column("Excess tuned in each setting", "tuned"),
    Column("Best constants spread over", "figure", short="octaves", notes=OCTAVES),
    Column("Broken runs", "figure", short="broken", notes={"": "broken runs: at the carried constants"}),
    Column(
        "Broken at any constant", "figure", short="broken, all", on=(PAGE,), notes={"": "at any: of the grid"}
    ),
)
SETTINGS = (
    Column("Setting", "name", short="setting", head=True),
    Column("What is different", short="about", on=(PAGE, PAPER)),
    Column("Best arm", "name", short="best arm", notes={"": "best: by validation loss"}),
    Column("Its constant", "figure", brief, "constant"),
    loss_column("Test loss there", "test loss"),
)


class Units(Kind):
    shows = "units"
    file = "carry.csv"
    columns = UNIT_MEANINGS

    def rows(self, found: Evidence) -> Iterator[dict[str, Any]]:
        """Yield a row for each arm in each setting."""
        for track, decided in found.tracks.items():
            for arm, found_of_arm in decided["arms"].items():
                for setting in found_of_arm["curves"]:
                    yield _row(track, decided, arm, setting)

    def tables(self, found: Evidence) -> list[Table]:
        arms = [_arms(f"units-{name}", track) for name, track in found.tracks.items()]
        return [*arms, *(_settings(f"settings-{name}", track) for name, track in found.tracks.items())]

    def answers(self, found: Evidence) -> list[Answer]:
        return [
            Answer(name, _judgement(track), _sentence(track), _findings(track), _tiles(track))
            for name, track in found.tracks.items()
        ]


KIND = Units()


def _row(track: str, decided: UnitsTrack, arm: str, setting: str) -> dict[str, Any]:
    found = decided["arms"][arm]
    curve, carried = found["curves"][setting], found["carried"].get(setting)
    difference = decided["by_setting"].get(arm, {}).get(setting)
    row: dict[str, Any] = dict.fromkeys(UNIT_MEANINGS)
    row |= {"track": track, "arm": arm, "unit": found["unit"], "over": found["over"], "setting": setting}
    row |= {"kept": decided["settings"][setting]["kept"], "best": curve["best"], "edge": curve["edge"]}
    row["best_val_loss"] = curve["loss"]
    if carried:
        row |= {key: carried[key] for key in ("constant", "regret", "excess")}
        row |= {"test_loss": fmean(carried["test"].values()), "tuned_excess": carried["tuned"]}
        row["diverged"] = len(carried["diverged"])
    if difference:
        row |= {"difference": centre_of(difference), "low": difference["low"], "high": difference["high"]}
    return row


def _arms(name: str, decided: UnitsTrack) -> Table:
    """Return what each arm loses when its constant is carried, the least first."""
    order = sorted(decided["arms"], key=lambda arm: (_excess(decided["arms"][arm]), arm))
    rows = []
    for arm in order:
        found = decided["arms"][arm]
        tuned = [one["tuned"] for one in found["carried"].values()]
        difference, ends = _difference(decided, arm)
        values = (
            Cell(arm, page=arm, note=found["about"]),
            difference,
            Cell(VERDICTS[decided["verdicts"][arm]]) if arm in decided["verdicts"] else Cell(),
            ends,
            found["unit"],
            found["excess"],
            _worst(found),
            fmean(tuned) if tuned else None,
            _octaves(found),
            _share(found["broken"]),
            _share(found["broken_anywhere"]),
        )
        rows.append(filled(ARMS, values, chosen=arm == order[0]))
    note = (
        f"nats per token, test loss, mean of {len(decided['settings'])} settings; broken: diverged, or more "
        f"than {decided['broken']:g} nats above their setting's median"
    )
    told = {"Interval": {"": intervals_in_words(decided["against"].values())}}
    return Table(name, "One constant of each unit in every setting", noted(ARMS, told), rows, note)


def _excess(found: UnitFound) -> float:
    return math.inf if found["excess"] is None else found["excess"]


def _worst(found: UnitFound) -> Cell:
    worst = found["worst"]
    return Cell(f"{worst} {signed(found['carried'][worst]['excess'], 3)}") if worst else Cell(NOTHING)


def _octaves(found: UnitFound) -> Cell:
    if found["octaves"] is None:
        return Cell(NOTHING)
    return Cell("≥ " * found["open"] + fixed(found["octaves"], 1), found["octaves"])


def _share(runs: BrokenRuns) -> Cell:
    """Return `3 of 80`."""
    return Cell(f"{runs['broken']} of {runs['runs']}", runs["broken"] / max(1, runs["runs"]))


def _difference(decided: UnitsTrack, arm: str) -> tuple[Cell, Cell]:
    if arm == decided["reference"]:
        return Cell("reference"), Cell()
    d = by_interval(decided["against"][arm], joint=True)
    return Cell(signed(centre_of(d)), centre_of(d)), Cell(interval(d["low"], d["high"]))


def _settings(name: str, decided: UnitsTrack) -> Table:
    """Return the best that any arm reached in each setting."""
    rows = []
    for setting, best in decided["settings"].items():
        kept = "kept for the judgement" if best["kept"] else ""
        named = Cell(setting, page=setting, note=kept)
        values = (named, best["about"], best["arm"] or NOTHING, best["value"], best["test_loss"])
        rows.append(filled(SETTINGS, values))
    note = "nats per token, test loss"
    return Table(name, "The best in each setting", SETTINGS, rows, note, places=(PAGE,))


# -- the answer ----------------------------------------------------------------------------------------------


def _judgement(track: UnitsTrack) -> str:
    verdicts = set(track["verdicts"].values())
    if "earns" in verdicts:
        return "beats"
    return "undecided" if "undecided" in verdicts else "misses"


def _sentence(track: UnitsTrack) -> str:
    """Return whether a challenger earns its cost, in a sentence."""
    by_verdict: dict[str, list[str]] = {}
    for arm, verdict in track["verdicts"].items():
        by_verdict.setdefault(verdict, []).append(arm)
    if won := by_verdict.get("earns"):
        earn = "earns its" if len(won) == 1 else "earn their"
        return f"{' and '.join(won)} {earn} cost over {track['reference']}."
    if unsure := by_verdict.get("undecided"):
        return f"Undecided whether {' or '.join(unsure)} earns its cost over {track['reference']}."
    return f"No challenger earns its cost over {track['reference']}."


def _findings(track: UnitsTrack) -> list[str]:
    """Return a line for each challenger: where it gains and loses most, and its mean over the settings."""
    lines = [f"{STAGE.headline(track)}."]
    for arm in track["challengers"]:
        means = {name: m for name, d in track["by_setting"][arm].items() if (m := centre_of(d)) is not None}
        if means:
            low, high = min(means, key=lambda n: means[n]), max(means, key=lambda n: means[n])
            ends = f"{signed(means[low])} at best ({low}), {signed(means[high])} at worst ({high})"
            whole = against(track["over_settings"][arm])
            lines.append(f"{arm} from {track['reference']}: {ends}; with the settings as the sample {whole}.")
    return lines


def _tiles(track: UnitsTrack) -> list[Tile]:
    """Return the best challenger, the unit that carries best, and how many runs broke."""
    best = min(track["verdicts"], key=lambda arm: centre_of(track["against"][arm]) or 0.0)
    what = f"{best} minus {track['reference']}, mean test loss"
    tiles = [difference_tile(what, track["against"][best])]
    found = {arm: f["excess"] for arm, f in track["arms"].items() if f["excess"] is not None}
    if found:
        least = min(found, key=lambda arm: found[arm])
        worst = track["arms"][least]["worst"]
        excess = track["arms"][least]["carried"][worst]["excess"] if worst else None
        remark = f"above the best of all arms; {signed(excess, 3)} at worst ({worst})"
        tiles.append(Tile(f"{least} has the lowest mean excess", signed(found[least], 3), "nats", remark))
    broken = {arm: _share(track["arms"][arm]["broken"]) for arm in (best, track["reference"])}
    rival = percent(broken[track["reference"]].value, 1)
    remark = f"{broken[best].text}; {track['reference']} {rival}"
    return [*tiles, Tile(f"Broken runs of {best}", percent(broken[best].value, 1), "", remark)]
