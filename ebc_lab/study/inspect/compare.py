"""Two studies side by side: settings, corpus, machine, runs in common, decisions, verdicts, arms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebc_lab.config.dicts import flat
from ebc_lab.config.identity import by_name
from ebc_lab.records.columns import BITS
from ebc_lab.records.spec import track_prefix

from ..stages.rules import TIMING
from ..stages.stage import decision_that_shows, stage_of
from ..stages.suite import point_in_words
from ..store.counts import TRAINING, counted
from ..store.snapshot import Snapshot, read
from ..store.study import Record, Study

RESOLVED = ("device", "dtype", "threads_per_run", "compile")
ARMS = "ablation.arms."  # how the settings of a suite's arms begin


def compare(a: Study, b: Study) -> dict[str, Any]:
    """Return what differs between two studies, and what they have in common, in pairs: of a, of b.

    Raises UserError where one is not there, or one of its files was edited.
    """
    snapshots = read(a), read(b)
    with a.blame_files(), b.blame_files():
        heads = [snapshot.header for snapshot in snapshots]
        decisions = [snapshot.sound_decisions() for snapshot in snapshots]
        corpora = [{k: h["corpus"][k] for k in ("title", "sha256")} for h in heads]
        resolved = _unequal(heads[0]["config"], heads[1]["config"])
        names = [a.name, b.name] if a.name != b.name else _distinct_ends(a.place, b.place)
        asked = flat(heads[0]["requested"]), flat(heads[1]["requested"])
        answers: list[list[str]] = []
        for made in decisions:  # the headlines of the last one, where its stage concludes a study
            ends = [stage for stage in list(made)[-1:] if stage_of(stage).concludes]
            answers.append(stage_of(ends[0]).headlines(made[ends[0]]) if ends else [])
        return {
            "studies": names,
            "roots": [str(a.root), str(b.root)],
            "answers": answers,
            "tuned": _tuned(*decisions),
            "settings": _with_arms_in_short(_unequal(*asked, leave=("study.name",)), *asked),
            "resolved": {k: pair for k, pair in resolved.items() if k in RESOLVED},
            "corpus": corpora,
            "same_corpus": corpora[0]["sha256"] == corpora[1]["sha256"],
            "machine": _unequal(_machine(heads[0]), _machine(heads[1])),
            "runs": _runs(*snapshots),
            "decided": [list(decisions[0]), list(decisions[1])],
            "decisions": {
                s: _figures(s, *(d[s] for d in decisions)) for s in decisions[0] if s in decisions[1]
            },
            "verdict": _verdict(*(decision_that_shows("verdict", d) for d in decisions)),
            "arms": _arms(*decisions),
        }


def _distinct_ends(*places: Path) -> list[str]:
    """Return the shortest ends of two paths that differ."""
    for parts in range(1, max(len(place.parts) for place in places)):
        ends = ["/".join(place.parts[-parts:]) for place in places]
        if ends[0] != ends[1]:
            return ends
    return list(map(str, places))


def _tuned(*decisions: Mapping[str, Any]) -> dict[str, list[str | None]]:
    """Return arm -> its tuned point in each study, in words. An arm that is tuned in neither is left out."""
    points: list[dict[str, str]] = []
    for study in decisions:
        tracks = study["tune"]["tracks"] if "tune" in study else {}
        points.append(
            {
                f"{track_prefix(track, tracks)}{label}": point_in_words(arm["point"])
                for track, arms in tracks.items()
                for label, arm in arms["arms"].items()
            }
        )
    return {
        label: [study.get(label) for study in points] for label in dict.fromkeys([*points[0], *points[1]])
    }


def _with_arms_in_short(
    unequal: Mapping[str, list[Any]], *requested: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """Return the settings that differ. An arm that only one study has is one entry: what the arm is about."""
    names = [{key.split(".")[2] for key in settings if key.startswith(ARMS)} for settings in requested]
    lines: dict[str, list[Any]] = {}
    for key, pair in unequal.items():
        if f"{key}." == ARMS:  # of a study that has none
            continue
        name = key.split(".")[2] if key.startswith(ARMS) else None
        if name is None or all(name in settings for settings in names):
            lines[key] = pair
            continue
        about = (settings.get(f"{ARMS}{name}.about") or "given" for settings in requested)
        lines[f"arm {name}"] = [
            x if name in settings else None for x, settings in zip(about, names, strict=True)
        ]
    return lines


def _machine(header: Mapping[str, Any]) -> dict[str, Any]:
    versions = {**flat(header["versions"]), **by_name(header["environment"])}
    return {**versions, "git": header["git"], **flat(header["hardware"])}


def _unequal(a: Mapping[str, Any], b: Mapping[str, Any], leave: tuple[str, ...] = ()) -> dict[str, list[Any]]:
    keys = dict.fromkeys([*a, *b])
    return {k: [a.get(k), b.get(k)] for k in keys if a.get(k) != b.get(k) and k not in leave}


def _runs(*snapshots: Snapshot) -> dict[str, Any]:
    """Return how many runs each study has, how many of them both have, and which of these have results that
    differ in more than timing."""
    a, b = (_trained(snapshot) for snapshot in snapshots)
    common = [run_id for run_id in a if run_id in b]
    different = {}
    for run_id in common:
        checksums = a[run_id].brief.checksum, b[run_id].brief.checksum
        if checksums[0] and checksums[0] == checksums[1]:  # then neither result need be read
            continue
        if figures := _unequal(a[run_id].result or {}, b[run_id].result or {}, leave=TIMING):
            different[run_id] = figures
    weights = [pair for r in common if None not in (pair := (a[r].brief.weights, b[r].brief.weights))]
    return {
        "counts": [counted(snapshot.sorts_of_runs().values()) for snapshot in snapshots],
        "common": len(common),
        "equal": len(common) - len(different),
        # of how many runs both recorded the checksum, and of how many of these it is the same
        "weights": {"compared": len(weights), "equal": sum(x == y for x, y in weights)},
        "different": different,
    }


def _trained(snapshot: Snapshot) -> dict[str, Record]:
    """Return the training runs by run id that some decision uses and that have ended. Raises UserError where
    one of their files was edited."""
    sorts = snapshot.sorts_of_runs()
    sound = snapshot.sound_records()
    return {r.run_id: r for r in sound if sorts.get(r.run_id) == TRAINING and r.brief.outcome}


def _figures(stage: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Return track -> figure -> its value in each decision, None where a decision has no such track."""
    figures: dict[str, Any] = {}
    for track in dict.fromkeys([*a["tracks"], *b["tracks"]]):
        sides = [d["tracks"].get(track) for d in (a, b)]
        pairs = {figure.path: [figure.value(side) for side in sides] for figure in stage_of(stage).figures}
        figures[track] = {path: pair for path, pair in pairs.items() if pair != [None, None]}
    return figures


