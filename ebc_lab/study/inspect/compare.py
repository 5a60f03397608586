"""Two studies side by side: settings, corpus, machine, runs in common, decisions, verdicts, arms. Reads, never writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ebc_lab.config.dicts import flat

from ..stages import decision_that_shows, stage_of
from ..stages.rules import TIMING
from ..store.snapshot import Snapshot, read
from ..store.study import Study

RESOLVED = ("device", "dtype", "threads_per_run", "compile")
OF_A_PLACE = ("study.name", "created")


def compare(a: Study, b: Study) -> dict[str, Any]:
    """What differs between two studies, and what they have in common; pairs are (in a, in b).

    Raises UserError when one is not there, or a file of one was edited.
    """
    snapshots = read(a), read(b)
    heads = [snapshot.header for snapshot in snapshots]
    settings = flat(heads[0]["requested"]), flat(heads[1]["requested"])
    machine = [
        {**flat(h["versions"]), **h["environment"], "git": h["git"], **flat(h["hardware"])} for h in heads
    ]
    decisions = [snapshot.sound_decisions() for snapshot in snapshots]
    stages = [s for s in decisions[0] if s in decisions[1]]
    return {
        "studies": [a.name, b.name],
        "roots": [str(a.root), str(b.root)],
        "settings": _unequal(*settings, leave=OF_A_PLACE),
        "resolved": {
            k: v for k, v in _unequal(heads[0]["config"], heads[1]["config"]).items() if k in RESOLVED
        },
        "corpus": [{k: h["corpus"][k] for k in ("title", "sha256")} for h in heads],
        "same_corpus": heads[0]["corpus"]["sha256"] == heads[1]["corpus"]["sha256"],
        "machine": _unequal(machine[0], machine[1]),
        "runs": _runs(snapshots),
        "decided": [list(decisions[0]), list(decisions[1])],
        "decisions": {s: _figures(s, decisions[0][s], decisions[1][s]) for s in stages},
        "verdict": _verdict(*(decision_that_shows("verdict", d) for d in decisions)),
        "arms": _arms(*decisions),
    }


def _unequal(a: Mapping[str, Any], b: Mapping[str, Any], leave: tuple[str, ...] = ()) -> dict[str, list[Any]]:
    keys = dict.fromkeys([*a, *b])
    return {k: [a.get(k), b.get(k)] for k in keys if a.get(k) != b.get(k) and k not in leave}


def _runs(snapshots: Sequence[Snapshot]) -> dict[str, Any]:
    """The runs that both planned, and whether their results are equal, timing aside."""
    found = []
    for snapshot in snapshots:
        records = snapshot.sound_records()
        found.append(
            {
                r.run_id: r.result
                for r in records
                if r.result is not None and r.spec and r.spec["kind"] == "train"
            }
        )
    common = [r for r in found[0] if r in found[1]]
    different = {}
    for run_id in common:
        keys = _unequal(found[0][run_id], found[1][run_id], leave=TIMING)
        if keys:
            different[run_id] = keys
    return {
        "counts": [len(found[0]), len(found[1])],
        "common": len(common),
        "equal": len(common) - len(different),
        "different": different,
    }


def _figures(stage: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Track -> figure -> pair; a track that only one of them kept has None on the other side."""
    tracks = dict.fromkeys([*a["tracks"], *b["tracks"]])
    return {
        track: {
            figure.path: pair
            for figure in stage_of(stage).figures
            if (pair := [figure.value(d["tracks"].get(track)) for d in (a, b)]) != [None, None]
        }
        for track in tracks
    }


def _verdict(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Each line of the verdicts, side by side; `flipped` where they do not say the same."""
    lines = [
        {
            (track, line["name"]): line
            for track, found in (d or {"tracks": {}})["tracks"].items()
            for line in found["verdict"]
        }
        for d in (a, b)
    ]
    out = []
    for track, name in dict.fromkeys([*lines[0], *lines[1]]):
        pair = [own.get((track, name)) for own in lines]
        says = [x["verdict"] if x else None for x in pair]
        figures = [x["figure"] if x else None for x in pair]
        flipped = None not in says and says[0] != says[1]
        out.append({"track": track, "name": name, "verdict": says, "figure": figures, "flipped": flipped})
    return out


def _arms(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arms that both have, with the mean test loss of the seeds that completed, and b's minus a's."""
    out = {}
    for shown in ("verdict", "arms"):
        own = [
            {
                (track, name): arm
                for track, found in (decision_that_shows(shown, d) or {"tracks": {}})["tracks"].items()
                for name, arm in found["arms"].items()
            }
            for d in (a, b)
        ]
        for track, name in (key for key in own[0] if key in own[1]):
            arms = [d[track, name] for d in own]
            losses = [arm["test_loss"] for arm in arms]
            out[name if shown == "verdict" else f"{track}: {name}"] = {
                "seeds": [len(arm["runs"]) for arm in arms],
                "test_loss": losses,
                "difference": None if None in losses else losses[1] - losses[0],
            }
    return out
