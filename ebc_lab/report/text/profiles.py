"""The tables of a study of profiles: each method's score, and its time on each workload over the best's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from ebc_lab.records.columns import PROFILE_MEANINGS
from ebc_lab.records.decisions import Decision, Profiled, ProfilesTrack
from ebc_lab.study.stages.profiles import STAGE
from ebc_lab.study.stages.statistics import in_octaves

from . import words
from .table import Cell, Column, Table, filled, two_digits

SCORES = (
    Column("Place", "figure", words.brief, "place"),
    Column("Method", "name", short="method", head=True),
    Column("Score, by steps", "figure", lambda x: words.fixed(x, 3), "score"),
    Column("Interval", short="interval"),
    Column("By seconds of training", "figure", lambda x: words.fixed(x, 3), "by seconds"),
    Column("On the workloads that chose nothing", "figure", lambda x: words.fixed(x, 3), "on the others"),
    Column("Configuration", "prose", short="configuration"),
    Column("LR sensitivity", "figure", lambda x: words.fixed(x, 3), "LR sens.", optional=True),
    Column("LR window", short="LR window", optional=True),
    Column("Missed", "prose", short="missed", optional=True),
)


def point_in_words(point: Mapping[str, Any] | None) -> str:
    """Write `lr 0.004, horizon 0.5`, a method's configuration."""
    values = {key.rpartition(".")[2]: value for key, value in (point or {}).items()}
    return ", ".join(f"{key} {words.brief(value)}" for key, value in values.items()) or words.NOTHING


def span_in_words(found: Profiled) -> str:
    """Write `0.70 to 0.90`, a score's interval."""
    if found["low"] is None or found["high"] is None:
        return words.NOTHING
    return f"{found['low']:.2f} to {found['high']:.2f}"


def scores(name: str, decision: Decision, track: str) -> Table:
    """Return the methods by their scores, the highest first."""
    decided: ProfilesTrack = decision["tracks"][track]
    rows = []
    for method, found in _ranked(decided):
        missed = [place for place, at in found["workloads"].items() if at["median_steps"] is None]
        told = [at["sensitivity"] for at in found["sensitivity"].values() if at["sensitivity"] is not None]
        windows = [f"{place} {in_octaves(at['window'])}" for place, at in found["sensitivity"].items()]
        values = [
            found["place"],
            method,
            found["score"],
            span_in_words(found),
            found["score_seconds"],
            found["score_others"],
            point_in_words(found["point"]),
            statistics.fmean(told) if told else Cell(words.NOTHING),
            "; ".join(windows) or words.NOTHING,
            ", ".join(missed) or words.NOTHING,
        ]
        rows.append(filled(SCORES, values, chosen=method in decided["asked_about"]))
    note = (
        f"score: mean share of the workloads within a ratio τ of the best method's time, τ from 1 to "
        f"{decided['most']:g}; interval: bootstrap over the seeds, of these workloads and configurations; LR "
        "sensitivity in nats, mean over the workloads of the calibration, and the LR window on each"
    )
    return Table(name, "Scores", SCORES, rows, note)


def ratios(name: str, decision: Decision, track: str) -> Table:
    """Return each method's median steps to the target over those of the best method on the workload."""
    decided: ProfilesTrack = decision["tracks"][track]
    places = decided["workloads"]
    columns = [
        Column("Method", "name", short="method", head=True),
        *(Column(place, "figure", two_digits, place) for place in places),
    ]
    rows = []
    for method, found in _ranked(decided):
        at = [found["workloads"].get(place) for place in places]
        shown = [Cell("missed") if r and r["ratio"] is None else r and r["ratio"] for r in at]
        rows.append(filled(columns, [method, *shown], chosen=method in decided["asked_about"]))
    best = [
        f"{place} {words.brief(w['best_steps'])} steps to {words.fixed(w['loss'])}"
        for place, w in places.items()
        if w["best_steps"] is not None
    ]
    return Table(
        name, "Steps to the target, over those of the best method", columns, rows, f"best: {'; '.join(best)}"
    )


def _ranked(track: ProfilesTrack) -> list[tuple[str, Profiled]]:
    return sorted(track["methods"].items(), key=lambda item: (item[1]["place"], item[0]))


def figures(decision: Decision, track: str) -> list[dict[str, Any]]:
    """Return one mapping a method and workload, of the columns in PROFILE_MEANINGS."""
    decided: ProfilesTrack = decision["tracks"][track]
    rows = []
    for method, found in _ranked(decided):
        for place, at in found["workloads"].items():
            rate = found["sensitivity"].get(place)
            span = rate["window"] if rate else None
            row = {
                "track": track,
                "method": method,
                "workload": place,
                "point": point_in_words(found["point"]),
                "target": decided["workloads"][place]["loss"],
                "chose": decided["workloads"][place]["calibrates"],
                "seeds": len(at["steps"]),
                "reached": sum(steps is not None for steps in at["steps"].values()),
                "diverged": len(at["diverged"]),
                "steps": at["median_steps"],
                "train_s": at["median_seconds"],
                "ratio": at["ratio"],
                "ratio_seconds": at["ratio_seconds"],
                "lr_sensitivity": rate["sensitivity"] if rate else None,
                "lr_window": span["octaves"] if span else None,
            }
            whole = ("score", "low", "high", "score_seconds", "score_others", "place")
            rows.append(row | {key: found[key] for key in whole})  # type: ignore[literal-required]
    assert all(set(row) == set(PROFILE_MEANINGS) for row in rows)
    return rows


def answer(track: ProfilesTrack) -> dict[str, str]:
    """Return what the profiles say, in a word and a sentence."""
    first = [method for method, found in _ranked(track) if found["place"] == 1]
    score = words.fixed(track["methods"][first[0]]["score"], 2)
    leads = "scores" if len(first) == 1 else "score"
    return {
        "word": f"{' and '.join(first)} {leads} highest, {score} of 1.",
        "text": f"{STAGE.headline(track)}.",
    }
