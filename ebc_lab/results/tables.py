"""The tables of one study, from what its files record."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from ebc_lab.config.dicts import from_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.columns import ARM_MEANINGS, DIFFERENCE_MEANINGS, VERDICT_MEANINGS
from ebc_lab.records.decisions import Decision, Difference
from ebc_lab.records.spec import GRID, setting_columns
from ebc_lab.study.stages.compare_arms import reference_of
from ebc_lab.study.stages.stage import decision_that_shows
from ebc_lab.study.stages.verdict import sentence, unfinished, verdict_of
from ebc_lab.study.store.study import Record

from .frames import frame

if TYPE_CHECKING:
    import pandas as pd

Decisions = Mapping[str, Decision]
SETTING = ("stage", "track", "arm", "planned_steps", "lr", "lr_schedule", "warmup_steps", "delta_star")
OF_A_MEASUREMENT = {"overhead": " (overhead)", "step": " (time of a step)"}  # behind its arm's name
MEANS = ("val_loss", "test_loss", "c_median", "kl_median", "clip_rate", "tokens_per_s", "wall_s")


def run_rows(records: Sequence[Record], decisions: Decisions) -> list[dict[str, Any]]:
    """Return a row for each run, with the keys of RUN_MEANINGS, in the order of stages, arms and seeds."""
    tracks = _tracks_of_runs(decisions)
    rows = [_run(record, tracks) for record in records]
    order = [*decisions, *sorted({str(row["stage"]) for row in rows} - set(decisions))]
    return sorted(rows, key=lambda row: (order.index(str(row["stage"])), row["arm"] or "", row["seed"] or 0))


def _run(record: Record, tracks: Mapping[str, str]) -> dict[str, Any]:
    spec = record.spec
    row: dict[str, Any] = {"run_id": record.run_id, "problem": record.problem, **(record.result or {})}
    if spec is None:
        return {**row, "stage": None, "arm": None, "seed": None}
    settings = _settings(spec["config"])
    grid = spec.get("role") == GRID
    return {
        **row,
        **settings,
        "run_id": record.run_id,
        "kind": spec["kind"],
        "stage": spec.get("stage"),
        "role": spec.get("role"),
        "arm": f"{spec.get('arm')}{OF_A_MEASUREMENT.get(spec['kind'], '')}",
        "lr_scale": None if grid else spec.get("lr_scale"),
        "planned_steps": spec["config"]["steps"],
        "track": tracks.get(record.run_id) or f"{settings['optimizer']}_{settings['projection']}",
    }


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's settings by column. If this version cannot read them, return those that every version
    names alike."""
    try:
        return setting_columns(from_dict(RunConfig, dict(config)))
    except (UserError, LookupError):
        ebc = config["stabilizer"]["name"] == "ebc"
        return {
            "seed": config["seed"],
            "lr": config["optimizer"]["lr"],
            **{group: config[group]["name"] for group in ("optimizer", "projection", "stabilizer")},
            "delta_star": config["budget"]["target_kl"] if ebc else None,
        }


def _tracks_of_runs(decisions: Decisions) -> dict[str, str]:
    """Return the track of each run by its id, as decisions give it: the settings of a suite's arm need not
    tell it."""
    track_of: dict[str, str] = {}
    for decision in decisions.values():
        tracks = decision["tracks"]
        if len(tracks) == 1 and decision["stage"] in ("tune", "ablation", "ladder"):
            track_of |= {c["run_id"]: next(iter(tracks)) for c in decision["candidates"]}
        for track, decided in tracks.items():
            for arm in _arms_of(decided).values():
                track_of |= dict.fromkeys(arm.get("runs", {}).values(), track)
    return track_of


