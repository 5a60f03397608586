"""A comparison of two studies: settings, corpus, machine, common runs, decisions, verdicts and arms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ebc_lab.config.dicts import flat
from ebc_lab.config.identity import by_name
from ebc_lab.records.columns import BITS
from ebc_lab.records.spec import track_prefix

from ..stages.rules import TIMING
from ..stages.stage import concluding_stages, decision_that_shows, stage_of
from ..stages.suite import point_in_words
from ..store.changes import as_this_version_says, later_stages
from ..store.counts import TRAINING, counted
from ..store.snapshot import Snapshot, read
from ..store.study import Record, Study

RESOLVED = ("device", "dtype", "threads_per_run", "compile")
ARMS = "ablation.arms"  # prefix of the settings of a suite's arms

K = TypeVar("K")


def compare(a: Study, b: Study) -> dict[str, Any]:
    """Return what differs between two studies and what they have in common, as pairs [in a, in b]. Raises
    UserError if either study is missing, or if one of its files is damaged or edited."""
    snapshots = read(a), read(b)
    with a.blame_files(), b.blame_files():
        heads = [snapshot.header for snapshot in snapshots]
        decisions = [snapshot.sound_decisions() for snapshot in snapshots]
        corpora = [{k: h["corpus"][k] for k in ("title", "sha256")} for h in heads]
        asked = [h["requested"] for h in heads]
        later = later_stages(*asked)
        requested = [
            flat({key: value for key, value in as_this_version_says(settings).items() if key not in later})
            for settings in asked
        ]
        resolved = unequal(*(h["config"] for h in heads))
        both = [stage for stage in decisions[0] if stage in decisions[1]]
        figures = {stage: _figures(stage, *(made[stage] for made in decisions)) for stage in both}
        return {
            "studies": [a.name, b.name] if a.name != b.name else _distinct_ends(a.place, b.place),
            "roots": [str(a.root), str(b.root)],
            "answers": list(map(_answer, decisions)),
            "tuned": _paired(*map(_tuned, decisions)),
            "settings": _settings(requested),
            "resolved": {k: pair for k, pair in resolved.items() if k in RESOLVED},
            "corpus": corpora,
            "same_corpus": corpora[0]["sha256"] == corpora[1]["sha256"],
            "machine": unequal(*map(_machine, heads)),
            "runs": _runs(snapshots),
            "decided": list(map(list, decisions)),
            "decisions": figures,
            "verdict": _verdict(decisions),
            "arms": _arms(decisions),
        }


def _paired(a: Mapping[K, Any], b: Mapping[K, Any]) -> dict[K, list[Any]]:
    """Return key -> [value in a, value in b] for the keys of either; None stands for a missing value."""
    return {key: [a.get(key), b.get(key)] for key in dict.fromkeys([*a, *b])}


def unequal(a: Mapping[str, Any], b: Mapping[str, Any], *, leave: Sequence[str] = ()) -> dict[str, list[Any]]:
    return {key: [x, y] for key, (x, y) in _paired(a, b).items() if x != y and key not in leave}


def _distinct_ends(*places: Path) -> list[str]:
    """Return the shortest trailing parts by which two paths differ."""
    for parts in range(1, max(len(place.parts) for place in places)):
        ends = ["/".join(place.parts[-parts:]) for place in places]
        if ends[0] != ends[1]:
            return ends
    return list(map(str, places))


def _answer(decisions: Mapping[str, Any]) -> list[str]:
    """Return the headlines of the decisions that conclude a study; an empty list if the last does not."""
    last = next(reversed([*decisions]), None)
    if not last or not stage_of(last).concludes:
        return []
    return [
        line for name in concluding_stages(decisions) for line in stage_of(name).headlines(decisions[name])
    ]


def _tuned(decisions: Mapping[str, Any]) -> dict[str, str]:
    """Return tuned arm -> the point that tuning chose for it, in words."""
    tracks = decisions["tune"]["tracks"] if "tune" in decisions else {}
    return {
        f"{track_prefix(track, tracks)}{label}": point_in_words(arm["point"])
        for track, found in tracks.items()
        for label, arm in found["arms"].items()
    }


def _settings(asked: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the settings that differ. An arm that only one study has is one entry: its description."""
    names = [{key.split(".")[2] for key in settings if key.startswith(f"{ARMS}.")} for settings in asked]
    lines: dict[str, list[Any]] = {}
    # in a study without arms, `ARMS` itself is a key
    for key, pair in unequal(*asked, leave=("study.name", ARMS)).items():
        name = key.split(".")[2] if key.startswith(f"{ARMS}.") else None
        if name in names[0] ^ names[1]:
            about = [settings.get(f"{ARMS}.{name}.about") or "given" for settings in asked]
            lines[f"arm {name}"] = [x if name in of else None for x, of in zip(about, names, strict=True)]
        else:
            lines[key] = pair
    return lines


