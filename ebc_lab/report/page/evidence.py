"""What the page shows, as plain data: gathered from a study's files and from nothing else.

`gather` reads, the templates lay out. Nothing here is decided again: decisions and verdict are told as
recorded.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ebc_lab.config.dicts import flat, to_dict
from ebc_lab.config.errors import UserError, visible
from ebc_lab.config.schema import STAGES, Config
from ebc_lab.records.decisions import Arm, Decision, Difference, FinalsTrack, Line, NoiseFloor, SuiteTrack
from ebc_lab.records.figures import FINISHED, RunResult
from ebc_lab.study.inspect import status, why
from ebc_lab.study.inspect.reproduce import again, continuing, departures, fresh_seeds
from ebc_lab.study.inspect.slots import in_words
from ebc_lab.study.stages.calibrate import band_aimed_at
from ebc_lab.study.stages.compare_arms import in_bits, seeds_of
from ebc_lab.study.stages.rules import Undecidable
from ebc_lab.study.stages.stage import decision_that_shows, stage_of
from ebc_lab.study.stages.statistics import by_interval, centre_of
from ebc_lab.study.store import manifest
from ebc_lab.study.store.changes import describe_earlier_looks
from ebc_lab.study.store.snapshot import Snapshot, read
from ebc_lab.study.store.study import Record, Study, StudyHeader

from ..pictures.drawing.looks import study_looks
from ..text import glance, headline, tables, words
from ..text.modes import answer as same_bits
from ..text.profiles import answer as profiled_in_words
from ..text.table import PAGE, Table
from ..text.units import answer as carried
from ..text.words import capital, fixed, optimizer, setting
from .curves import Run, curves

CHECKED = ("*.json", "*.csv", "*.md", "*.tex")  # files whose checksums the page states
MOST_ROWS = 200  # of a table with a row for each run: a browser takes seconds for thousands
NAMED = 12  # runs of a cause of failure that the page leads to
CHOICES = ("candidates", "points")  # what a stage shows that chooses something for the stages after it


def gather(study: Study, *, lenient: bool = False) -> dict[str, Any]:
    """Return everything the page tells of a study. `lenient`: damage is listed in `problems` as far as that
    is possible.

    Raises UserError: there is no study, or one of its files was truncated or edited. To be called, like what
    shows its findings, within `Study.told`.
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
    final, suite = decision_that_shows("verdict", decisions), decision_that_shows("arms", decisions)
    chosen = {s: decisions[s] for s in _by_weight(decisions, config) if stage_of(s).shows in CHOICES}
    floors = why.noise_floor(decisions)
    fresh = fresh_seeds(study, header, suite)
    drawn, damaged = _curves(study, runs, decisions)
    broken = _broken(study, config, trained)
    named = {f"run-{run_id}" for group in broken for run_id in group["runs"][:NAMED]}
    # `watch` serves the page alone, and not the files beside it
    every_run = _runs(runs, in_bits(config), _files_of(study, drawn, beside=not lenient), named)
    rows = {row.id for row in every_run.rows}
    settings = {k: v for k, v in flat(header["config"]).items() if k != "output_dir"}
    waiting = [s for s in config.study.stages if s not in decisions]
    return {
        "name": header["study"],
        "header": header,
        "problems": [*problems, *damaged],
        "looked": describe_earlier_looks(header),
        "drift": words.OF_PI if config.controller.name == "pi" else "",
        "question": _question(config),
        "facts": _facts(config, header, decisions, results),
        "tokens": words.tokens(config),
        "verdict": [_verdict(t, f, config, decisions) for t, f in final["tracks"].items()] if final else [],
        "suite": _suite(suite, results, config, decisions.get("tune")) if suite else None,
        "concluded": _without_arms(decisions, results),
        "decided": {s: _decision(s, d, config, floors, rows) for s, d in chosen.items()},
        "open": waiting,
        "early": _early(snapshot) if waiting else None,
        "carry_on": continuing(study, header) if waiting and study.resumable else None,
        "slots": in_words(busy) if (busy := status.slots_used(snapshot)) else "",
        "finals": _finals(final, config, results) if final else None,
        "broken": broken,
        "runs": every_run,
        "curves": drawn,
        "again": again(study, portable=True),
        "more_seeds": again(study, *fresh, portable=True) if fresh else None,
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
    """Return sentences with their track in words, and without the one that they begin with where there is
    only one."""
    alone = list(tracks)
    worded = [words.tracks_in_words(line, alone) for line in lines]
    return [line.removeprefix(f"{optimizer(alone[0])}: ") for line in worded] if len(alone) == 1 else worded


def label(name: str, arm: Arm) -> str:
    """Return an arm as the tables name it: a suite's by its own name, a final one in words."""
    return name if "about" in arm else words.short(name, arm)


# -- the study -----------------------------------------------------------------------------------------------


def _question(config: Config) -> str:
    """Tell whether the arms that a suite asks about are better; else the suite's own question, or the lab's;
    without EBC at several rates the page cannot answer all of it."""
    if mine := [label for label in config.ablation.mine.arms if label in config.ablation.arms]:
        return f"{'Is' if len(mine) == 1 else 'Are'} {' and '.join(mine)} better?"
    for stage in config.study.stages:
        if asked := stage_of(stage).question(config):
            return capital(asked)
    rates = [role for role in config.finals.arms if role.startswith("ebc_x")]
    return words.QUESTION if len(rates) > 1 else words.QUESTION_WITHOUT_WINDOW


def _facts(
    config: Config, header: StudyHeader, decisions: Mapping[str, Decision], results: tables.Results
) -> list[tuple[str, str]]:
    optimizers = list(dict.fromkeys(optimizer(t) for d in decisions.values() for t in d["tracks"]))
    hours = sum(r.get("wall_s") or 0.0 for r in results.values())
    steps: int = getattr(config, config.study.stages[-1]).steps
    compared = decision_that_shows("verdict", decisions) or decision_that_shows("arms", decisions)
    few = words.low_bit(config)
    cut = [] if config.tokens.name == "characters" else [("Tokens", words.tokens(config))]
    images = config.workload.name == "images"
    step = f"{config.batch_size} " + ("images" if images else f"× {config.model.context} tokens")
    return [
        ("Corpus", header["corpus"]["title"]),
        ("Model", words.model(config)),
        *cut,
        ("Optimizer", ", ".join(optimizers) or "not chosen yet")
        if config.ablation.mine.group != "optimizer"
        else ("Compared", ", ".join(config.ablation.arms)),
        *([("Low-bit", few)] if few else []),
        ("Scale", f"{config.scale}: {steps:,} steps of {step}"),
        ("Seeds", _seeds(_seeds_of(decisions, compared, config))),
        ("Runs", f"{len(results)}, {words.clock(hours)} of training"),
    ]


def _seeds_of(decisions: Mapping[str, Decision], compared: Decision | None, config: Config) -> Sequence[int]:
    """Return the seeds of the runs that the study ends with."""
    modes = decision_that_shows("modes", decisions)
    if modes:
        return sorted({c["seed"] for c in modes["candidates"]})
    return seeds_of(compared) if compared else config.seeds


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) <= 8:
        return ", ".join(map(str, seeds))
    return f"{len(seeds)}, from {min(seeds)} to {max(seeds)}"


