"""Pictures of a study.

Each stage names those that are drawn of its decision; a study that compares arms has theirs too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

from ebc_lab.config.dicts import from_dict
from ebc_lab.config.schema import AblationConfig
from ebc_lab.records.files import write_atomic
from ebc_lab.records.json_files import read_json
from ebc_lab.records.paths import FOR_PAPERS, StudyFiles
from ebc_lab.study.inspect.slots import timeline
from ebc_lab.study.stages.stage import stage_of
from ebc_lab.study.store.study import Study

from ..text import words
from .carry import draw_broken, draw_excess, draw_optima
from .catalogue import PHONE, Entry, in_reading_order, opening_picture, write_catalogue
from .compared import final_pictures, suite_pictures
from .decisions import by_track, draw_calibration, draw_eta_eff, draw_lr_scale, draw_lr_sweep
from .drawing.curves import known
from .drawing.looks import study_looks
from .drawing.sheet import STYLE, Decisions, Facts, Picture, Sheet
from .profiles import draw_profiles, draw_ratios
from .render import pdf, png, svg
from .slots import draw_slots

# the track, empty where a picture is of all; what draws it
TrackPictures = Iterator[tuple[str, Callable[[Facts], Any]]]


def draw_study(root: Path) -> list[Path]:
    """Draw every picture of the study in folder `root`, and write them and their list there. -> the files."""
    study = StudyFiles(root)
    decisions = read_json(study.decisions_file)
    facts = facts_of(read_json(study.header_file), decisions)
    files: dict[str, bytes] = {}
    entries: list[Entry] = []
    for_papers: dict[str, Sheet] = {}
    with matplotlib.rc_context(fname=STYLE), warnings.catch_warnings():
        # a letter that the font lacks is a box in the PNG; in the SVG the reader's own fonts show it
        for lacking in ("Glyph .* missing from font", "Matplotlib currently does not support"):
            warnings.filterwarnings("ignore", lacking, UserWarning)
        for picture in pictures(root, facts, decisions):
            if not (sheet := picture.sheet()):
                continue
            name = picture.name
            files |= {f"{name}.png": png(sheet), f"{name}.svg": svg(sheet, name)}
            if not picture.arm and (narrow := picture.sheet(narrow=True)):
                files[f"{name}{PHONE}.svg"] = svg(narrow, f"{name}{PHONE}")
                for_papers[name] = narrow
            entries.append(picture.describe(sheet))
        if opening := opening_picture(in_reading_order(entries)):
            files[FOR_PAPERS] = pdf(for_papers[opening])
    for file, content in files.items():
        write_atomic(root / file, content)
    return [*(root / file for file in files), write_catalogue(root, entries)]


def facts_of(header: Mapping[str, Any], decisions: Decisions) -> Facts:
    """Return what every picture of a study repeats, or is drawn with."""
    config, corpus = header["config"], header["corpus"]
    suite = from_dict(AblationConfig, config.get("ablation") or {})
    low, high = config["study"]["band"]
    sweep = config.get("lr_sweep") or {}
    return Facts(
        name=header["study"],
        corpus=corpus["title"],
        warning=corpus["warning"],
        scale=config["scale"],
        tokens_per_step=config["batch_size"] * config["model"]["context"],
        windows=config["eval_windows"],
        band=(low, high),
        grids=sweep.get("grids") or {},
        aims_at_band=(config.get("calibrate") or {}).get("choose") == "band",
        sweep_steps=(sweep.get("steps", 0), sweep.get("long_steps", 0)),
        arms=tuple(suite.all_arms()),
        ebc=words.has_ebc(config),
        looks=study_looks(decisions),
    )


def pictures(root: Path, facts: Facts, decisions: Decisions) -> Iterator[Picture]:
    """Return the pictures one after the other, so that only one arm's runs are in memory."""
    for name, decision in decisions.items():
        stage = stage_of(name)
        if stage.shows == "verdict":
            yield from final_pictures(root, facts, name, decisions)
        elif stage.shows == "arms":
            yield from suite_pictures(root, facts, name, decisions)
        else:
            several = len(decision["tracks"]) > 1
            section = "verdict" if stage.concludes else name
            for kind in stage.pictures:
                for track, draw in BY_KIND[kind](root, decision, decisions):
                    yield Picture(f"{kind}_{track}" if track and several else kind, section, draw, facts)
    if (busy := timeline(Study(root).records())) and decisions:
        yield Picture("timeline", "timeline", partial(draw_slots, busy=busy), facts)


# -- of a decision between candidates ------------------------------------------------------------------------


def _lr_sweep(root: Path, decision: Mapping[str, Any], decisions: Decisions) -> TrackPictures:
    if "candidates" in decision:
        yield "", partial(draw_lr_sweep, decision=decision)


def _lr_scale(root: Path, decision: Mapping[str, Any], decisions: Decisions) -> TrackPictures:
    for track, chosen in decision["tracks"].items():
        swept = decisions["lr_sweep"]["tracks"][track]
        yield track, partial(draw_lr_scale, track=track, decision=chosen, swept=swept)


def _eta_eff(root: Path, decision: Mapping[str, Any], decisions: Decisions) -> TrackPictures:
    for track, chosen in decision["tracks"].items():
        rows = [row for of_role in chosen["arms"].values() for row in of_role]
        results = {row["run_id"]: known(root, row["run_id"]) for row in rows}
        yield track, partial(draw_eta_eff, track=track, decision=chosen, results=results)


def _calibrate(root: Path, decision: Mapping[str, Any], decisions: Decisions) -> TrackPictures:
    tracks = decision["tracks"]
    for track, rows in by_track(decision["candidates"], tracks).items():
        natural = decisions["lr_sweep"]["tracks"][track]["natural_kl"]
        calibrated = {"track": track, "decision": tracks[track], "rows": rows, "natural": natural}
        yield track, partial(draw_calibration, **calibrated)


def _of_each_track(draw: Callable[..., Any]) -> Callable[..., TrackPictures]:
    """Return what draws a picture of each track of a decision."""

    def of_each(root: Path, decision: Mapping[str, Any], decisions: Decisions) -> TrackPictures:
        for name, track in decision["tracks"].items():
            yield name, partial(draw, track=track)

    return of_each


BY_KIND: Mapping[str, Callable[[Path, Mapping[str, Any], Decisions], TrackPictures]] = {
    "lr_sweep": _lr_sweep,
    "lr_scale": _lr_scale,
    "eta_eff": _eta_eff,
    "calibrate": _calibrate,
    "carried_excess": _of_each_track(draw_excess),
    "carried_optima": _of_each_track(draw_optima),
    "carried_broken": _of_each_track(draw_broken),
    "profiles": _of_each_track(draw_profiles),
    "ratios": _of_each_track(draw_ratios),
}
