"""What the page shows, as plain data: gathered from a study's files and from nothing else.

`gather` reads, the templates lay out. Nothing here is decided again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ebc_lab.config.dicts import flat, to_dict
from ebc_lab.config.errors import UserError, visible
from ebc_lab.config.schema import STAGES, Config
from ebc_lab.records.decisions import Decision, NoiseFloor
from ebc_lab.records.figures import FINISHED, RunResult
from ebc_lab.study.inspect import status, why
from ebc_lab.study.inspect.reproduce import (
    again,
    continuing,
    decides_all,
    departures,
    fresh_seeds,
    ways_to_decide,
)
from ebc_lab.study.inspect.slots import in_words
from ebc_lab.study.stages.compare_arms import in_bits
from ebc_lab.study.stages.rules import Undecidable
from ebc_lab.study.stages.stage import concluding_stages, stage_of
from ebc_lab.study.stages.statistics import by_interval
from ebc_lab.study.store import manifest
from ebc_lab.study.store.changes import describe_earlier_looks
from ebc_lab.study.store.counts import trained_in_words, upgraded
from ebc_lab.study.store.snapshot import Snapshot, read
from ebc_lab.study.store.study import Record, Study, StudyHeader, run_again

from .. import kinds
from ..kinds.candidates import has_control
from ..pictures.drawing.looks import study_looks
from ..text import tables, words
from ..text.table import PAGE, Table
from ..text.words import capital, fixed, optimizer, setting
from .curves import Run, curves
from .ruler import Ruler, draw_intervals

CHECKED = ("*.json", "*.csv", "*.md", "*.tex")  # files whose checksums the page states
MOST_ROWS = 200  # of a table with a row for each run: a browser takes seconds for thousands
NAMED = 12  # runs of a cause of failure that the page leads to


def gather(study: Study, *, lenient: bool = False) -> dict[str, Any]:
    """Return everything the page tells of a study. `lenient`: damage is told in `problems` where possible.

    Raises UserError: there is no study, or one of its files was truncated or edited. Call it, and
    whatever shows what it returns, within `Study.blame_files`.
    """
    snapshot = read(study, strict=not lenient)
    header, config = snapshot.header, snapshot.config
    problems = list(snapshot.problems)
    try:
        decisions = snapshot.sound_decisions()
    except UserError as error:
        if not lenient:
            raise
        decisions = {}
        problems.append(str(error))
    trained = [r for r in snapshot.records if r.brief.kind == "train"]
    read_runs = [(r.run_id, r.spec, r.result) for r in trained]  # each file once
    results = {run_id: result for run_id, _, result in read_runs if result}
    runs = [(run_id, spec, result or RunResult()) for run_id, spec, result in read_runs if spec]
    found = {s: kinds.Evidence(d, config, decisions, results) for s, d in decisions.items()}
    sections = [_section(found[s]) for s in concluding_stages(decisions)]
    sections.sort(key=lambda section: not any(answer["checks"] for answer in section["answers"]))
    floors = why.noise_floor(decisions)
    ways = ways_to_decide(decisions)
    fresh = fresh_seeds(study, header, ways)
    loss_curves, damaged = _curves(study, runs, found)
    by = snapshot.trained_by()
    broken = _broken(study, header["study"], trained)
    named = {f"run-{run_id}" for group in broken for run_id in group["runs"][:NAMED]}
    # `watch` serves the page alone, and not the files beside it
    every_run = _runs(runs, in_bits(config), _files_of(study, loss_curves, beside=not lenient), named)
    rows = {row.id for row in every_run.rows}
    settings = {k: v for k, v in flat(header["config"]).items() if k != "output_dir"}
    waiting = [s for s in config.study.stages if s not in decisions]
    return {
        "name": header["study"],
        "header": header,
        "problems": [*problems, *damaged],
        "looked": describe_earlier_looks(header),
        "drift": words.DELTA_DRIFT if config.controller.name == "pi" else "",
        "question": _question(config),
        "facts": _facts(config, header, found, results),
        "tokens": words.tokens(config),
        "sections": sections,
        "answers": [{**answer, "of": s["title"]} for s in sections for answer in s["answers"]],
        "decided": {s: _decision(s, found[s], floors, rows) for s in _by_weight(decisions, config)},
        "open": waiting,
        "early": _early(snapshot) if waiting else None,
        "carry_on": continuing(study, header) if waiting and study.resumable else None,
        "trained_by": trained_in_words(by),
        "upgraded": upgraded(by, header["study"]),
        "slots": in_words(busy) if (busy := status.slots_used(snapshot)) else "",
        "broken": broken,
        "runs": every_run,
        "curves": loss_curves,
        "again": again(study, portable=True),
        "rerun": run_again(header["study"], "RUN"),
        "more_seeds": again(study, *fresh, portable=True) if fresh else None,
        "decides_all": decides_all(ways),
        "settings": settings,
        "setting_tables": _setting_tables(departures(study, header), settings),
        "checksums": _checksums(study, decisions),
    }


def _early(snapshot: Snapshot) -> dict[str, Any] | None:
    """Return what is known of the open stage, in words; None where something damaged is in the way."""
    try:
        known = status.known_so_far(snapshot)
    except (UserError, Undecidable):  # `problems` names it
        return None
    return {**known, "line": words.tracks_in_words(known["line"])} if known else None


def untracked(lines: Iterable[str], tracks: Iterable[str]) -> list[str]:
    """Return sentences with their track in words; where there is only one, without it at their beginning."""
    alone = list(tracks)
    worded = [words.tracks_in_words(line, alone) for line in lines]
    return [line.removeprefix(f"{optimizer(alone[0])}: ") for line in worded] if len(alone) == 1 else worded


# -- the study -----------------------------------------------------------------------------------------------


def _question(config: Config) -> str:
    """Return the question that stands first: that about arms of one's own, else the suite's, or the lab's."""
    if mine := [label for label in config.ablation.mine.arms if label in config.ablation.arms]:
        return f"{'Is' if len(mine) == 1 else 'Are'} {' and '.join(mine)} better?"
    for stage in config.study.stages:
        if asked := stage_of(stage).question(config):
            return capital(asked)
    rates = [role for role in config.finals.arms if role.startswith("ebc_x")]
    return words.QUESTION if len(rates) > 1 else words.QUESTION_WITHOUT_WINDOW


