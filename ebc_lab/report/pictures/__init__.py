"""Pictures of a study.

Each stage names those that are drawn of its decision; a study that compares arms has theirs too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

from ebc_lab.config.dicts import from_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import AblationConfig
from ebc_lab.records.files import write_atomic
from ebc_lab.records.json_files import read_json
from ebc_lab.records.paths import FOR_PAPERS, StudyFiles
from ebc_lab.study.inspect.slots import timeline
from ebc_lab.study.stages.stage import concluding_stages, stage_of
from ebc_lab.study.store.study import Study

from ..text import words
from .carry import draw_excess, draw_optima
from .catalogue import PHONE, Entry, catalogue, in_reading_order, opening_picture, write_catalogue
from .compared import final_pictures, suite_pictures
from .decisions import by_track, draw_calibration, draw_lr_scale, draw_lr_sweep
from .drawing.looks import study_looks
from .drawing.sheet import STYLE, Decisions, Facts, Picture, Sheet
from .ladder import draw_ladder
from .profiles import draw_profiles
from .render import pdf, png, svg
from .slots import draw_slots


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
    _remove_others(root, entries)
    return [*(root / file for file in files), write_catalogue(root, entries)]


def _remove_others(root: Path, entries: Sequence[Entry]) -> None:
    """Remove the pictures in figures.json that are drawn no longer, as of an earlier version."""
    with suppress(UserError):  # a damaged list
        gone = {entry["name"] for entry in catalogue(root)} - {entry["name"] for entry in entries}
        for path in [*root.glob("*.png"), *root.glob("*.svg")]:
            if path.stem.removesuffix(PHONE) in gone:
                path.unlink()


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
    made: Any = decisions
    for name in dict.fromkeys([*concluding_stages(made), *decisions]):  # the answer's own first
        stage = stage_of(name)
        if stage.shows == "verdict":
            yield from final_pictures(root, facts, name, decisions)
        elif stage.shows == "arms":
            yield from suite_pictures(root, facts, name, decisions)
        else:
            yield from _pictures_of_choice(facts, name, decisions)
    if (busy := timeline(Study(root).records())) and decisions:
        yield Picture("timeline", "timeline", partial(draw_slots, busy=busy), facts)


def _pictures_of_choice(facts: Facts, stage: str, decisions: Decisions) -> Iterator[Picture]:
    """Return the pictures of a decision between candidates: one for each track, of lr_sweep one for all."""
    decision = decisions[stage]
    made: Any = decision
    section = "verdict" if stage_of(stage).concludes and stage_of(stage).leads(made) else stage
    for kind in stage_of(stage).pictures:
        if kind == "lr_sweep":
            yield Picture(kind, section, partial(draw_lr_sweep, decision=decision), facts)
            continue
        for track in decision["tracks"]:
            name = f"{kind}_{track}" if len(decision["tracks"]) > 1 else kind
            yield Picture(name, section, _draw_track(kind, decisions, stage, track), facts)


def _draw_track(kind: str, decisions: Decisions, stage: str, track: str) -> Callable[[Facts], Sheet | None]:
    """Return what draws a stage's decision on one track."""
    decision = decisions[stage]
    decided = decision["tracks"][track]
    if kind in ALONE:
        return partial(ALONE[kind], track=decided)
    swept = decisions["lr_sweep"]["tracks"][track]
    if kind == "lr_scale":
        return partial(draw_lr_scale, track=track, decision=decided, swept=swept)
    rows, natural = by_track(decision["candidates"], [track])[track], swept["natural_kl"]
    return partial(draw_calibration, track=track, decision=decided, rows=rows, natural=natural)


ALONE: Mapping[str, Callable[..., Sheet | None]] = {  # that need no other decision
    "carried_excess": draw_excess,
    "carried_optima": draw_optima,
    "profiles": draw_profiles,
    "ladder": draw_ladder,
}