def _files_of(study: Study, drawn: Mapping[str, Any], *, beside: bool) -> tables.Files:
    """Leads from a run to its curve on the page, and to those of its files that are there, where the page
    lies `beside` them."""
    curved = {run["id"] for run in drawn["runs"]}

    def files(run_id: str) -> list[tuple[str, str]]:
        paths = study.run_files(run_id)
        known = [("log", paths.log), ("steps", paths.steps)] if beside else []
        there = [
            (word, quote(path.relative_to(study.root).as_posix())) for word, path in known if path.is_file()
        ]
        return [("curve", "#curves"), *there] if run_id in curved else there

    return files


def _curves(
    study: Study, runs: Sequence[Run], decisions: Mapping[str, Decision]
) -> tuple[dict[str, Any], list[str]]:
    """Return the loss curves, those of the arms that the study ends with first, and what is damaged."""
    ends = [stage for stage in decisions if stage_of(stage).shows in ("verdict", "arms")]
    stages = [*reversed(ends), *(stage for stage in STAGES if stage not in ends)]
    arms: dict[tuple[str, str], str] = {}
    for stage in ends:
        tracks = decisions[stage]["tracks"]
        for track, compared in tracks.items():
            of = f"{optimizer(track)}: " if len(tracks) > 1 else ""
            arms |= {(stage, name): f"{of}{label(name, arm)}" for name, arm in compared["arms"].items()}
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