def _verdict(*decisions: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return each line of the verdicts side by side, `flipped` where both have one and these disagree."""
    lines = [
        {(track, line["name"]): line for track, found in _tracks(d) for line in found["verdict"]}
        for d in decisions
    ]
    out = []
    for track, name in dict.fromkeys([*lines[0], *lines[1]]):
        pair = [study.get((track, name)) for study in lines]
        verdicts = [x["verdict"] if x else None for x in pair]
        out.append(
            {
                "track": track,
                "name": name,
                "verdict": verdicts,
                "figure": [x["figure"] if x else None for x in pair],
                "flipped": None not in verdicts and verdicts[0] != verdicts[1],
            }
        )
    return out


def _arms(*decisions: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the arms that both studies have: how many seeds, their mean test loss, and b's minus a's."""
    out = {}
    for shown in ("verdict", "arms"):
        ends = [decision_that_shows(shown, d) for d in decisions]
        arms = [
            {(track, name): arm for track, found in _tracks(d) for name, arm in found["arms"].items()}
            for d in ends
        ]
        for track, name in (key for key in arms[0] if key in arms[1]):
            pair = [study[track, name] for study in arms]
            losses = [arm["test_loss"] for arm in pair]
            bits = {BITS: list(map(_bits_per_character, pair))} if any(BITS in arm for arm in pair) else {}
            tracks = {key[0] for study in arms for key in study}
            prefix = "" if shown == "verdict" else track_prefix(track, tracks)
            out[f"{prefix}{name}"] = {
                "seeds": [len(arm["runs"]) for arm in pair],
                "test_loss": losses,
                **bits,
                "difference": None if None in losses else losses[1] - losses[0],
            }
    return out


def _tracks(decision: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    """Return (track, what was found in it) of each track; none without a decision."""
    return [] if decision is None else [*decision["tracks"].items()]


def _bits_per_character(arm: Mapping[str, Any]) -> float | None:
    """Return the bits per character of an arm; where it does not say them, its tokens are characters."""
    nats = arm["test_loss"]
    usual = None if nats is None else nats / math.log(2)
    bits: float | None = arm.get(BITS, usual)
    return bits
