"""Pictures of a study that carries one constant of each unit to settings that it was not chosen on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from ebc_lab.records.decisions import UnitFound, UnitSetting, UnitsTrack

from ..sheet.figure import EBC, INK, STRONG
from ..suite.windows import PALE, Look


def looks_of(track: UnitsTrack) -> dict[str, Look]:
    """Return how each arm is marked: challengers strongly, the reference in black, the others paler."""
    strong = itertools.cycle(dict.fromkeys((EBC, *STRONG)))
    pale = itertools.cycle(PALE)
    looks: dict[str, Look] = {}
    for arm in track["arms"]:
        if arm in track["challengers"]:
            looks[arm] = (next(strong), "o", "-")
        elif arm == track["reference"]:
            looks[arm] = (INK, "D", "-")
        else:
            looks[arm] = next(pale)
    return looks


def by_excess(track: UnitsTrack) -> list[str]:
    """Return the arms that were judged, the one that carries best first."""
    judged: Mapping[str, float] = {
        arm: found["excess"] for arm, found in track["arms"].items() if found["excess"] is not None
    }
    return sorted(judged, key=lambda arm: (judged[arm], arm))


def seeds_of(track: UnitsTrack) -> int:
    """Return how many seeds the arms have."""
    tests: Sequence[int] = [
        len(one["test"]) for found in track["arms"].values() for one in found["carried"].values()
    ]
    return max(tests, default=0)


def called(named: Mapping[str, UnitFound] | Mapping[str, UnitSetting], name: str) -> str:
    """Return what an arm or a setting is, in the study's words."""
    return named[name]["about"] or name