def _broken(study: Study, config: Config, trained: Iterable[Record]) -> list[dict[str, Any]]:
    """Return runs that did not complete, grouped by cause; `result`: diverging is one, failing is none."""
    ended = [status.run_status(study, r.brief) for r in trained if r.brief.outcome]
    groups = status.failures_of(study, [r for r in ended if r["outcome"] != "completed"], portable=True)
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
    """Return the stages in their order; of a suite that asks about arms of one's own their tuning first, and
    what only gives its noise after it."""
    return sorted(decisions, key=lambda s: bool(config.ablation.mine.arms) and stage_of(s).shows != "points")


def _decision(
    name: str,
    decision: Decision,
    config: Config,
    floors: Mapping[str, NoiseFloor],
    shown: Collection[str],
) -> dict[str, Any]:
    """Return what the page says of a decision. `shown`: the rows of runs that it can lead to."""
    stage, tracks = stage_of(name), decision["tracks"]
    title, about = stage.title or name, stage.about
    rows: Rows = stage.rows
    if name == "lr_sweep":
        title, about, rows = _of_the_sweep(decision, config)
    if stage.shows == "points":
        table = tables.tuned(name, decision)
    else:
        table = tables.candidates(name, decision, band_aimed_at(config))
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


def _of_the_sweep(decision: Decision, config: Config) -> tuple[str, str, Rows]:
    """Return the title of the stage that finds the best rate, what it is about, and its figures; without what
    the study has no use for."""
    mine = bool(config.ablation.mine.arms)
    ebc = words.has_ebc(to_dict(config)) and not mine
    control = any(map(tables.has_control, decision["tracks"].values()))
    title, about = words.of_the_sweep(ebc, control)
    unused = {what for what, part in words.NOT_OF_ALL.items() if not {"ebc": ebc, "control": control}[part]}

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


# -- verdict, finals, suite ----------------------------------------------------------------------------------


def _verdict(
    track: str, compared: FinalsTrack, config: Config, decisions: Mapping[str, Decision]
) -> dict[str, Any]:
    scaled = decisions["lr_scale"]["tracks"].get(track) if "lr_scale" in decisions else None
    margin = config.finals.margin
    differences = [by_interval(x["difference"], x["joint"]) for x in compared["verdict"] if "difference" in x]
    ruler = Ruler.over(differences, max((d["margin"] for d in differences), default=margin))
    verdicts = Counter(x["verdict"] for x in compared["verdict"])
    lines = [_line(line, compared, ruler, config) for line in compared["verdict"]]
    window = compared["lr_windows"].get("ebc")
    answer = words.answer(compared["verdict"], margin, window["scales"] if window else ())
    return {
        "track": track,
        "name": optimizer(track),
        "headline": headline.finals(compared, scaled, answer),
        "answer": answer,
        "warning": words.control_warning(compared),
        "glance": _titled(glance.finals(f"glance-{track}", compared), f": {optimizer(track)}"),
        "counts": {v: verdicts[v] for v in ("pass", "fail", "undecided")},
        "lines": lines,
        "least": [d["detectable"] for d in differences if d.get("detectable") is not None],
        "seeds": max((d["seeds"] for d in differences), default=0),
    }