def _facts(
    config: Config, header: StudyHeader, found: Mapping[str, kinds.Evidence], results: tables.Results
) -> list[tuple[str, str]]:
    optimizers = list(dict.fromkeys(optimizer(t) for evidence in found.values() for t in evidence.tracks))
    hours = sum(r.get("wall_s") or 0.0 for r in results.values())
    steps: int = getattr(config, config.study.stages[-1]).steps
    last = list(found.values())[-1:]
    seeds = [kinds.kind_of(evidence.decision).seeds(evidence) for evidence in last] or [config.seeds]
    few = words.low_bit(config)
    cut = [] if config.tokens.name == "characters" else [("Tokens", words.tokens(config))]
    return [
        ("Corpus", header["corpus"]["title"]),
        ("Model", words.model(config)),
        *cut,
        ("Optimizer", ", ".join(optimizers) or "not chosen yet")
        if config.ablation.mine.group != "optimizer"
        else ("Compared", ", ".join(config.ablation.arms)),
        *([("Low-bit", few)] if few else []),
        ("Scale", f"{config.scale}: {steps:,} steps of {words.batch(config)}"),
        ("Seeds", _seeds(seeds[0])),
        ("Runs", f"{len(results)}, {words.clock(hours)} of training"),
    ]


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) <= 8:
        return ", ".join(map(str, seeds))
    return f"{len(seeds)}, from {min(seeds)} to {max(seeds)}"


def _files_of(study: Study, loss_curves: Mapping[str, Any], *, beside: bool) -> tables.Files:
    """Return what finds a run's links: to its curve, and to its files if the page lies `beside` them."""
    curved = {run["id"] for run in loss_curves["runs"]}

    def files(run_id: str) -> list[tuple[str, str]]:
        paths = study.run_files(run_id)
        known = [("log", paths.log), ("steps", paths.steps)] if beside else []
        there = [(word, quote(p.relative_to(study.root).as_posix())) for word, p in known if p.is_file()]
        return [("curve", "#curves"), *there] if run_id in curved else there

    return files


def _curves(
    study: Study, runs: Sequence[Run], found: Mapping[str, kinds.Evidence]
) -> tuple[dict[str, Any], list[str]]:
    """Return the loss curves, those of the arms that the study ends with first, and what is damaged."""
    arms: dict[tuple[str, str], str] = {}
    for stage, evidence in found.items():
        for track, labels in kinds.kind_of(evidence.decision).arms(evidence).items():
            whose = f"{optimizer(track)}: " if len(evidence.tracks) > 1 else ""
            arms |= {(stage, name): f"{whose}{label}" for name, label in labels.items()}
    ends = list(dict.fromkeys(stage for stage, _ in arms))
    stages = [*reversed(ends), *(stage for stage in STAGES if stage not in ends)]
    decisions = {stage: evidence.decision for stage, evidence in found.items()}
    places = {arm: look.place for arm, look in study_looks(decisions).items()}
    return curves(runs, study.run_files, stages, lambda stage, arm: arms.get((stage, arm), arm), places)


