"""profiles: how soon each method, with one configuration for all workloads, reaches a tuned yardstick's loss.

The design follows AlgoPerf's self-tuning ruleset (Dahl et al., arXiv:2306.07179; Kasimbeg et al.,
arXiv:2505.24005), at a size that a laptop can train (docs/stages.md). `calibration` plans the runs, and
`scores` judges them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

from ebc_lab.config.errors import count
from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import Decision, Profiled, ProfilesTrack, Reached, Target
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec

from ..rules import Decisions, Results, Specs, divided_in_words, error_divided, make_decision
from ..runs import distinct, texts_pinned, waiting
from ..stage import Scenario, Stage
from ..suite import points
from .calibration import NAME, Phases, edges_of
from .scores import MOST, intervals, lowest, mean_time, median, over_the_best, score, sensitivity


def track_of(phases: Phases) -> ProfilesTrack:
    """Return the decision's track: the scores of all methods that have a configuration, with evidence."""
    profiles, workloads = phases.profiles, phases.workloads
    missed: list[int | None] = [None] * len(phases.config.seeds)  # on a workload that a method cannot train
    found: dict[str, dict[str, Reached]] = {}
    steps: dict[str, dict[str, list[int | None]]] = {}
    for method, runs in phases.scored.items():
        reached = {name: _reached(phases, runs.get(name, ()), name) for name in phases.targets}
        steps[method] = {n: [*at["steps"].values()] if n in runs else missed for n, at in reached.items()}
        found[method] = reached
    for name in phases.targets if found else ():
        target, by_method = workloads[name], [by_workload[name] for by_workload in found.values()]
        target["best_steps"], by_steps = over_the_best([at["median_steps"] for at in by_method])
        target["best_seconds"], by_seconds = over_the_best([at["median_seconds"] for at in by_method])
        for at, r, r_seconds in zip(by_method, by_steps, by_seconds, strict=True):
            at["ratio"], at["ratio_seconds"] = r, r_seconds
    spans = intervals(steps, error_divided(phases.config)) if steps else {}
    scores = {method: score([at["ratio"] for at in reached.values()]) for method, reached in found.items()}
    methods: dict[str, Profiled] = {}
    for method, reached in found.items():
        settings, point = profiles.methods[method], phases.chosen[method]
        times = phases.times(method, point)
        rates = {name: phases.rates(method, point, name) for name in profiles.calibrate_on}
        others = [at["ratio"] for name, at in reached.items() if not workloads[name]["calibrates"]]
        in_seconds = [at["ratio_seconds"] for at in reached.values()]
        low, high = spans.get(method, (None, None))
        methods[method] = {
            "about": settings.about,
            "point": point,
            "edges": edges_of(settings.grid, point),
            "tried": len(points(settings.grid)),
            "calibration": mean_time(times),
            "missed": [name for name, time in times.items() if math.isinf(time)],
            "workloads": reached,
            "score": scores[method],
            "low": low,
            "high": high,
            "score_seconds": score(in_seconds),
            "score_others": score(others) if others else None,
            "place": 1 + sum(x > scores[method] for x in scores.values()),
            "sensitivity": {n: sensitivity(x, phases.results) for n, x in rates.items() if len(x) > 1},
        }
    return {
        "yardstick": profiles.yardstick,
        "most": MOST,
        "asked_about": list(profiles.asked_about),
        "workloads": workloads,
        "methods": methods,
    }


def _reached(phases: Phases, specs: Specs, workload: str) -> Reached:
    """Return when each seed of a method reached a workload's target. The ratios are filled in later."""
    times = phases.reached(specs, workload)
    steps = {seed: time[0] for seed, time in times.items()}
    seconds = {seed: time[1] for seed, time in times.items()}
    at: Reached = {
        "steps": steps,
        "seconds": seconds,
        "median_steps": median(steps.values()),
        "median_seconds": median(seconds.values()),
        "ratio": None,
        "ratio_seconds": None,
        "lowest": {},
        "diverged": [],
    }
    for spec in specs:
        seed, result = str(spec.run.seed), phases.results.get(spec.run_id, RunResult())
        loss = lowest(result)
        at["lowest"][seed] = loss if math.isfinite(loss) else None
        if result.get("outcome") == "diverged":
            at["diverged"].append(seed)
    return at


