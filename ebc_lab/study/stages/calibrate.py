"""calibrate: which target KL, at a multiple of the best learning rate. δ* is a stiff knob: the best depends
on the run's length, so it is looked for at that of the finals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise

from ebc_lab.config.checks import least_target_kl
from ebc_lab.config.identity import round3
from ebc_lab.config.schema import Config, RunConfig
from ebc_lab.records.decisions import CalibratedTrack, Candidate, Decision, SweepTrack
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec

from .rules import (
    Results,
    band_distance,
    c_median,
    edge_of,
    is_conclusive,
    make_decision,
    margin_sigma,
    refuse_without_tracks,
    val_loss,
)
from .runs import ebc_run, spec_of, tracks_of, waiting
from .stage import (
    Choice,
    Decisions,
    Figure,
    Scenario,
    beside_the_band,
    held_back_by_its_seeds,
    outside_the_band,
)
from .statistics import WINDOW_NATS, in_octaves, open_ends, window

PUBLISHED_TARGETS = (0.03, 0.05, 0.07)  # nats per token


def runs(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
    """Plan the target KL grid of each track and budget, and up to `max_extra` more: beyond the edge that the
    best lies on, or to bring the median c into the band."""
    specs: list[RunSpec] = []
    for name in tracks_of(decisions, "calibrate"):
        track = decisions["lr_sweep"]["tracks"][name]
        for budget in config.calibrate.budgets:
            specs += _runs_of(config, track, budget, results)
    return specs


def _runs_of(config: Config, track: SweepTrack, budget: str, results: Results) -> list[RunSpec]:
    """Plan the runs of one track under one budget."""
    settings = config.calibrate
    scale = settings.lr_scale
    first = config.study.stage_seed

    def run_at(target_kl: float, seed: int) -> RunConfig:
        return ebc_run(config, track, settings.steps, seed, scale, budget=budget, target_kl=target_kl)

    def specs(target_kl: float) -> list[RunSpec]:
        runs = [run_at(target_kl, seed) for seed in range(first, first + settings.seeds)]
        return [spec_of("calibrate", "ebc", run, scale, usual=config.finals.steps) for run in runs]

    least = least_target_kl(run_at(1.0, first))

    if settings.delta_grid == "published":
        targets = list(PUBLISHED_TARGETS)
    else:
        targets = [round3(m * track["natural_kl"]) for m in settings.multiples]
    points = {target_kl: specs(target_kl) for target_kl in sorted({max(t, round3(least)) for t in targets})}
    for _ in range(settings.max_extra):
        asked = [s for runs in points.values() for s in runs]
        if waiting(asked, results):
            break
        more = _next_target(config, asked, results)
        if more is None or more < least or more in points:
            break
        points[more] = specs(more)
    return [s for runs in points.values() for s in runs]


def band_aimed_at(config: Config) -> list[float] | None:
    """Return where the rule wants the median c; None where it goes by the loss alone."""
    return config.study.band if config.calibrate.choose == "band" else None


def mean_losses(specs: Sequence[RunSpec], results: Results) -> dict[float, float]:
    """Return by target KL the mean validation loss over its seeds, infinite where one of them did not
    complete."""
    by_target: dict[float, list[float]] = {}
    for spec in specs:
        by_target.setdefault(spec.run.budget.target_kl, []).append(val_loss(results.get(spec.run_id)))
    return {target_kl: statistics.fmean(losses) for target_kl, losses in sorted(by_target.items())}


def _next_target(config: Config, points: Sequence[RunSpec], results: Results) -> float | None:
    """Return one more target KL to try; None where there is no reason for one."""
    if config.calibrate.choose == "band":
        first = [p for p in points if p.run.seed == config.study.stage_seed]
        return _towards_band(first, results, config.study.band)
    losses = mean_losses(points, results)
    targets = list(losses)
    winner = min(targets, key=lambda target_kl: losses[target_kl])
    if math.isinf(losses[winner]) or len(targets) == 1:
        return None
    # one more, at the grid's own spacing, beyond the edge that the best lies on
    if winner == targets[-1]:
        return round3(winner * winner / targets[-2])
    return round3(winner * winner / targets[1]) if winner == targets[0] else None


def _towards_band(points: Sequence[RunSpec], results: Results, band: Sequence[float]) -> float | None:
    """Return a target KL nearer to the band; None in the band already, or with nothing to go by. c rises with
    the target."""
    medians = {p.run.budget.target_kl: c_median(results.get(p.run_id)) for p in points}
    known = sorted((target, c) for target, c in medians.items() if c is not None)
    if not known or any(band_distance(c, band) == 0 for _, c in known):
        return None
    # bisect (geometrically) where the band lies between two points, else go beyond the end that is nearer to
    # it
    for (low, c_low), (high, c_high) in pairwise(known):
        if c_low < band[0] and c_high > band[1]:
            return round3(math.sqrt(low * high))
    return round3(known[-1][0] * 2) if known[-1][1] < band[0] else round3(known[0][0] / 2)


def _bound(spec: RunSpec) -> str:
    """Write the aggregate behind a surrogate; `l2` bounds nothing, and is labelled so wherever it
    is shown."""
    aggregate = spec.run.budget.aggregate
    if spec.run.budget.name != "surrogate":
        return ""
    return f" ({aggregate}, not a bound)" if aggregate == "l2" else f" ({aggregate})"


def decide(
    config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> Decision:
    """Choose the target KL (and the budget) of each track: lowest mean validation loss; or, by the band, the
    lowest with the median c inside it, else the nearest to it."""
    settings = config.calibrate
    low, high = config.study.band
    tracks: dict[str, CalibratedTrack] = {}
    notes: list[str] = []
    for track, swept in earlier["lr_sweep"]["tracks"].items():
        decided = _decided(config, [s for s in specs if s.track == track], results, swept)
        if decided is None:
            continue
        tracks[track] = decided
        if settings.choose == "band" and not decided["in_band"]:
            notes.append(f"{track}: no median c fell into {low:g}–{high:g}; the nearest was taken")
        if settings.choose == "loss" and decided["edge"]:
            notes.append(f"{track}: δ* {decided['delta_star']:g} is the {decided['edge']}est tried")
    refuse_without_tracks(tracks, "calibrate", specs, results)
    rule = (
        f"at LR ×{settings.lr_scale:g}: the lowest validation loss over a grid of δ*, which grows, at most "
        f"{settings.max_extra} times, while its best point lies on an edge; c is reported, not aimed at"
    )
    if settings.choose == "band":
        rule = (
            f"at LR ×{settings.lr_scale:g}: lowest validation loss among those with median c in "
            f"{low:g}–{high:g}; none inside: bisect or extend by 2, {settings.max_extra} runs at most, "
            "then the nearest"
        )
    return make_decision("calibrate", rule, config, specs, results, earlier, tracks=tracks, notes=notes)


def _decided(
    config: Config, specs: Sequence[RunSpec], results: Results, swept: SweepTrack
) -> CalibratedTrack | None:
    """Decide for one track, from its runs; None where no δ* completed under all of its seeds."""
    by_budget: dict[str, list[RunSpec]] = {}
    for spec in specs:
        by_budget.setdefault(spec.run.budget.name, []).append(spec)
    losses = {budget: mean_losses(runs, results) for budget, runs in by_budget.items()}

    def loss(spec: RunSpec) -> float:
        return losses[spec.run.budget.name][spec.run.budget.target_kl]

    def outside(spec: RunSpec) -> float:
        return band_distance(c_median(results.get(spec.run_id)), config.study.band)

    usable = [s for s in specs if math.isfinite(outside(s)) and math.isfinite(loss(s))]
    usable = [s for s in usable if s.run.seed == config.study.stage_seed]  # one run stands for its δ*
    if not usable:
        return None
    ranked = usable
    if config.calibrate.choose == "band":
        usable = sorted(usable, key=lambda s: (outside(s), loss(s)))
        ranked = [s for s in usable if outside(s) == 0]
    else:
        usable = sorted(usable, key=loss)
    chosen = {s.run.budget.name: s for s in reversed(usable)}  # budget -> its best run
    winner = usable[0]
    target_kl = winner.run.budget.target_kl
    ranked_losses = {s.run_id: loss(s) for s in ranked}
    tried = losses[winner.run.budget.name]
    # a target of which a run failed or was lost says nothing of the window
    missing = {
        s.run.budget.target_kl
        for s in by_budget[winner.run.budget.name]
        if not is_conclusive(results.get(s.run_id))
    }
    known = {at: nats for at, nats in tried.items() if at not in missing}
    finite = {f"{at:g}": nats for at, nats in tried.items() if math.isfinite(nats)}
    return {
        "budget": winner.run.budget.name,
        "bound": _bound(winner),
        "delta_star": target_kl,
        "times_natural": target_kl / swept["natural_kl"],
        "lr_scale": winner.lr_scale,
        "run_id": winner.run_id,
        "val_loss": loss(winner),
        "seeds": config.calibrate.seeds,
        "losses": finite,
        "edge": edge_of(list(tried), target_kl) if len(tried) > 1 else None,
        "delta_window": window(known),
        "c_median": c_median(results[winner.run_id]),
        "in_band": outside(winner) == 0,
        "by_budget": {budget: spec.run.budget.target_kl for budget, spec in chosen.items()},
        "ranked": list(ranked_losses),
        "ranked_losses": ranked_losses,
        "margin_sigma": margin_sigma(list(ranked_losses.values()), swept["sigma"]),
        "sigma": swept["sigma"],
    }


def headline(track: CalibratedTrack) -> str:
    """Write a decided track in one line."""
    return (
        f"KL budget δ* {track['delta_star']:g} nats per token "
        f"({track['times_natural']:.2f} × the natural KL), "
        f"enforced by budget={track['budget']}{track['bound']}, "
        f"median clip coefficient c {track['c_median']:.2f}, validation loss {track['val_loss']:.4f}; "
        f"δ* window {in_octaves(track['delta_window'])}"
    )


def invented(config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> RunResult:
    """Invent a result: the best loss, or the median c inside the band, comes after the grid and
    `scenario.extra` more runs."""
    settings = config.calibrate
    natural = settings.delta_grid == "natural"
    points = len(settings.multiples if natural else PUBLISHED_TARGETS)
    if settings.choose == "band":
        return {"c_median": 0.6 if nth >= points - 1 + scenario.extra else 0.1}
    best = nth // settings.seeds
    behind = abs(best - (points // 2 if not scenario.extra else points - 2 + scenario.extra))
    return {"c_median": 0.6, "val_loss": 2.0 + 0.001 * behind}


def _reach(track: CalibratedTrack) -> str:
    span = track["delta_window"]
    assert span is not None
    ends = open_ends(span)
    reach = f"{span['low']:.3g} to {span['high']:.3g} nats, loss within {WINDOW_NATS:g} of the best"
    return reach + (f"; at least: open at the {ends} end" if ends else "")


def _overlooked(chosen: CalibratedTrack, candidate: Candidate, candidates: Sequence[Candidate]) -> str:
    return held_back_by_its_seeds(candidate, candidates, chosen) or outside_the_band(chosen, candidate)


class Calibrate(Choice):
    """The KL budget δ* of the lowest loss."""

    name = "calibrate"
    title = "How large a KL budget"
    about = (
        "With EBC, at a raised learning rate and the finals’ own length: which budget δ* gives the lowest "
        "loss."
    )
    setting = "δ* {delta_star:g}"
    figures = (
        Figure("budget", "measured by", "{}", lambda track: str(track["bound"]).strip(" ()")),
        Figure(
            "delta_star",
            "KL budget δ*",
            "{:.3g}",
            lambda track: f"nats per step, {track['times_natural']:.2f} × the natural KL",
        ),
        Figure("times_natural"),
        Figure("c_median", "median c", "{:.2f}", beside_the_band),
        Figure("val_loss", "validation loss", "{:.4f}", "nats per token"),
        Figure("delta_window.octaves", "δ* window", "{:.1f} octaves", _reach),
    )
    pictures = ("calibrate",)

    def runs(self, config: Config, earlier: Decisions, results: Results) -> list[RunSpec]:
        return runs(config, earlier, results)

    def decide(
        self, config: Config, specs: Sequence[RunSpec], results: Results, earlier: Decisions
    ) -> Decision:
        return decide(config, specs, results, earlier)

    def headline(self, track: CalibratedTrack) -> str:
        return headline(track)

    def why_not(self, chosen: CalibratedTrack, candidate: Candidate, candidates: Sequence[Candidate]) -> str:
        return _overlooked(chosen, candidate, candidates)

    def invent(self, config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> RunResult:
        return invented(config, scenario, spec, nth)


STAGE = Calibrate()