def _arms_of(track: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the arms of a decided track that have a run for each seed: those of the finals and of a
    suite."""
    arms = track.get("arms", {})
    return {n: arm for n, arm in arms.items() if isinstance(arm, dict) and isinstance(arm.get("runs"), dict)}


def arms(rows: Sequence[Mapping[str, Any]], decisions: Decisions) -> pd.DataFrame:
    """Return the table of arms. Runs of a stage that are alike in SETTING are one arm."""
    alike: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("kind") == "train":
            alike.setdefault(tuple(row.get(key) for key in SETTING), []).append(row)
    suite_tracks = decisions.get("ablation", {}).get("tracks", {})
    mine = {(track, arm) for track, decided in suite_tracks.items() for arm in decided.get("mine", [])}
    costs = {
        (track, arm): cost["ratio"]
        for track, decided in suite_tracks.items()
        for arm, cost in (decided.get("steps_cost") or {}).items()
    }
    made = []
    for of_arm in alike.values():
        ends = Counter(row.get("outcome") for row in of_arm)
        first = of_arm[0]
        suite = first["stage"] == "ablation"
        made.append(
            {
                **{key: first.get(key) for key in ARM_MEANINGS},
                **_means([row for row in of_arm if row.get("outcome") == "completed"]),
                "seeds": len(of_arm),
                "completed": ends["completed"],
                "diverged": ends["diverged"],
                "mine": (first["track"], first["role"]) in mine,
                "step_cost": costs.get((first["track"], first["arm"])) if suite else None,
            }
        )
    return frame(made, ARM_MEANINGS)


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    means: dict[str, float | None] = dict.fromkeys(("val_sd", "test_sd"))
    for key in MEANS:
        values = [float(row[key]) for row in rows if row.get(key) is not None]
        means[key] = statistics.fmean(values) if values else None
        if key in ("val_loss", "test_loss") and len(values) > 1:
            means[f"{key.removesuffix('_loss')}_sd"] = statistics.stdev(values)
    return means


def differences(decisions: Decisions) -> pd.DataFrame:
    """Return the table of all comparisons of two arms in the decisions."""
    rows = []
    for stage, decision in decisions.items():
        for name, track in decision["tracks"].items():
            for family, arm, reference, difference, more in _compared(track):
                about = {"stage": stage, "track": name, "family": family, "arm": arm, "reference": reference}
                luck = difference.get("luck", {}).get("sd", 0.0)
                rows.append({**difference, **more, **about, "luck": luck})
    return frame(rows, DIFFERENCE_MEANINGS)


Compared = tuple[str, str, str, Mapping[str, Any], Mapping[str, Any]]


def _compared(track: Any) -> Iterator[Compared]:
    """Yield (family, arm, reference, difference, further columns) for each comparison in a decided track."""
    for family, compared in track.get("differences", {}).items():
        for arm, difference in compared.items():
            yield family, arm, reference_of(track, family, arm), difference, {}
    for compared in track.get("lr_windows", {}).values():
        yield "lr_window", compared["arm"], compared["reference"], compared["difference"], {}
    for climb in track.get("climbs", ()):
        compared = {"rungs": climb["overall"], "trend": climb["trend"]}
        compared |= {f"rung_{name}": difference for name, difference in climb["rungs"].items()}
        compared |= {f"kept_{name}": difference for name, difference in climb["carried"].items()}
        for family, difference in compared.items():
            if difference:
                more = {"verdict": verdict_of(difference)}
                yield family, climb["arm"], climb["reference"], difference, more
    answers = track.get("answers") or {}
    for label, arm in _arms_of(track).items():
        asked = answers.get(label, {"against": {}})
        if arm.get("difference") and arm["versus"] not in asked["against"]:
            more = {"verdict": verdict_of(arm["difference"])}
            yield "versus", label, arm["versus"], arm["difference"], more
    for label, answer in answers.items():
        for other, difference in answer["against"].items():
            rival = other == answer["rival"]
            needed = difference["seeds_needed"]
            yield "mine", label, other, difference, {"rival": rival, "seeds_needed": needed}


def verdict(decisions: Decisions) -> pd.DataFrame:
    """Return the table of the study's questions: the lines of the verdict, or the answers of a suite."""
    rows = []
    judged = decision_that_shows("verdict", decisions) or {"tracks": {}}
    for track, decided in judged["tracks"].items():
        rows += [{**line, "track": track} for line in decided["verdict"]]
    for track, label, answer in _suite_lines(decisions):
        asked = f"Is {label} better than {answer['rival']}?" if answer["rival"] else f"Is {label} better?"
        rows.append(
            {**answer, "track": track, "name": label, "question": asked, "figure": answer["sentence"]}
        )
    return frame(rows, VERDICT_MEANINGS)


def _suite_lines(decisions: Decisions) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (track, arm, answer) for each of the user's own arms in a suite or, if it has none, for each arm
    that is compared with another."""
    asked = list(answers(decisions))
    yield from asked
    suite = {} if asked else decisions.get("ablation", {}).get("tracks", {})
    for track, decided in suite.items():
        for label, arm in decided["arms"].items():
            if (d := arm.get("difference")) and d["seeds"]:
                rival, verdict = arm["versus"], verdict_of(d)
                judged = cast(Difference, {**d, "verdict": verdict, "seeds_needed": d.get("seeds_needed")})
                text = sentence(label, rival, {rival: judged})
                yield track, label, {"rival": rival, "verdict": verdict, "sentence": text}


def lost(decisions: Decisions) -> list[str]:
    """Return a sentence for each arm of a suite without a finished run."""
    tracks = decisions.get("ablation", {}).get("tracks", {})
    return [line for track in tracks.values() for line in unfinished(track)]


def answers(decisions: Decisions) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (track, arm, answer) for each of the user's own arms that the suite judges."""
    for track, decided in decisions.get("ablation", {}).get("tracks", {}).items():
        for label, answer in (decided.get("answers") or {}).items():
            yield track, label, answer