def _line(line: Line, compared: FinalsTrack, ruler: Ruler, config: Config) -> dict[str, Any]:
    """Return a line of the verdict with its words, and its difference drawn on a ruler where it has one."""
    title, asks, _ = words.CHECKS.get(line["name"], (line["question"], "", {}))
    fair = line.get("reference") == compared["roles"].get("control")
    reference = "the fair control" if fair else "the baseline"
    means = words.means(line, config.finals.margin, reference, config.study.band)
    worded = {**line, "title": title, "asks": asks, "means": means, "drawn": None}
    if "difference" in line:
        d = by_interval(line["difference"], line["joint"])
        worded |= {
            "drawn": ruler.drawn(d),
            "ruler": Ruler(ruler.reach, d["margin"]),  # each line has a target of its own
            "least": d["detectable"],
            "at_once": d["comparisons"] if line["joint"] else 1,
            "between": [label(n, compared["arms"][n]) for n in (line["arm"], line["reference"])],
        }
    return worded


def _finals(decision: Decision, config: Config, results: tables.Results) -> dict[str, Any]:
    margin = config.finals.margin
    name = decision["stage"]
    several = len(decision["tracks"]) > 1
    tracks = []
    for track, judged in decision["tracks"].items():
        of = f": {optimizer(track)}" if several else ""
        arms = replace(tables.arms(f"finals-{track}", judged, results).on(PAGE), title=f"Arms{of}")
        compared = [
            _compared(f"against-{track}-{i}", f"{words.FAMILIES[family]}{of}", family, judged, margin, pairs)
            for i, (family, pairs) in enumerate(judged["differences"].items(), 1)
        ]
        shown = {"named": {n: label(n, arm) for n, arm in judged["arms"].items()}, "arms": arms}
        shown["low_bit"] = _titled(tables.low_bit(f"finals-levels-{track}", judged, results), of)
        shown["states"] = _states(f"finals-states-{track}", of, judged, results)
        tracks.append({"name": optimizer(track), "compared": compared, **shown})
    return {
        "about": stage_of(name).about,
        "rule": decision["rule"],
        "notes": untracked(decision["notes"], decision["tracks"]),
        "flips": untracked(stage_of(name).would_change(decision), decision["tracks"]),
        "sequential": decision.get("sequential"),
        "tracks": tracks,
        "margin": margin,
    }


def _suite(
    decision: Decision, results: tables.Results, config: Config, tune: Decision | None
) -> dict[str, Any]:
    several = len(decision["tracks"]) > 1
    tracks = []
    for track, compared in decision["tracks"].items():
        of = f": {optimizer(track)}" if several else ""
        ranked = tables.ranked(compared)
        pairs = tables.suite_pairs(compared, ranked)
        arms = tables.arms(f"suite-{track}", compared, results, ranked).on(PAGE)
        memory = tables.beside_weights(f"suite-memory-{track}", compared, results, ranked)
        pairing = (f"suite-differences-{track}", f"its reference{of}", "", compared, None, pairs)
        tracks.append(
            {
                "name": optimizer(track),
                "headline": headline.suite(compared, words.tuned_arms(tune, track)),
                "answer": words.suite_answer(compared),
                "named": {name: name for name in ranked},
                "glance": _glances(track, of, compared, ranked, tune),
                "tried": _tried(track, of, compared, config, tune),
                "judged": {compared["reference"], *words.mine_of(compared), *ranked[:1]},
                "arms": replace(arms, title=f"Arms, lowest median test loss first{of}"),
                "low_bit": _titled(tables.low_bit(f"suite-levels-{track}", compared, results, ranked), of),
                "states": _states(f"suite-states-{track}", of, compared, results, ranked),
                "memory": _titled(memory, of),
                "compared": [_compared(*pairing)] if pairs else [],
                "least": _least(_judging(compared, pairs)),
            }
        )
    notes = untracked(decision["notes"], decision["tracks"])
    about = stage_of(decision["stage"]).about
    return {"about": about, "rule": decision["rule"], "notes": notes, "tracks": tracks}


