"""What racing would have decided, and saved, in studies that were recorded without it.

    python dev/studies/race_replay.py STUDY…        folders of studies with tune.race_sigmas=0

The search of the stage tune is taken again step by step, from the recorded results. A run whose loss on the
fixed windows lies above its bound counts as stopped there, and the search goes on without it. Printed for
each margin, in σ, and each share of a run before which none is stopped: whether every arm has the same best
point, asked for the same points and has the same LR window; the share of the search's steps that is saved;
and how near the nearest stopped run ended to the chosen point (its loss minus the worst seed's there, nats).

The same of the control's search, of the grid and of the calibration, each against the middle of its rates or
targets: what racing would be worth in stages that do not race.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ebc_lab.config.identity import recorded_environment
from ebc_lab.config.parts.race import RaceConfig
from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import Decision
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec
from ebc_lab.study.stages.rules import val_loss
from ebc_lab.study.stages.runs import Rivals, alike, raced
from ebc_lab.study.stages.search import Search
from ebc_lab.study.stages.stage import stage_of
from ebc_lab.study.stages.statistics import WINDOW_NATS, window
from ebc_lab.study.stages.suite import ready
from ebc_lab.study.stages.tune import Tuning, search
from ebc_lab.study.store.snapshot import read
from ebc_lab.study.store.study import Study

SIGMAS = (1.0, 2.0, 3.0, 5.0, 10.0)
FIRSTS = (0.25, 0.5, 0.6, 0.75, 0.9)
OTHERS = (("lr_sweep", "grid"), ("lr_sweep", "control"), ("calibrate", ""))  # stage, role: these do not race


@dataclass
class Replay:
    """One search taken again: its results as racing would have left them, and what that saved."""

    recorded: Mapping[str, RunResult]
    margin: float
    first: float
    results: dict[str, RunResult] = field(default_factory=dict)
    steps: int = 0
    saved: int = 0
    ends: list[float] = field(default_factory=list)  # the recorded losses of the stopped runs

    def race(self, runs: list[RunSpec], rivals: Rivals) -> list[RunSpec]:
        """Look each run up, stopped where its recorded curve is above its bounds."""
        for spec in runs:
            result = self.recorded.get(spec.run_id)
            if result is None:
                continue
            bounds = RaceConfig.from_run(raced(spec.run, rivals, self.results, self.margin, self.first)).above
            losses = {int(step): loss for step, loss, *_ in result["curve"]}
            at = [int(step) for step, bound in bounds.items() if (losses.get(int(step)) or 0.0) > bound]
            self.steps += result["steps"]
            if at:
                self.saved += result["steps"] - min(at)
                self.ends.append(val_loss(result))
                result = {**result, "outcome": "raced", "val_loss": None}
            self.results[spec.run_id] = result
        return runs


def main(places: Sequence[str]) -> None:
    """Print the replay of each study."""
    for place in places:
        snapshot = read(Study(Path(place)))
        results = {r.run_id: r.result for r in snapshot.records if r.result}
        print(f"\n{place}")
        with recorded_environment(snapshot.header["environment"]):
            if "tune" in snapshot.decisions:
                _tune(snapshot.config, snapshot.decisions, results)
            for stage, role in OTHERS:
                if stage in snapshot.decisions:
                    _other(stage, role, snapshot.config, snapshot.decisions, results)


def _tune(config: Config, decisions: Mapping[str, Decision], recorded: Mapping[str, RunResult]) -> None:
    for track in ready(config, decisions, "tune"):
        tuning = Tuning(config, decisions, track, recorded)
        sigma = tuning.sigma
        print(f"tune, {track}, σ {sigma:.4f}, {len(tuning.arms)} arms")
        print("  first   σ   nats  same point  same points tried  same window  stopped  saved  nearest")
        for first in FIRSTS:
            for sigmas in SIGMAS:
                margin = max(sigmas * sigma, WINDOW_NATS * config.tune.window)
                rows = [_arm(tuning, label, margin, first) for label in tuning.arms]
                _print(first, sigmas, margin, rows)


def _print(first: float, sigmas: float, margin: float, rows: Sequence[Mapping[str, Any]]) -> None:
    stopped = sum(row["stopped"] for row in rows)
    saved = sum(row["saved"] for row in rows) / max(1, sum(row["steps"] for row in rows))
    nearest = min(row["nearest"] for row in rows)
    same = {k: f"{sum(row[k] for row in rows)} of {len(rows)}" for k in ("point", "tried", "window")}
    moved = max(row["moved"] for row in rows)
    print(
        f"  {first:5.2f} {sigmas:3g} {margin:6.3f}  {same['point']:>10}  {same['tried']:>17}  "
        f"{same['window']:>11}  {stopped:7}  {saved:5.1%}  {nearest:7.3f}   window moved {moved:.2f} octaves"
    )


def _arm(tuning: Tuning, label: str, margin: float, first: float) -> dict[str, Any]:
    """Take one arm's search again, with racing and without."""
    tune, arm = tuning.config.tune, tuning.arms[label]
    made, further = (partial(tuning.runs, label, seeds=seeds) for seeds in (tuning.seeds, tuning.final_seeds))
    plain = search(tune, arm, made, further, tuning.results)
    replay = Replay(tuning.results, margin, first)
    fast = search(tune, arm, made, further, replay.results, replay.race)
    best = plain.best() or {}
    windows = [_octaves(tried, tried.best()) for tried in (plain, fast)]
    worst = plain.score_of(best) if best else math.inf
    return {
        "point": best == (fast.best() or {}),
        "tried": set(plain.tried) == set(fast.tried),
        "window": math.isclose(*windows),
        "moved": abs(windows[0] - windows[1]),
        "stopped": len(replay.ends),
        "steps": replay.steps,
        "saved": replay.saved,
        "nearest": min((end - worst for end in replay.ends), default=math.inf),
    }