def _runs(runs: Sequence[Run], bits: bool, files: tables.Files, named: Collection[str]) -> Table:
    """Return the runs in the order of stages, arms, rates and seeds; `named`: rows that the page leads to."""

    def place(run: Run) -> tuple[Any, ...]:
        run_id, spec, _ = run
        config = spec["config"]
        return (STAGES.index(spec["stage"]), spec["arm"], config["optimizer"]["lr"], config["seed"], run_id)

    table = tables.runs(sorted(runs, key=place), bits=bits, files=files)
    return table.shortened(MOST_ROWS, "all are in summary_*.csv in the study’s folder", named).on(PAGE)


def _broken(study: Study, name: str, trained: Iterable[Record]) -> list[dict[str, Any]]:
    """Return the runs that did not complete, in a group for each cause; `result`: its runs have one, as those
    that diverge, and not those that fail. `name`: how commands name the study."""
    ended = [status.run_status(study, r.brief) for r in trained if r.brief.outcome]
    groups = status.failures_of(study, [r for r in ended if r["outcome"] != "completed"], name)
    for group in groups:
        group["result"] = group["outcome"] in FINISHED
        group["log"] = str(Path(group["log"]).relative_to(study.root))
    return groups


def _setting_tables(changed: Sequence[tuple[str, Any, Any]], settings: Mapping[str, Any]) -> dict[str, Table]:
    title = "Settings that differ from the defaults of the scale and the suite"
    rows = [(k, setting(old), setting(new)) for k, old, new in changed]
    everything = [(k, setting(v)) for k, v in settings.items()]
    return {
        "changed": tables.plain(
            "changed", title, {"Setting": "code", "Default": "prose", "Here": "prose"}, rows
        ),
        "all": tables.plain("settings", "Settings", {"Setting": "code", "Value": "prose"}, everything),
    }


def _checksums(study: Study, decisions: Mapping[str, Decision]) -> Table:
    there = {p for pattern in CHECKED for p in study.root.glob(pattern) if not p.name.startswith(".")}
    paths = {p for p in there if p.is_file()}
    of_the_page_too = (study.manifest_file, study.crate_file)
    rows = [(visible(p.name), manifest.sha256_of(p)) for p in sorted(paths) if p not in of_the_page_too]
    rows += [(f"decision {s}", d["decision_sha256"]) for s, d in decisions.items()]
    note = "sha256; manifest.json has those of every file"
    title = "Checksums of the tables and decisions"
    return tables.plain("checksums", title, {"File": "text", "sha256": "code"}, rows, note)


# -- decisions -----------------------------------------------------------------------------------------------


def _by_weight(decisions: Mapping[str, Decision], config: Config) -> list[str]:
    """Return the stages that chose something, in their order; of a suite that asks about arms of one's own
    their tuning first, and what only gives its noise after it."""
    choices = [stage for stage, decision in decisions.items() if not kinds.kind_of(decision).concludes]
    return sorted(choices, key=lambda s: bool(config.ablation.mine.arms) and stage_of(s).shows != "points")


def _decision(
    name: str, found: kinds.Evidence, floors: Mapping[str, NoiseFloor], shown: Collection[str]
) -> dict[str, Any]:
    """Return what the page says of a decision. `shown`: the rows of runs that it can lead to."""
    stage, decision, tracks = stage_of(name), found.decision, found.tracks
    title, about = stage.title or name, stage.about
    rows: Rows = stage.rows
    if name == "lr_sweep":
        title, about, rows = _sweep(decision, found.config)
    [table] = kinds.kind_of(decision).tables(found)
    chosen = {t: _chosen(rows(t, decision), d, floors.get(t)) for t, d in tracks.items()}
    return {
        "title": title,
        "about": about,
        "rule": decision["rule"],
        # the figures say the same
        "headline": [] if any(chosen.values()) else untracked(stage.headlines(decision), tracks),
        "flips": untracked(stage.would_change(decision), tracks),
        "notes": untracked(decision["notes"], tracks),
        "tracks": [{"track": t, "name": optimizer(t), "chosen": of_track} for t, of_track in chosen.items()],
        "table": table.shortened(MOST_ROWS, f"all are in {stage.summary_csv}").on(PAGE).linked_to(shown),
    }