def _judging(compared: SuiteTrack, pairs: Mapping[str, Difference]) -> list[Difference]:
    """Return the differences that the answer rests on: those of the arms that a suite asks about, else
    all."""
    answers = compared.get("answers") or {}
    differences = [
        d for label in words.mine_of(compared) if label in answers for d in answers[label]["against"].values()
    ]
    return differences or list(pairs.values())


def _least(pairs: Iterable[Difference]) -> list[float]:
    """Return the smallest detectable differences, by the intervals that judge."""
    detectable = (by_interval(d, joint=True)["detectable"] for d in pairs)
    return [least for least in detectable if least is not None]


def _glances(
    track: str, of: str, compared: SuiteTrack, ranked: Sequence[str], tune: Decision | None
) -> list[Table]:
    """Return what stands under the answer: each arm that is asked about beside the others; or what a sweep
    shows; or every arm."""
    if asked := words.asked(compared):
        tuned = words.tuned_arms(tune, track)
        names = {label: f"better-{track}-{i}" for i, label in enumerate(asked, 1)}
        made = [
            replace(glance.is_better(name, label, compared, tuned), title=f"{label} beside the others")
            for label, name in names.items()
        ]
    else:
        made = tables.spans(compared, f"{{}}-{track}".format) or [
            glance.suite(f"glance-{track}", compared, ranked)
        ]
    return [replace(table.on(PAGE), title=f"{table.title}{of}") for table in made]


def _tried(track: str, of: str, compared: SuiteTrack, config: Config, tune: Decision | None) -> Table | None:
    """Return what was tried of the arms of a suite that asks about some of them."""
    if not tune or not words.mine_of(compared):
        return None
    grids = {label: arm.tune for label, arm in config.ablation.arms.items()}
    mine = words.mine_of(compared)
    order = [*mine, *(label for label in compared["arms"] if label not in mine)]
    return _titled(glance.tried(f"tried-{track}", tune, track, order, grids), of)


def _of_stage(decision: Decision, found: Iterable[Table], **said: Any) -> dict[str, Any]:
    """Return what a stage says that has neither arms nor a verdict: its tables, and what is `said`."""
    stage = stage_of(decision["stage"])
    return {
        "title": stage.title,
        "about": stage.about,
        "rule": decision["rule"],
        "notes": untracked(decision["notes"], decision["tracks"]),
        "tables": [table.on(PAGE) for table in found],
        **said,
    }


def _without_arms(decisions: Mapping[str, Decision], results: tables.Results) -> dict[str, Any] | None:
    """Return what a study concludes that has neither arms nor a verdict; None where it has them."""
    if modes := decision_that_shows("modes", decisions):
        return _modes(modes, results)
    if units := decision_that_shows("units", decisions):
        return _units(units)
    profiled = decision_that_shows("profiles", decisions)
    return _profiles(profiled) if profiled else None


def _modes(decision: Decision, results: tables.Results) -> dict[str, Any]:
    tracks = decision["tracks"]
    found = [tables.modes(f"modes-{track}", decision, track, results) for track in tracks]
    headlines = [headline.modes(compared) for compared in tracks.values()]
    answers = [same_bits(compared) for compared in tracks.values()]
    return _of_stage(decision, found, headlines=headlines, answers=answers)


def _units(decision: Decision) -> dict[str, Any]:
    tracks = decision["tracks"]
    found = [tables.units(f"units-{track}", decision, track) for track in tracks]
    found += [tables.settings(f"settings-{track}", decision, track) for track in tracks]
    headlines = [headline.units(track) for track in tracks.values()]
    answers = [carried(track) for track in tracks.values()]
    return _of_stage(decision, found, headlines=headlines, answers=answers)