def _octaves(tried: Search, best: Mapping[str, Any] | None) -> float:
    span = window(tried.mean_losses(best, "lr")) if best and "lr" in best else None
    return span["octaves"] if span else 0.0


def _other(
    stage: str,
    role: str,
    config: Config,
    decisions: Mapping[str, Decision],
    recorded: Mapping[str, RunResult],
) -> None:
    """Say what racing against the middle of each group of rates or targets would save of a whole stage."""
    asked = stage_of(stage).runs(config, {k: d for k, d in decisions.items() if k != stage}, recorded)
    sigmas = [d["sigma"] for d in decisions["lr_sweep"]["tracks"].values()]
    specs = [s for s in asked if s.kind == "train" and (not role or s.role == role) and s.run_id in recorded]
    whole = sum(r["steps"] for r in recorded.values())
    for times in SIGMAS:
        replay = Replay(recorded, times * sigmas[0], 0.5)
        left = list({s.run_id: s for s in specs}.values())
        while left:
            group = sorted((s for s in left if alike(s.run, left[0].run)), key=lambda s: _size(s))
            pilot = group.pop(len(group) // 2)
            replay.race([pilot], ())
            for spec in group:
                replay.race([spec], [[pilot]])
            left = [s for s in left if s.run_id not in replay.results]
        best = min((val_loss(recorded[s.run_id]) for s in specs), default=math.inf)
        nearest = min((end - best for end in replay.ends), default=math.inf)
        of_stage, of_study = replay.saved / max(1, replay.steps), replay.saved / max(1, whole)
        print(
            f"{stage} {role:8} {times:3g} σ: {len(replay.ends)} of {len(specs)} stopped, {of_stage:.1%} of "
            f"its steps, {of_study:.1%} of the study's; nearest {nearest:.3f}"
        )


def _size(spec: RunSpec) -> tuple[float, float]:
    return spec.run.optimizer.lr, spec.run.budget.target_kl


if __name__ == "__main__":
    main(sys.argv[1:])