def _machine(header: Mapping[str, Any]) -> dict[str, Any]:
    versions = {**flat(header["versions"]), **by_name(header["environment"])}
    return {**versions, "git": header["git"], **flat(header["hardware"])}


def _runs(snapshots: Sequence[Snapshot]) -> dict[str, Any]:
    """Return the number of runs of each study, the number of runs that both studies trained, and the figures
    in which the two results of such a run differ. Timing figures are not compared."""
    a, b = map(_trained, snapshots)
    common = {run_id: (a[run_id], b[run_id]) for run_id in a if run_id in b}
    different = {}
    for run_id, pair in common.items():
        checksums = [record.brief.checksum for record in pair]
        if checksums[0] and checksums[0] == checksums[1]:  # equal results need not be read
            continue
        if figures := unequal(*(record.result or {} for record in pair), leave=TIMING):
            different[run_id] = figures
    weights = [[record.brief.weights for record in pair] for pair in common.values()]
    known = [pair for pair in weights if None not in pair]
    return {
        "counts": [counted(snapshot.sorts_of_runs().values()) for snapshot in snapshots],
        "common": len(common),
        "equal": len(common) - len(different),
        # number of runs whose checksum both studies recorded, and number of those in which it is equal
        "weights": {"compared": len(known), "equal": sum(x == y for x, y in known)},
        "different": different,
    }


def _trained(snapshot: Snapshot) -> dict[str, Record]:
    """Return, by run id, the records of the training runs that have ended and are in use (`sorts_of_runs`).
    Raises UserError if the files of any run are damaged or edited."""
    sorts = snapshot.sorts_of_runs()
    sound = snapshot.sound_records()
    return {r.run_id: r for r in sound if sorts.get(r.run_id) == TRAINING and r.brief.outcome}


def _figures(stage: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Return track -> figure -> its values in the two decisions; None if a decision lacks the track."""
    found: dict[str, Any] = {}
    for track, sides in _paired(a["tracks"], b["tracks"]).items():
        pairs = {figure.path: [figure.value(side) for side in sides] for figure in stage_of(stage).figures}
        found[track] = {path: pair for path, pair in pairs.items() if pair != [None, None]}
    return found


def _verdict(decisions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of both verdicts in pairs. `flipped`: both studies have the line, but with different
    verdicts."""
    out = []
    for (track, name), pair in _paired(*(_entries(d, "verdict", "verdict") for d in decisions)).items():
        verdicts, figures = ([line and line[key] for line in pair] for key in ("verdict", "figure"))
        flipped = None not in verdicts and verdicts[0] != verdicts[1]
        line = {"track": track, "name": name, "verdict": verdicts, "figure": figures, "flipped": flipped}
        out.append(line)
    return out


def _arms(decisions: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, for each arm that both studies have, the number of seeds and the mean test loss (nats/token) in
    each study, and the loss in b minus the loss in a."""
    out = {}
    for shown in ("verdict", "arms"):
        pairs = _paired(*(_entries(d, shown, "arms") for d in decisions))
        tracks = {track for track, _ in pairs}
        for (track, name), pair in pairs.items():
            if None in pair:
                continue
            losses = [arm["test_loss"] for arm in pair]
            measured = any(BITS in arm for arm in pair)
            bits = {BITS: [_bits_per_character(arm) for arm in pair]} if measured else {}
            prefix = "" if shown == "verdict" else track_prefix(track, tracks)
            out[f"{prefix}{name}"] = {
                "seeds": [len(arm["runs"]) for arm in pair],
                "test_loss": losses,
                **bits,
                "difference": None if None in losses else losses[1] - losses[0],
            }
    return out


def _entries(decisions: Mapping[str, Any], shown: str, key: str) -> dict[tuple[str, str], Any]:
    """Return (track, name) -> arm or line of the verdict, as `key` says, from the decision that shows
    `shown`; empty if there is no such decision."""
    decision = decision_that_shows(shown, decisions)
    found: dict[tuple[str, str], Any] = {}
    for track, about in decision["tracks"].items() if decision else ():
        entries = about[key]
        named = entries if isinstance(entries, Mapping) else {line["name"]: line for line in entries}
        found |= {(track, name): entry for name, entry in named.items()}
    return found


def _bits_per_character(arm: Mapping[str, Any]) -> Any:
    """Return an arm's test loss in bits per character. If the loss was not recorded in this unit, a token
    counts as one character."""
    nats = arm["test_loss"]
    return arm.get(BITS, None if nats is None else nats / math.log(2))
