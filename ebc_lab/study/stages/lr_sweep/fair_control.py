"""The fair control: the same optimizer without EBC, on a schedule whose peak, warm-up and shape are tuned.

An arm that beats the fair control beats a tuned schedule, and not merely an untuned constant rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ebc_lab.config.schema import Config, RunConfig
from ebc_lab.records.decisions import Control, SweepTrack
from ebc_lab.records.spec import RunSpec

from ..rules import Results, Specs, candidate, edge_of, val_loss
from ..runs import Searched, distinct, plain_run, rate_of, scheduled, searched_run, sweep_spec
from ..search import Point, Search


def control_run(config: Config, track: SweepTrack, steps: int, seed: int, scale: float) -> RunConfig:
    """Return a track's plain run on the fair control's schedule, with the control's warm-up steps."""
    run = plain_run(config, track, steps, seed, scale)
    return replace(run, lr_schedule=replace(run.lr_schedule, **track["control"]["lr_schedule"]))


def control_search(config: Config, pair: Searched, lr: float, results: Results) -> list[RunSpec]:
    """Return the runs that search for the fair control around `lr`, the grid's best. The runs vary one factor
    after the other, each time from the best run so far: the peak, the warm-up and the shape. If the best
    warm-up or shape is not the first one, the peak is varied once more."""
    sweep = config.lr_sweep
    plain = partial(searched_run, config, pair, lr, sweep.long_steps, config.study.stage_seed)
    shapes = sweep.control_shapes
    asked = [scheduled(plain(1.0), shapes[0], warmup).lr_schedule for warmup in sweep.control_warmups]
    warmups = [schedule.warmup_steps for schedule in asked]  # two shares may give the same number of steps

    def control(point: Point) -> list[RunSpec]:
        run = scheduled(plain(point["scale"]), point["shape"], point["warmup"])
        return [sweep_spec(config, "control", run, point["scale"])]

    first = {"warmup": warmups[0], "shape": shapes[0]}
    peaks: list[Point] = [{"scale": scale, **first} for scale in sweep.control_scales]
    search = Search(peaks, control, results, {"scale": 2.0}, prefer_low="scale")
    several = len(peaks) > 1
    search.grow(sweep.control_extensions if several else 0)
    search.others("warmup", warmups)
    search.others("shape", shapes)
    search.neighbours(["scale"] if several else [])
    return distinct(search.specs)


def fair_control(
    config: Config, winner: RunSpec, points: Specs, baseline_lr: float, results: Results
) -> Control:
    """Return a decision's record of the fair control, and of all runs from which it was chosen."""
    # it is in use where anything in the study is compared with it, or runs on its schedule
    compared = {"calibrate", "controller_search", "lr_scale", "finals"} & set(config.study.stages)
    schedule = winner.run.lr_schedule
    alike = [s.lr_scale for s in points if s.run.lr_schedule == schedule]
    warmups = [s.run.lr_schedule.warmup_steps for s in points]
    return {
        "lr": rate_of(winner),
        "lr_scale": float(f"{rate_of(winner) / baseline_lr:.6g}"),
        "run_id": winner.run_id,
        "val_loss": val_loss(results[winner.run_id]),
        "lr_schedule": {
            "name": schedule.name,
            "warmup_steps": schedule.warmup_steps,
            "decay_share": schedule.decay_share,
        },
        "edge": edge_of(alike, winner.lr_scale) if len(alike) > 1 else None,
        "longest_warmup": len(set(warmups)) > 1 and schedule.warmup_steps == max(warmups),
        "grid": [
            {
                "run_id": s.run_id,
                "lr": rate_of(s),
                "schedule": s.run.lr_schedule.name,
                "warmup_steps": s.run.lr_schedule.warmup_steps,
                "val_loss": candidate(s, results)["val_loss"],
            }
            for s in points
        ],
        "used": bool(compared) or any(arm.control for arm in config.ablation.all_arms().values()),
    }


def control_in_words(track: SweepTrack) -> str:
    """Return a clause about the fair control; empty if nothing in the study uses it."""
    control = track["control"]
    if not control["used"]:
        return ""
    return (
        f"; fair control (tuned schedule): lr {control['lr']:g} (×{control['lr_scale']:g}), "
        f"{schedule_in_words(control['lr_schedule'])}, validation loss {control['val_loss']:.4f}"
        f"{_worse(track)}"
    )


def _worse(track: SweepTrack) -> str:
    return ", worse than the baseline" if track["control"]["val_loss"] > track["val_loss"] else ""


def schedule_in_words(schedule: Mapping[str, Any]) -> str:
    """Return a schedule in words, such as `trapezoid, 100 steps of warm-up`."""
    return f"{schedule['name'].replace('_', ' ')}, {schedule['warmup_steps']} steps of warm-up"


def control_remark(track: SweepTrack) -> str:
    control = track["control"]
    edge = f"; {control['edge']} edge of its grid" if control["edge"] else ""
    schedule = schedule_in_words(control["lr_schedule"])
    return f"×{control['lr_scale']:g}, {schedule}; loss {control['val_loss']:.4f}{_worse(track)}{edge}"
