"""Pictures of a study.

Each stage names those that are drawn of its decision; a study that compares arms has theirs too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib

from ebc_lab.config.dicts import from_dict
from ebc_lab.config.schema import AblationConfig
from ebc_lab.records.files import write_atomic
from ebc_lab.records.json_files import read_json
from ebc_lab.records.paths import StudyFiles
from ebc_lab.study.inspect.slots import timeline
from ebc_lab.study.stages.stage import stage_of
from ebc_lab.study.store.study import Study

from ..text import words
from .carry.excess import draw_broken, draw_excess
from .carry.optima import draw_optima
from .catalogue import EMBEDDED, PHONE, write_catalogue
from .curves import known
from .decisions import by_track, draw_calibration, draw_eta_eff, draw_lr_scale, draw_lr_sweep
from .finals import final_pictures
from .profiles import draw_profiles, draw_ratios
from .render import png, svg
from .sheet.figure import STYLE, Decisions, Facts
from .sheet.picture import Picture, picture
from .slots import draw_slots
from .suite import suite_pictures

# the track, empty where a picture is of all; how it is drawn; what of
Drawn = Iterator[tuple[Any, ...]]


def draw_study(root: Path) -> list[Path]:
    """Draw every picture of the study in folder `root`, and write them and their list there. -> the files."""
    study = StudyFiles(root)
    facts = facts_of(read_json(study.header_file))
    written: list[Path] = []
    entries: list[dict[str, str]] = []
    with matplotlib.rc_context(fname=STYLE), warnings.catch_warnings():
        # a letter that the font lacks is a box in the PNG; in the SVG the reader's own fonts show it
        for lacking in ("Glyph .* missing from font", "Matplotlib currently does not support"):
            warnings.filterwarnings("ignore", lacking, UserWarning)
        for one in pictures(root, facts, read_json(study.decisions_file)):
            files = {".png": png(one.sheet), ".svg": svg(one.sheet, one.name)}
            if not one.arm or len(entries) < EMBEDDED:
                phone = f"{one.name}{PHONE}"
                files[f"{PHONE}.svg"] = svg(one.on_phone(), phone)
            for ending, content in files.items():
                written.append(root / f"{one.name}{ending}")
                write_atomic(written[-1], content)
            entries.append(one.entry)
    return [*written, write_catalogue(root, entries)]


def facts_of(header: Mapping[str, Any]) -> Facts:
    """What study.json says that every picture repeats."""
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
        margin=(config.get("finals") or {}).get("margin"),
        grids=sweep.get("grids") or {},
        aims_at_band=(config.get("calibrate") or {}).get("choose") == "band",
        sweep_steps=(sweep.get("steps", 0), sweep.get("long_steps", 0)),
        arms=tuple(suite.all_arms()),
        ebc=words.has_ebc(config),
    )


def pictures(root: Path, facts: Facts, decisions: Decisions) -> Iterator[Picture]:
    """One after the other, so that only one arm's runs are in memory."""
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
                for track, draw, *of in OF_A_CHOICE[kind](root, facts, decision, decisions):
                    of_track = f"{kind}_{track}" if track and several else kind
                    yield from picture(of_track, section, facts, draw, *of)
    if (busy := timeline(Study(root).records())) and decisions:
        yield from picture("timeline", "timeline", facts, draw_slots, busy)


# -- of a decision between candidates ------------------------------------------------------------------------


def _lr_sweep(root: Path, facts: Facts, decision: Mapping[str, Any], decisions: Decisions) -> Drawn:
    if "candidates" in decision:
        yield "", draw_lr_sweep, decision


def _lr_scale(root: Path, facts: Facts, decision: Mapping[str, Any], decisions: Decisions) -> Drawn:
    for track, of_track in decision["tracks"].items():
        yield track, draw_lr_scale, track, of_track, decisions["lr_sweep"]["tracks"][track]


def _eta_eff(root: Path, facts: Facts, decision: Mapping[str, Any], decisions: Decisions) -> Drawn:
    for track, of_track in decision["tracks"].items():
        rows = [row for of_role in of_track["arms"].values() for row in of_role]
        results = {row["run_id"]: known(root, row["run_id"]) for row in rows}
        yield track, draw_eta_eff, track, of_track, results


def _calibrate(root: Path, facts: Facts, decision: Mapping[str, Any], decisions: Decisions) -> Drawn:
    tracks = decision["tracks"]
    for track, rows in by_track(decision["candidates"], tracks).items():
        natural_kl = decisions["lr_sweep"]["tracks"][track]["natural_kl"]
        yield track, draw_calibration, track, tracks[track], rows, natural_kl


def _of_each_track(draw: Callable[..., Any]) -> Callable[..., Drawn]:
    """Return what draws a picture of each track of a decision."""

    def drawn(root: Path, facts: Facts, decision: Mapping[str, Any], decisions: Decisions) -> Drawn:
        for track, of_track in decision["tracks"].items():
            yield track, draw, of_track

    return drawn


OF_A_CHOICE: Mapping[str, Callable[[Path, Facts, Mapping[str, Any], Decisions], Drawn]] = {
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
