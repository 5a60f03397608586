"""tune: finds the best point of each suite arm that has a grid, with the same effort for every arm.

The search tries every combination of an arm's grids, or goes through one setting after the other. No arm is
tuned more carefully than another: all begin with the same number of points, use the same seeds, and may grow
their grids equally often, each by its own ratio. With `tune.trials` the best of every arm is chosen among
exactly that many points, however many settings the arm has: an arm with few of them, or whose grids did not
grow, tries more values between the best and its neighbours. A point is scored by its worst seed: a setting
that trains well under one seed and badly under another is not an arm's best.

On how comparisons of optimizers depend on their tuning: Choi et al., arXiv:1910.05446; Sivaprasad et al.,
arXiv:1910.11758.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ebc_lab.config.fields import number
from ebc_lab.config.schema import GROWING, ArmConfig, Config, TuneConfig, tunable
from ebc_lab.records.decisions import Candidate, CurvePoint, Decision, TunedArm, TunedTrack, Window
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import DIGITS, RunSpec, track_prefix

from .rules import Decisions, Results, Specs, Undecidable, losses_of, make_decision, margin_sigma, val_loss
from .runs import RACED_FROM, Rivals, raced
from .search import Point, Race, Search, mean_loss
from .stage import Choice, Scenario, Track, held_back_by_its_seeds, seeds_of_arm
from .statistics import Luck, luck_of_choice, window
from .suite import arm_run, point_in_words, points, ready, short_name, source_of, started

SHORT = {"lr_scale": "x", "warmup_share": "w"}  # abbreviations of settings in the name of a point
RATES = ("lr", "lr_scale")
HELD = "constant"  # the schedule without a warm-up
FURTHER = 2  # most values beyond a grid of a part's setting: of one without effect, any end may be the best
FEW = 4  # number of arms whose best points fit into a headline


class Tuning:
    """The arms of a suite that have a grid, before sweeps add others, and each arm's search on a track."""

    def __init__(self, config: Config, decisions: Decisions, track: str, results: Results):
        self.config, self.decisions, self.track, self.results = config, decisions, track, results
        self.arms = {label: arm for label, arm in config.ablation.arms.items() if arm.tune}
        self.sigma: float = decisions["lr_sweep"]["tracks"][track]["sigma"]
        self.seeds, self.final_seeds = tuning_seeds(config), final_seeds(config)

    def runs(self, label: str, point: Point, seeds: Sequence[int]) -> list[RunSpec]:
        """Return the runs of an arm at a point of its grid, one per seed. If the arm starts from other runs'
        weights, call this only after those runs (see `sources`) have completed."""
        config, arm = self.config, self.config.ablation.arms[label]
        sources = {source.run.seed: source for source in self.sources(arm)}
        specs = []
        for seed in seeds:
            run, scale = arm_run(config, self.decisions, self.track, arm, config.tune.steps, seed, point)
            run = replace(run, evaluate=["val"])
            if arm.init:
                run = started(run, sources[seed], self.results) or run
            specs.append(RunSpec("tune", label, name_of(label, point), scale, run, of_track=self.track))
        return specs

    def sources(self, arm: ArmConfig) -> list[RunSpec]:
        """Return the runs whose weights an arm starts from, one per seed; empty if there are none."""
        if not arm.init:
            return []
        made = partial(source_of, self.config, self.decisions, self.track, "tune", arm.init)
        return [made(seed) for seed in (*self.seeds, *self.final_seeds)]

    def search(self, label: str) -> Search | None:
        """Return an arm's search as far as results allow; None until the arm's `sources` have completed."""
        arm, margin = self.arms[label], self.config.tune.race_sigmas * self.sigma

        def race(runs: list[RunSpec], rivals: Rivals) -> list[RunSpec]:
            return [replace(s, run=raced(s.run, rivals, self.results, margin)) for s in runs]

        if not all(map(math.isfinite, losses_of(self.sources(arm), self.results))):
            return None
        made, further = (partial(self.runs, label, seeds=seeds) for seeds in (self.seeds, self.final_seeds))
        return search(self.config.tune, arm, made, further, self.results, race if margin else None)


def tuning_seeds(config: Config) -> range:
    """Return the seeds on which every point of a search is trained."""
    first = config.study.stage_seed
    return range(first, first + config.tune.seeds)