def _profiles(decision: Decision) -> dict[str, Any]:
    tracks = decision["tracks"]
    found: list[Table] = []
    for name in tracks:
        found += [tables.scores(f"scores-{name}", decision, name)]
        found += [tables.ratios(f"ratios-{name}", decision, name)]
    headlines = [headline.profiles(track) for track in tracks.values()]
    answers = [profiled_in_words(track) for track in tracks.values()]
    return _of_stage(decision, found, headlines=headlines, answers=answers)


def _titled(made: Table | None, of: str) -> Table | None:
    """Return a table for the page; None where no arm has what it shows."""
    return made and replace(made.on(PAGE), title=f"{made.title}{of}")


def _states(
    name: str,
    of: str,
    compared: FinalsTrack | SuiteTrack,
    results: tables.Results,
    names: Iterable[str] | None = None,
) -> Table | None:
    """Return what the splats of energy-based models know, with the columns for which only the page has
    room."""
    made = tables.states(name, compared, results, names)
    return _titled(made and replace(made, note=made.note + tables.PAGE_NOTE), of)


def _compared(
    name: str,
    against: str,
    family: str,
    compared: FinalsTrack | SuiteTrack,
    margin: float | None,
    pairs: Mapping[str, Difference],
) -> Table:
    """Return paired differences as rows with a drawn interval each, on one ruler: a family of the finals', or
    a suite's `pairs`."""
    ruler = Ruler.over([by_interval(d, joint=True) for d in pairs.values()], margin)

    def draw(d: Difference) -> dict[str, Any] | None:
        alone = ruler.drawn(d)
        return alone and {**alone, "all": ruler.drawn(by_interval(d, joint=True)), "ruler": ruler}

    title = f"Difference in test loss against {against}"
    return tables.differences(name, title, pairs, compared, draw, family).on(PAGE)


class Ruler:
    """Where paired differences lie on a drawn axis of width 240, zero in its middle; what lies beyond is cut
    off."""

    WIDTH, EDGE = 240.0, 8.0

    def __init__(self, reach: float, margin: float | None):
        self.reach = reach
        self.zero = self.x(0.0)
        self.target = None if margin is None else self.x(margin)

    @classmethod
    def over(cls, differences: Sequence[Difference], margin: float | None) -> Ruler:
        """Return an axis that shows most intervals whole: one wild arm does not squash the others."""
        limits = ((d["low"], d["high"], d["mean"]) for d in differences)
        largest = (max((abs(x) for x in ends if x is not None), default=0.0) for ends in limits)
        sizes = [size for size in largest if size > 0]
        reach = min(max(sizes), 1.5 * statistics.median(sizes)) if sizes else 1.0
        return cls(1.1 * max(reach, 2 * (margin or 0.0)), margin)

    def x(self, value: float) -> float:
        share = max(-1.0, min(1.0, value / self.reach))
        return round(self.WIDTH / 2 + share * (self.WIDTH / 2 - self.EDGE), 1)

    def drawn(self, d: Difference) -> dict[str, Any] | None:
        """Return the ends of the interval and its middle on the axis; None where there is no interval."""
        low, high, middle = d.get("low"), d.get("high"), centre_of(d)
        if low is None and high is None:
            return None
        ends = (-math.inf if low is None else low, math.inf if high is None else high)
        side = "both"
        if ends[1] < 0:
            side = "below"
        elif ends[0] > 0:
            side = "above"
        return {
            "low": self.x(ends[0]),
            "high": self.x(ends[1]),
            "middle": None if middle is None or abs(middle) > self.reach else self.x(middle),
            "cut_low": ends[0] < -self.reach,
            "cut_high": ends[1] > self.reach,
            "side": side,
            "all": None,  # the interval that holds for all comparisons together, where it is drawn too
        }
