"""Pictures of a study."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib

from ebc_lab.config.dicts import from_dict
from ebc_lab.config.schema import AblationConfig
from ebc_lab.records.files import write_atomic
from ebc_lab.records.json_files import read_json
from ebc_lab.records.paths import StudyFiles

from ..text.words import short
from . import decisions as decisions_module
from . import finals, forest, mechanism
from .arm import Rival, draw_clip, draw_kl, draw_loss
from .catalogue import write_catalogue
from .curves import known, read_runs
from .render import png, svg
from .sheet import STYLE, Facts, Picture
from .suite import suite_pictures


def draw_study(root: Path) -> list[Path]:
    """Draw every picture of the study in folder `root`, and write them and their list there. -> the files."""
    study = StudyFiles(root)
    header, decisions = read_json(study.header_file), read_json(study.decisions_file)
    written, entries = [], []
    with matplotlib.rc_context(fname=STYLE):
        for picture in pictures(root, facts_of(header), decisions):
            for ending, content in (("png", png(picture.sheet)), ("svg", svg(picture.sheet, picture.name))):
                written.append(root / f"{picture.name}.{ending}")
                write_atomic(written[-1], content)
            entries.append(picture.entry)
    return [*written, write_catalogue(root, entries)]


def facts_of(header: Mapping[str, Any]) -> Facts:
    """What study.json says that every picture repeats."""
    config, corpus = header["config"], header["corpus"]
    suite = from_dict(AblationConfig, config.get("ablation") or {})
    low, high = config["study"]["band"]
    return Facts(
        name=header["study"],
        corpus=corpus["title"],
        warning=corpus["warning"],
        scale=config["scale"],
        tokens_per_step=config["batch_size"] * config["model"]["context"],
        windows=config["eval_windows"],
        band=(low, high),
        margin=(config.get("finals") or {}).get("margin"),
        grids=(config.get("lr_sweep") or {}).get("grids") or {},
        question=suite.question,
        arms=tuple(suite.all_arms()),
    )


def pictures(root: Path, facts: Facts, decisions: Mapping[str, Any]) -> Iterator[Picture]:
    """One after the other, so that only one arm's runs are in memory."""
    if "candidates" in decisions.get("lr_sweep", {}):
        yield Picture("lr_sweep", "lr_sweep", decisions_module.draw_lr_sweep(facts, decisions["lr_sweep"]))
    scaled = decisions["lr_scale"]["tracks"] if "lr_scale" in decisions else {}
    for track, found in scaled.items():
        tail, best_lr = f"_{track}" * (len(scaled) > 1), decisions["lr_sweep"]["tracks"][track]["lr"]
        yield Picture(
            f"lr_scale{tail}", "lr_scale", decisions_module.draw_lr_scale(facts, track, found, best_lr)
        )
        results = {
            row["run_id"]: known(root, row["run_id"]) for rows in found["arms"].values() for row in rows
        }
        if sheet := decisions_module.draw_eta_eff(facts, track, found, results):
            yield Picture(f"eta_eff{tail}", "lr_scale", sheet)
    calibrated = decisions.get("calibrate", {})
    for track, rows in decisions_module.by_track(
        calibrated.get("candidates", ()), calibrated.get("tracks", ())
    ).items():
        tail, natural_kl = (
            f"_{track}" * (len(calibrated["tracks"]) > 1),
            decisions["lr_sweep"]["tracks"][track]["natural_kl"],
        )
        sheet = decisions_module.draw_calibration(facts, track, calibrated["tracks"][track], rows, natural_kl)
        yield Picture(f"calibrate{tail}", "calibrate", sheet)
    if "finals" in decisions:
        yield from final_pictures(root, facts, decisions)
    if "ablation" in decisions:
        yield from suite_pictures(root, facts, decisions)


def final_pictures(root: Path, facts: Facts, decisions: Mapping[str, Any]) -> Iterator[Picture]:
    """All final arms together, and each alone."""
    tracks = decisions["finals"]["tracks"]
    arms = {name: arm for found in tracks.values() for name, arm in found["arms"].items()}
    results = finals.results_of(root, arms)
    for track, found in tracks.items():
        tail, own = f"_{track}" * (len(tracks) > 1), {name: results[name] for name in found["arms"]}
        yield Picture(
            f"finals{tail}",
            "verdict",
            forest.draw_finals(facts, track, found, own, decisions["finals"]["rule"]),
        )
        yield Picture(f"efficiency{tail}", "finals", finals.draw_efficiency(facts, track, found, own))
    yield Picture("pareto", "finals", finals.draw_pareto(facts, arms, results))
    if sheet := finals.draw_overhead(facts, tracks, overheads_of(root, decisions["finals"]), results):
        yield Picture("overhead", "finals", sheet)
    for track, found in tracks.items():
        yield from arm_pictures(
            root, facts, track, found, decisions["lr_sweep"]["tracks"][track]["natural_kl"], len(tracks) > 1
        )


def arm_pictures(
    root: Path, facts: Facts, track: str, found: Mapping[str, Any], natural_kl: float, several: bool
) -> Iterator[Picture]:
    """Those drawn from the steps: every arm's own, and all arms' tightness. Each run is read once."""
    tight: dict[str, mechanism.Tightness] = {}
    baseline = read_runs(root, found["arms"][found["roles"]["baseline"]])
    for name, arm in found["arms"].items():
        itself = name == found["roles"]["baseline"]
        runs = baseline if itself else read_runs(root, arm)
        reached = found["efficiency"].get(name)
        there = (
            f"{reached['seeds']} of {len(runs)} seeds get there, at step {reached['steps']:.0f}"
            if reached
            else ""
        )
        rival = Rival("the baseline", baseline, f"; {there or 'most seeds do not get there'}", itself=itself)
        yield Picture(f"{name}_loss", "arms", draw_loss(facts, name, arm, runs, rival), name)
        yield Picture(f"{name}_clip", "arms", draw_clip(facts, name, arm, runs), name)
        yield Picture(f"{name}_kl", "arms", draw_kl(facts, name, arm, runs, natural_kl), name)
        if sheet := mechanism.draw_groups(facts, name, arm, runs):
            yield Picture(f"{name}_groups", "arms", sheet, name)
        if measured := mechanism.tightness_of(runs):
            tight[name] = measured
    if tight:
        names = {name: short(name, found["arms"][name]) for name in tight}
        sheet = mechanism.draw_tightness(facts, track, names, found["arms"], tight)
        yield Picture("tightness" + f"_{track}" * several, "finals", sheet)


def overheads_of(root: Path, decision: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Track -> the result of its measured overhead."""
    runs = [m["run_id"] for m in decision.get("measurements", ()) if m.get("role") == "overhead"]
    return {
        t: known(root, run) for run in runs for t in decision["tracks"] if run.startswith(f"overhead_{t}_")
    }