def final_seeds(config: Config) -> range:
    """Return the further seeds on which the finalists of a search are trained; empty if there are none."""
    first = tuning_seeds(config).stop
    return range(first, first + config.tune.further_seeds)


def name_of(label: str, point: Point) -> str:
    """Return the name of an arm at a point of its grid, such as `muon_lr0p016_w0p167_cosine`."""
    for key, value in point.items():
        if not isinstance(value, str):
            value = number(value, DIGITS if key == "lr" else 3)
        label += f"_{value}" if key == "schedule" else f"_{SHORT.get(key, short_name(key))}{value}"
    return label


# -- the search of an arm's best point ---------------------------------------------------------------------


def search(
    tune: TuneConfig,
    arm: ArmConfig,
    runs_of: Callable[[Point], list[RunSpec]],
    further_of: Callable[[Point], list[RunSpec]],
    results: Results,
    race: Race | None = None,
) -> Search:
    """Return an arm's search, as far as the results allow. With `race`, it begins at the grids' middles.
    `further_of`: the runs of a finalist on further seeds."""
    begun = begun_with(tune, arm)
    grids = {key: values for key, values in arm.tune.items() if key in GROWING}
    middle = {key: float(values[len(values) // 2]) for key, values in grids.items()}
    rates = [key for key in RATES if key in arm.tune]
    searched = Search(
        [{**point, **middle} for point in begun] if race else begun,
        runs_of,
        results,
        ratios={key: float(x[-1] / x[-2]) if len(x) > 1 else 2.0 for key, x in grids.items()},
        prefer_low=rates[0] if rates else "",
        fitted=partial(fitted, arm),
        canonical=without_idle,
        race=race,
        most=tune.trials,
    )
    if race and not searched.open:
        searched.add(begun)
        searched.list_first(begun)  # among equal points the winner then does not depend on racing
    lowering = next((key for key in (*RATES, *GROWING) if key in arm.tune), "")
    grow = partial(searched.grow, tune.max_extensions, by_spacing=True, lowering=lowering)
    grow()
    if tune.search == "coordinate":
        for key in (k for k in arm.tune if k not in GROWING):
            if key == "schedule":
                searched.step(partial(_shapes, searched, arm.tune[key], rates))
            else:
                searched.others(key, arm.tune[key])
            if key in arm.grows:
                searched.beyond(key, arm.grows[key], min(FURTHER, tune.max_extensions))
        searched.neighbours(rates)
        grow()
    if tune.trials:
        searched.refine({key: "log" for key in arm.tune if key in GROWING} | arm.grows)
        searched.settle()
    searched.final(tune.finalists, further_of)
    for _ in range(tune.max_extensions if tune.window and "lr" in arm.tune else 0):
        searched.step(partial(_beyond_the_window, searched), grown=True)
    return searched


def begun_with(tune: TuneConfig, arm: ArmConfig) -> list[Point]:
    """Return the points with which a search begins: every combination of the grids. If the search takes one
    setting after the other, only grids that may grow and those of `tune.combined` are combined, at the first
    value of the others."""
    if tune.search == "grid":
        return points(arm.tune)
    return points({k: values if k in tune.at_first else values[:1] for k, values in arm.tune.items()})


def without_idle(point: Mapping[str, Any]) -> Point:
    """Return the point, without its warm-up share if its schedule has no warm-up."""
    return {k: v for k, v in point.items() if k != "warmup_share" or point.get("schedule") != HELD}


def fitted(arm: ArmConfig, key: str, value: float) -> float | None:
    rounded = float(f"{value:.4g}")
    return rounded if tunable(key).holds(rounded) else None


def _shapes(searched: Search, shapes: Sequence[str], rates: Sequence[str], best: Point) -> Iterator[Point]:
    """Yield the best point on every schedule. The constant one, which never falls, gets lower rates too."""
    if "schedule" not in best:
        return
    yield from ({**best, "schedule": shape} for shape in shapes)
    for rate in rates if HELD in shapes else ():
        yield from searched.moved({**best, "schedule": HELD}, rate, best[rate] / searched.ratios[rate])


def _beyond_the_window(searched: Search, best: Point) -> Iterator[Point]:
    """Yield, for each end at which the LR window is open, the best point at the next rate beyond that end."""
    losses = searched.mean_losses(best, "lr")
    span = window(losses)
    if span and span["open_low"]:
        yield from searched.moved(best, "lr", min(losses) / searched.ratios["lr"])
    if span and span["open_high"]:
        yield from searched.moved(best, "lr", max(losses) * searched.ratios["lr"])


# -- the decision -------------------------------------------------------------------------------------------


def _decided(searched: Search, arm: ArmConfig, results: Results, sigma: float) -> TunedArm:
    """Return one arm's best point, with its losses, edges and luck, and the LR window if lr was tuned. If no
    point completed, say why the arm is untuned."""
    winner, tried = searched.best(), [*map(dict, searched.eligible)]
    chosen = winner or tried[0]
    best = searched.runs(chosen, final=True)
    edges = {key: searched.edge(chosen, key) for key in chosen if key in GROWING}
    edges |= {key: searched.edge_of_all(chosen, key) for key in chosen if key not in GROWING}
    luck = luck_of(searched, sigma)
    decided: TunedArm = {
        "point": chosen,
        "run_id": best[0].run_id if winner else None,
        "val_loss": mean_loss(best, results) if winner else None,
        "worst_loss": max(losses_of(best, results)) if winner else None,
        "runs": len(searched.specs),
        "extended": searched.extended,
        "edges": {k: edge for k, edge in edges.items() if edge},
        "margin_sigma": margin_sigma([*searched.deciding.values()], sigma),
        "luck": {"sd": luck.sd, "freedom": luck.freedom},
    }
    if searched.most:
        decided["trials"] = len(searched.eligible)
    if searched.finals:
        decided["finalists"] = len(searched.finals)
    if not winner:
        decided["untuned"] = "no point of its grid completed, and a run failed"
        if searched.lost:
            rates = [s.run.optimizer.lr for s in searched.specs]
            decided["untuned"] = f"no rate between {min(rates):.4g} and {max(rates):.4g} completes"
    untried = {
        key for key, values in arm.tune.items() for x in values if not any(p.get(key) == x for p in tried)
    }
    if untried and len(tried) == searched.most:
        decided["cut"] = [short_name(key) for key in arm.tune if key in untried]
    if "lr" in chosen:
        decided["curve"], decided["window"] = _curve(searched, chosen, results)
    return decided


def luck_of(searched: Search, sigma: float) -> Luck:
    """Return the luck in a search's choice. `sigma`: the noise of a run, for a single tuning seed."""
    points = [searched.runs(dict(key), final=True) for key in searched.eligible]
    losses = [losses_of(runs, searched.results) for runs in points]
    return luck_of_choice(losses, sigma, uncertain=bool(searched.most or searched.finals))


def _notes(label: str, arm: TunedArm, asked: ArmConfig) -> list[str]:
    """Return notes on an arm's search: that it failed, or how far grids grew and on which edges it ended."""
    if "untuned" in arm:
        return [f"{label} could not be tuned: {arm['untuned']}"]
    notes: list[str] = []
    grids = asked.tune
    for key in (k for k in grids if k in GROWING or k in asked.grows):
        reached = [p[key] for p in arm["extended"] if key in p]
        ends = [f"down to {min(reached):.4g}"] if reached and min(reached) < grids[key][0] else []
        ends += [f"up to {max(reached):.4g}"] if reached and max(reached) > grids[key][-1] else []
        notes += [f"{label}: {short_name(key)} grid grown {' and '.join(ends)}"] if ends else []
    for key, edge in arm["edges"].items():
        where = f"is the {edge}est tried" if key == "warmup_share" else f"lies on its grid's {edge} edge"
        notes.append(f"{label}'s best {short_name(key)}, {arm['point'][key]:g}, {where}")
    if cut := arm.get("cut"):
        words = f"{label}: its {arm['trials']} trials were used up before all of {', '.join(cut)} was tried"
        notes.append(f"{words}: give it a nearer grid, or all arms more (tune.trials)")
    return notes


def _curve(searched: Search, chosen: Point, results: Results) -> tuple[list[CurvePoint], Window | None]:
    """Return the points at the chosen warm-up and schedule, by rising learning rate, and the LR window. The
    loss of a point is None if a run diverged or was stopped. The window is None if any run was stopped, since
    its extent is then unknown."""
    curve: list[CurvePoint] = []
    for _, runs in sorted(searched.along(chosen, "lr").items()):
        losses = {str(s.run.seed): val_loss(results.get(s.run_id)) for s in runs}
        mean = mean_loss(runs, results)
        point: CurvePoint = {
            "lr": runs[0].run.optimizer.lr,
            "val_loss": mean if math.isfinite(mean) else None,
            "seeds": {seed: x if math.isfinite(x) else None for seed, x in losses.items()},
        }
        if stopped := _raced(runs, results):
            point["raced"] = stopped
        curve.append(point)
    if any("raced" in p for p in curve):
        return curve, None
    return curve, window({p["lr"]: math.inf if p["val_loss"] is None else p["val_loss"] for p in curve})


def _raced(specs: Specs, results: Results) -> int:
    return sum(results.get(s.run_id, {}).get("outcome") == "raced" for s in specs)


def _landscape(arm: ArmConfig, scenario: Scenario, spec: RunSpec) -> float:
    """Return how many nats above the best loss an invented run ends, in a search of one setting at a time.

    In the scenario `max`, every higher rate is better. An octave away from the best rate costs 0.03 nats in
    `expected` and 1 nat in `min`. Only in `min` is the first schedule the best.
    """
    rates: list[float] = next((arm.tune[k] for k in RATES if k in arm.tune), [1.0])
    first: bool = spec.run.lr_schedule.name == arm.tune.get("schedule", [spec.run.lr_schedule.name])[0]
    rate = spec.lr_scale if "lr_scale" in arm.tune else spec.run.optimizer.lr / arm.lr_scale
    octaves = math.log2(rate / float(rates[-1]))
    if not scenario.merged:
        return 1 / (100 + octaves) + 0.001 * first
    if scenario.edge:
        return 0.03 * abs(octaves) + 0.001 * first
    return abs(octaves + math.log2(float(rates[-1]) / float(rates[len(rates) // 2]))) + 0.001 * (not first)


def _best_in_words(arm: TunedArm) -> str:
    """Return an arm's best point and its validation loss, such as `lr 0.008 → 2.6880`, or why it has none."""
    if arm["val_loss"] is None:
        return f"could not be tuned: {arm['untuned']}"
    grown = {k: v for k, v in arm["point"].items() if k in GROWING}
    return f"{point_in_words(grown or arm['point'])} → {arm['val_loss']:.4f}"


def _rule(tune: TuneConfig) -> str:
    seeds = "one seed" if tune.seeds == 1 else f"the worst of {tune.seeds} seeds"
    how = "every combination"
    if tune.search == "coordinate":
        how = "one setting after the other, and the rates next to the best again where another changed"
        if tune.combined:
            how = f"the rate together with {' and '.join(map(short_name, tune.combined))}, then {how}"
    rule = (
        f"each arm's lowest validation loss over its own grid ({how}), {tune.steps} steps, {seeds}, "
        f"{tune.trials or 'as many'} points for every arm; a grid whose best point lies on an edge grows "
        f"there by its own ratio, {tune.max_extensions} times at most, and while every point diverges its "
        "rate goes down"
    )
    if tune.trials:
        rule += (
            f"; a grid of a part's setting grows {FURTHER} times at most, and points that the search leaves "
            "go half-way between the best and its neighbours"
        )
    rule += "; then that of lr, as often, until its window closes" if tune.window else ""
    if tune.finalists:
        rule += (
            f"; the best {tune.finalists} are trained on {tune.final_seeds} further seeds, and the lowest "
            "mean of all their seeds wins"
        )
    if tune.race_sigmas:
        rule += (
            "; the middle of a grid is trained first, and another run of its shape is stopped where its loss "
            f"on the fixed windows, from {RACED_FROM:.0%} of its steps on, is {tune.race_sigmas:g} "
            "sigma above that of the best finished point at the same step: it has no loss and does not win"
        )
    return rule


class Tune(Choice):
    """The stage that finds the best point of each arm of a suite."""

    name = "tune"
    title = "Each arm at its own best"
    about = (
        "Every arm that has a grid gets the same number of tuning runs, and more only where its best point "
        "lies on the grid's edge."
    )
    leads_with_optimizer = False
    shows = "points"
    setting = "{arm}"

    def runs(self, config: Config, earlier: Decisions, results: Results) -> list[RunSpec]:
        """Return the tuning runs of every arm at each point of its grid so far, and the source runs whose
        weights arms start from. An arm waits until its source runs have completed; grids grow as runs end."""
        specs: list[RunSpec] = []
        for track in ready(config, earlier, self.name):
            tuning = Tuning(config, earlier, track, results)
            for arm in {arm.init: arm for arm in tuning.arms.values()}.values():
                specs += tuning.sources(arm)
            for searched in map(tuning.search, tuning.arms):
                specs += searched.specs if searched else []
        return specs

    def decide(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> Decision:
        tracks: dict[str, TunedTrack] = {}
        notes: list[str] = []
        every = ready(config, earlier, self.name)
        for track in every:
            tuning = Tuning(config, earlier, track, results)
            arms: dict[str, TunedArm] = {}
            for label, arm in tuning.arms.items():
                searched = tuning.search(label)
                if searched is None:
                    start = f"{arm.init}, where {label} starts"
                    raise Undecidable(f"tune could not be decided: {start}, has no weights.")
                arms[label] = _decided(searched, arm, results, tuning.sigma)
                notes += [track_prefix(track, every) + note for note in _notes(label, arms[label], arm)]
            tracks[track] = {"arms": arms, "sigma": tuning.sigma}
        if stopped := _raced(specs, results):
            words = f"{stopped} of {len(specs)} runs were raced"
            notes.append(f"{words}: the luck of the tuning is estimated without their points")
        rule = _rule(config.tune)
        return make_decision(self.name, rule, config, specs, results, earlier, tracks=tracks, notes=notes)

    def headline(self, track: TunedTrack) -> str:
        arms = track["arms"]
        if len(arms) <= FEW:
            return " · ".join(f"{label} {_best_in_words(arm)}" for label, arm in arms.items())
        losses = {label: loss for label, arm in arms.items() if (loss := arm["val_loss"]) is not None}
        best = min(losses, key=lambda label: losses[label], default="none")
        return f"{len(arms)} arms tuned; {best} has the lowest validation loss"

    def headlines(self, decision: Decision) -> list[str]:
        """Return a decision in one line per track. It omits lower losses that were passed over, since a
        single run nearly always lies below the mean of the chosen point; `would_change` names the lowest."""
        every = decision["tracks"]
        return [self.lead_in(name, decision) + self.headline(track) for name, track in every.items()]

    def turning_points(self, name: str, decision: Decision) -> list[str]:
        """Return a clause on a single run with a lower loss than the mean of the chosen point, if any."""
        over = self.passed_over(name, decision)
        return [f"one run alone would have chosen {over}"] if over else []

    def why_not(self, chosen: Track, candidate: Candidate, candidates: Sequence[Candidate]) -> str:
        seeds = seeds_of_arm(candidate, candidates)
        known = [loss for c in seeds if (loss := c["val_loss"]) is not None]
        held = held_back_by_its_seeds(candidate, candidates, chosen)
        if len(known) < len(seeds) or any(c["run_id"] == chosen["run_id"] for c in seeds):
            return held
        if "finalists" in chosen:
            return held or f"no finalist, its worst seed has {max(known):.4f}"
        return f"its worst seed has {max(known):.4f}" if max(known) > chosen["worst_loss"] else ""

    def so_far(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> list[str]:
        """Return, for each track, the arm with the lowest loss so far, and how many arms have a result."""
        clauses = []
        every = ready(config, earlier, self.name)
        for track in every:
            tuning = Tuning(config, earlier, track, results)
            found: list[tuple[float, str]] = []
            for label in tuning.arms:
                searched = tuning.search(label)
                if searched and (point := searched.best()):
                    loss = mean_loss(searched.runs(point), results)
                    words = f"{label} is lowest, validation loss {loss:.4f} at {point_in_words(point)}"
                    found.append((loss, words))
            if found:
                _, words = min(found, key=lambda each: each[0])
                words += f"; {len(found)} of {len(tuning.arms)} arms have a result"
                clauses.append(track_prefix(track, every) + words)
        return clauses

    def invent(self, config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> RunResult:
        """Return a loss that makes the middle of a grid best, or its upper end if `scenario.edge`."""
        arm = config.ablation.arms[spec.role]
        if config.tune.search == "coordinate":
            return {"val_loss": 2.0 + _landscape(arm, scenario, spec)}
        grid = points(arm.tune)
        if not scenario.edge:
            middle = grid[len(grid) // 2]
            return {"val_loss": 2.0 - (spec.arm == name_of(spec.role, middle))}
        strength = spec.run.stabilizer.strength or 1.0
        return {"val_loss": 2.0 + 1 / (1 + spec.run.optimizer.lr * strength * spec.run.budget.target_kl)}


STAGE = Tune()