Rows = Callable[[str, Decision], list[tuple[str, str, str]]]  # a track's figures: what, figure, remark


def _sweep(decision: Decision, config: Config) -> tuple[str, str, Rows]:
    """Return title, purpose and figures of the stage of the best rate, without what the study lacks."""
    mine = bool(config.ablation.mine.arms)
    ebc = words.has_ebc(to_dict(config)) and not mine
    control = any(map(has_control, decision["tracks"].values()))
    title, about = words.sweep_in_words(ebc, control)
    there = {"ebc": ebc, "control": control}
    unused = {what for what, part in words.SWEEP_FIGURES.items() if not there[part]}

    def rows(track: str, decided: Decision) -> list[tuple[str, str, str]]:
        return [row for row in stage_of("lr_sweep").rows(track, decided) if row[0] not in unused]

    return title, words.NOISE_ALONE if mine else about, rows


def _chosen(
    rows: list[tuple[str, str, str]], d: Mapping[str, Any], floor: NoiseFloor | None
) -> list[tuple[str, str, str]]:
    """Return (what, figure, remark) of what a stage chose for a track."""
    if "optimizer" in d:
        rows = [("optimizer", optimizer(f"{d['optimizer']}_{d['projection']}"), ""), *rows]
    return [*rows, _margin(d, floor)] if "margin_sigma" in d and floor else rows


def _margin(d: Mapping[str, Any], floor: NoiseFloor) -> tuple[str, str, str]:
    sigmas = d["margin_sigma"]
    if sigmas is None:
        return ("margin", words.NOTHING, "no runner-up qualified")
    within = floor["detectable"] is not None and sigmas * floor["sigma"] < floor["detectable"]
    noise = "within the noise: another seed could have chosen otherwise"
    remark = noise if within else "ahead of the runner-up"
    text = f"{remark}; two single runs show {fixed(floor['detectable'])} nats four times out of five"
    text += f"; σ from {words.plural(floor['seeds'], 'seed')}" if floor["seeds"] < 3 else ""
    return ("margin", f"{sigmas:.1f} σ", text)


# -- results -------------------------------------------------------------------------------------------------


def _section(found: kinds.Evidence) -> dict[str, Any]:
    """Return what the page shows of a decision that answers the study's question."""
    decision = found.decision
    kind, stage = kinds.kind_of(decision), stage_of(decision["stage"])
    tables = [draw_intervals(table.on(PAGE)) for table in kind.tables(found) if PAGE in table.places]
    return {
        "stage": stage.name,
        "title": kind.section or stage.title,
        "about": stage.about,
        "rule": decision["rule"],
        "notes": untracked(decision["notes"], decision["tracks"]),
        "flips": untracked(stage.would_change(decision), decision["tracks"]),
        "sequential": decision.get("sequential"),
        "answers": [_answer(answer) for answer in kind.answers(found)],
        "tables": tables,
        "arms": kind.arms(found),
    }


def _answer(answer: kinds.Answer) -> dict[str, Any]:
    verdicts = Counter(check.line["verdict"] for check in answer.checks)
    counts = [(verdict, verdicts[verdict]) for verdict in ("pass", "fail", "undecided")]
    detectable = (d["detectable"] for d in answer.judging)
    return {
        **vars(answer),
        "name": optimizer(answer.track),
        "tables": [draw_intervals(table.on(PAGE)) for table in answer.tables],
        "checks": _checks(answer),
        "counts": [(verdict, n) for verdict, n in counts if n],
        "detectable": list(filter(None, detectable)),
        "seeds": max((d["seeds"] for d in answer.judging), default=0),
    }


def _checks(answer: kinds.Answer) -> list[dict[str, Any]]:
    """Return the lines of the verdict, each difference drawn on an axis that shows all of it."""
    checks = []
    for check in answer.checks:
        line = check.line
        shown = {**line, "title": check.title, "asks": check.asks, "means": check.means, "drawing": None}
        if "difference" in line:
            d = by_interval(line["difference"], line["joint"])
            shown["drawing"] = Ruler.over([d], d["margin"]).place(d)
            shown |= {"least": d["detectable"], "between": check.between}
            shown["together"] = d["comparisons"] if line["joint"] else 1
        checks.append(shown)
    return checks