def _notes(phases: Phases, track: ProfilesTrack) -> Iterator[str]:
    """Yield notes on missed targets, diverged runs, points on the edge of a grid, and missing results."""
    for name, target in track["workloads"].items():
        if target["loss"] is None:
            yield f"{name} has no target, since no run of {track['yardstick']} completed: it is left out"
        elif target["best_steps"] is None:
            yield f"{name}: no method reached the target, {target['loss']:.4f}"
        if target["edges"]:
            yield f"{name}: the target is of {_edges(target)}, an end of {track['yardstick']}'s grid"
    for method in phases.profiles.methods:
        if method not in track["methods"]:
            yield f"{method} has no configuration: none of its runs ended by themselves"
            continue
        found = track["methods"][method]
        if found["edges"]:
            yield f"{method}: {_edges(found)} is an end of its grid"
        if cannot := phases.profiles.methods[method].cannot:
            yield f"{method} cannot train {', '.join(cannot)}: counted as missed"
        trained = {name: at for name, at in found["workloads"].items() if at["lowest"]}
        if missed := [name for name, at in trained.items() if at["median_steps"] is None]:
            yield f"{method} missed the target on {', '.join(missed)}"
        lost = {name: len(at["diverged"]) for name, at in trained.items() if at["diverged"]}
        if lost:
            yield f"{method} diverged on {', '.join(f'{name}, {n} of its seeds' for name, n in lost.items())}"
        if lacking := [name for name, at in trained.items() if len(at["steps"]) < len(at["lowest"])]:
            yield f"{method} lacks a seed, whose run failed, on {', '.join(lacking)}"


def _edges(found: Profiled | Target) -> str:
    """Return a point's settings that lie on an end of their grids, such as `lr 0.001 and strength 0.5`."""
    point = found["point"] or {}
    return " and ".join(f"{key.rpartition('.')[2]} {point[key]:g}" for key in found["edges"])


def score_in_words(found: Profiled) -> str:
    """Return a score as text with its interval, such as `0.812 [0.70, 0.90]`, or the score alone if it has no
    interval."""
    if found["low"] is None or found["high"] is None:
        return f"{found['score']:.3f}"
    return f"{found['score']:.3f} [{found['low']:.2f}, {found['high']:.2f}]"


def _rule(config: Config) -> str:
    profiles = config.profiles
    seeds = len(config.seeds)
    return (
        f"a workload's target is the loss on the fixed windows that {profiles.yardstick}, at the best point "
        f"of its grid there ({count(profiles.calibration_seeds, 'seed')}) and "
        f"trained again, reaches at its lowest: the median of {profiles.target_seeds} other seeds"
        f"{f' plus {profiles.target_slack:g} nats' if profiles.target_slack else ''}; a method may train "
        f"{profiles.longest:g} times as long; its configuration is the point of its grid with the least "
        f"geometric mean, over {', '.join(profiles.calibrate_on)}, of steps to the target over the steps of "
        f"those runs, a miss as {MOST:g}, the lower losses where equal; its time on a workload is the median "
        f"of {count(seeds, 'fresh seed')}, a miss infinite; its score is the mean, over ratios τ "
        f"from 1 to {MOST:g}, of the share of workloads on which its time is within τ of the best method’s"
        f"{divided_in_words(config)}"
    )


class Profiles(Stage):
    """The stage that times how soon each method, with one configuration, reaches a yardstick's loss."""

    name = NAME
    title = "Time to a target on every workload"
    about = (
        "Each method has one configuration for all workloads. How soon does it reach the loss that a "
        "yardstick, tuned on each workload by itself, set?"
    )
    concludes = True
    leads_with_optimizer = False
    shows = "profiles"
    pictures = ("profiles",)

    def runs(self, config: Config, earlier: Decisions, results: Results) -> list[RunSpec]:
        return distinct(Phases(config, results).specs())

    def decide(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> Decision:
        phases = Phases(config, results)
        track = track_of(phases)
        judged = track["methods"] and any(w["loss"] is not None for w in track["workloads"].values())
        tracks = {specs[0].track: track} if judged else {}
        notes = list(_notes(phases, track))
        return make_decision(NAME, _rule(config), config, specs, results, earlier, tracks=tracks, notes=notes)

    def headline(self, track: ProfilesTrack) -> str:
        methods = track["methods"]
        best = min(methods, key=lambda m: (methods[m]["place"], -methods[m]["score_seconds"]))
        parts = [f"{best} scores highest, {score_in_words(methods[best])} of 1"]
        for method in track["asked_about"]:
            if method in methods and method != best:
                parts.append(f"{method} {score_in_words(methods[method])}, place {methods[method]['place']}")
        return f"{'; '.join(parts)}; {len(methods)} methods on {len(track['workloads'])} workloads"

    def so_far(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> list[str]:
        """Return how many targets are set, how many methods are configured, and how many are scored."""
        phases = Phases(config, results)
        planned = [[*runs.values()] for runs in phases.scored.values()]
        scored = sum(not waiting(list(itertools.chain(*runs)), results) for runs in planned)
        return [
            f"{len(phases.targets)} of {len(config.profiles.workloads)} targets are set; of "
            f"{len(config.profiles.methods)} methods {len(planned)} have a configuration and {scored} all "
            "their scored runs"
        ]

    def resolve(self, config: Config, say: Callable[[str], None]) -> Config:
        """Return the configuration with the checksums of the workloads' own data and tokens filled in."""
        return texts_pinned(config, NAME, "workloads", say)

    def invent(self, config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> RunResult:
        """Return a result that reaches the target at its last step, so that methods get configurations."""
        return {"val_loss": 2.0, "initial_loss": 5.0, "curve": [(spec.run.steps, 2.0, 1.0)]}


STAGE = Profiles()
