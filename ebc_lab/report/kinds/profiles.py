"""Profiles: each method's score, and its time on each workload over the best's."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from ebc_lab.records.columns import PROFILE_MEANINGS
from ebc_lab.records.decisions import Profiled, ProfilesTrack
from ebc_lab.study.stages.profiles import STAGE
from ebc_lab.study.stages.profiles.calibration import tokens_per_step
from ebc_lab.study.stages.statistics import in_octaves

from ..text.table import OPEN, Cell, Column, Table, filled, two_digits
from ..text.words import NOTHING, brief, fixed
from .kind import MOST_TILES, Answer, Evidence, Kind, Tile

BOOTSTRAP = {"": "interval: bootstrap over the seeds, of these workloads and configurations"}
SENSITIVITY = {"": "LR sensitivity: in nats, mean over the workloads of the calibration"}
SCORES = (
    Column("Place", "figure", brief, "place"),
    Column("Method", "name", short="method", head=True),
    Column("Score, by steps", "figure", lambda x: fixed(x, 3), "score"),
    Column("Interval", short="interval", notes=BOOTSTRAP),
    Column("By seconds of training", "figure", lambda x: fixed(x, 3), "by seconds"),
    Column("On the workloads that chose nothing", "figure", lambda x: fixed(x, 3), "on the others"),
    Column("Configuration", "prose", short="configuration"),
    Column("LR sensitivity", "figure", lambda x: fixed(x, 3), "LR sens.", optional=True, notes=SENSITIVITY),
    Column("LR window", short="LR window", optional=True, notes=OPEN),
    Column("Missed", "prose", short="missed", optional=True),
)


class Profiles(Kind):
    shows = "profiles"
    file = "profiles.csv"
    columns = PROFILE_MEANINGS

    def rows(self, found: Evidence) -> Iterator[dict[str, Any]]:
        """Yield a row for each method on each workload."""
        each = tokens_per_step(found.config)
        for track, decided in found.tracks.items():
            for method, profiled in ranked(decided):
                for place in profiled["workloads"]:
                    row = _row(decided, profiled, place)
                    tokens = None if row["steps"] is None else row["steps"] * each[place]
                    yield {"track": track, "method": method, **row, "tokens": tokens}

    def tables(self, found: Evidence) -> list[Table]:
        made, each = [], tokens_per_step(found.config)
        for name, decided in found.tracks.items():
            made += [_scores(f"scores-{name}", decided), _ratios(f"ratios-{name}", decided, each)]
        return made

    def answers(self, found: Evidence) -> list[Answer]:
        most = MOST_TILES if found.config.mine else None  # those of mine= are asked about first
        return [self._answer(name, track, most) for name, track in found.tracks.items()]

    def _answer(self, name: str, track: ProfilesTrack, most: int | None) -> Answer:
        """Return who scores highest, and where the methods stand that the study asks about."""
        methods = track["methods"]
        first = [method for method, found in ranked(track) if found["place"] == 1]
        score = fixed(methods[first[0]]["score"], 2)
        sentence = f"{' and '.join(first)} {'scores' if len(first) == 1 else 'score'} highest, {score} of 1."
        tiles = []
        asked = [method for method in track["asked_about"] if method in methods]
        for method in asked[:most] or list(methods):
            found = methods[method]
            remark = f"{_span(found)}, over the seeds" if found["low"] is not None else ""
            place = f"place {found['place']} of {len(methods)}"
            tiles.append(Tile(f"Score of {method}", f"{found['score']:.2f}", place, remark))
        tiles.sort(key=lambda tile: -float(tile.value))
        return Answer(name, "undecided", sentence, [f"{STAGE.headline(track)}."], tiles[:MOST_TILES])


KIND = Profiles()


def _row(decided: ProfilesTrack, found: Profiled, place: str) -> dict[str, Any]:
    there, rate = found["workloads"][place], found["sensitivity"].get(place)
    span = rate["window"] if rate else None
    row = {
        "workload": place,
        "point": _point(found["point"]),
        "target": decided["workloads"][place]["loss"],
        "chose": decided["workloads"][place]["calibrates"],
        "seeds": len(there["steps"]),
        "reached": sum(steps is not None for steps in there["steps"].values()),
        "diverged": len(there["diverged"]),
        "steps": there["median_steps"],
        "train_s": there["median_seconds"],
        "ratio": there["ratio"],
        "ratio_seconds": there["ratio_seconds"],
        "lr_sensitivity": rate["sensitivity"] if rate else None,
        "lr_window": span["octaves"] if span else None,
    }
    whole = ("score", "low", "high", "score_seconds", "score_others", "place")
    return row | {key: found[key] for key in whole}  # type: ignore[literal-required]


def ranked(track: ProfilesTrack) -> list[tuple[str, Profiled]]:
    """Return the methods, the highest score first."""
    return sorted(track["methods"].items(), key=lambda item: (item[1]["place"], item[0]))


def _point(point: Mapping[str, Any] | None) -> str:
    """Return a method's configuration, such as `lr 0.004, horizon 0.5`."""
    values = {key.rpartition(".")[2]: value for key, value in (point or {}).items()}
    return ", ".join(f"{key} {brief(value)}" for key, value in values.items()) or NOTHING


def _span(found: Profiled) -> str:
    """Return a score's interval, such as `0.70 to 0.90`."""
    if found["low"] is None or found["high"] is None:
        return NOTHING
    return f"{found['low']:.2f} to {found['high']:.2f}"


def _scores(name: str, decided: ProfilesTrack) -> Table:
    """Return the methods by their scores, the highest first."""
    rows = []
    for method, found in ranked(decided):
        missed = [place for place, at in found["workloads"].items() if at["median_steps"] is None]
        known = [at["sensitivity"] for at in found["sensitivity"].values() if at["sensitivity"] is not None]
        windows = [f"{place} {in_octaves(at['window'])}" for place, at in found["sensitivity"].items()]
        values = [
            found["place"],
            method,
            found["score"],
            _span(found),
            found["score_seconds"],
            found["score_others"],
            _point(found["point"]),
            statistics.fmean(known) if known else Cell(NOTHING),
            "; ".join(windows) or NOTHING,
            ", ".join(missed) or NOTHING,
        ]
        rows.append(filled(SCORES, values, chosen=method in decided["asked_about"]))
    note = (
        "score: mean share of the workloads within a ratio τ of the best method's time to a validation loss, "
        f"τ from 1 to {decided['most']:g}"
    )
    return Table(name, "Scores", SCORES, rows, note)


def _ratios(name: str, decided: ProfilesTrack, tokens_of_a_step: Mapping[str, int]) -> Table:
    """Return each method's median steps to the target over those of the best method on the workload."""
    places = decided["workloads"]
    columns = [
        Column("Method", "name", short="method", head=True),
        *(Column(place, "figure", two_digits, place) for place in places),
    ]
    rows = []
    for method, found in ranked(decided):
        at = [found["workloads"].get(place) for place in places]
        shown = [Cell("missed") if r and r["ratio"] is None else r and r["ratio"] for r in at]
        rows.append(filled(columns, [method, *shown], chosen=method in decided["asked_about"]))
    best = []
    for place, target in places.items():
        if (steps := target["best_steps"]) is not None:
            took = f"{brief(steps)} steps, {brief(steps * tokens_of_a_step[place])} tokens"
            best.append(f"{place} {took}, to {fixed(target['loss'])}")
    return Table(
        name,
        "Steps to the target, over those of the best method",
        columns,
        rows,
        f"target: a validation loss; best: {'; '.join(best)}",
    )
