"""calibrate: which target KL δ* is best, at a multiple of the best learning rate. The best δ* depends on the
length of a run, so the search uses the length of the finals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ebc_lab.config.checks import least_target_kl
from ebc_lab.config.identity import round3
from ebc_lab.config.schema import Config, RunConfig
from ebc_lab.ebc.options import GUARDED
from ebc_lab.records.decisions import CalibratedTrack, Candidate, Decision, SweepTrack
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec

from . import rules, stage
from .rules import Decisions, Results, Specs, band_distance, c_median, make_decision
from .runs import ebc_run, spec_of, tracks_of
from .search import Point, Search, conclusive, mean_loss
from .stage import Choice, Figure, Scenario
from .statistics import WINDOW_NATS, in_octaves, open_ends, window

TARGET = "target_kl"
PUBLISHED_TARGETS = (0.03, 0.05, 0.07)  # nats per token


def band_aimed_at(config: Config) -> list[float] | None:
    """Return the band in which the median c should lie, or None if δ* is chosen by the loss alone."""
    return config.study.band if config.calibrate.choose == "band" else None


def _search(config: Config, track: SweepTrack, budget: str, results: Results) -> Search:
    settings = config.calibrate
    first, scale = config.study.stage_seed, settings.lr_scale

    def run_at(target_kl: float, seed: int) -> RunConfig:
        return ebc_run(config, track, settings.steps, seed, scale, budget=budget, target_kl=target_kl)

    def runs_of(point: Point) -> list[RunSpec]:
        runs = [run_at(point[TARGET], seed) for seed in range(first, first + settings.seeds)]
        return [spec_of("calibrate", "ebc", run, scale, usual=config.finals.steps) for run in runs]

    least = least_target_kl(run_at(1.0, first))

    def fitted(_: str, target_kl: float) -> float | None:
        rounded = round3(target_kl)
        return rounded if rounded >= least else None

    targets = list(PUBLISHED_TARGETS)
    if settings.delta_grid == "natural":
        targets = [round3(m * track["natural_kl"]) for m in settings.multiples]
    grid: list[Point] = [{TARGET: x} for x in sorted({max(target, round3(least)) for target in targets})]
    search = Search(grid, runs_of, results, {TARGET: 2.0}, mean_loss, prefer_low=TARGET, fitted=fitted)
    if settings.choose == "loss":
        search.grow(settings.max_extra, by_spacing=True)
    else:  # c rises with the target; the run of the first seed shows where c lies
        search.seek(
            TARGET, lambda s: c_median(results.get(s[0].run_id)), config.study.band, settings.max_extra
        )
    return search


def _decided(config: Config, swept: SweepTrack, results: Results) -> CalibratedTrack | None:
    """Return the decision on one track; None if no δ* has a known median c and runs that all completed."""
    by_loss = config.calibrate.choose == "loss"
    searches = {budget: _search(config, swept, budget, results) for budget in config.calibrate.budgets}
    tried = [runs for search in searches.values() for runs in search.tried.values()]
    loss = {runs[0].run_id: mean_loss(runs, results) for runs in tried}  # by the first seed's run
    outside = {run_id: band_distance(c_median(results.get(run_id)), config.study.band) for run_id in loss}

    def rank(spec: RunSpec) -> tuple[float, float]:
        return 0.0 if by_loss else outside[spec.run_id], loss[spec.run_id]

    firsts = (runs[0] for runs in tried)
    usable = [s for s in firsts if math.isfinite(outside[s.run_id]) and math.isfinite(loss[s.run_id])]
    if not usable:
        return None
    by_rank = sorted(usable, key=rank)
    ranked = {s.run_id: loss[s.run_id] for s in (usable if by_loss else by_rank) if rank(s)[0] == 0}
    winner = by_rank[0]
    budget, target_kl = winner.run.budget, winner.run.budget.target_kl
    # `l2` bounds nothing, and is labelled so wherever it is shown
    bound = f" ({budget.aggregate}{', not a bound' * (budget.aggregate == 'l2')})"
    alike = {runs[0].run.budget.target_kl: runs for runs in searches[budget.name].tried.values()}
    losses = {target: loss[alike[target][0].run_id] for target in sorted(alike)}
    by_budget = {s.run.budget.name: s.run.budget.target_kl for s in reversed(by_rank)}  # each budget's best
    return {
        "budget": budget.name,
        "bound": bound if budget.name in GUARDED else "",
        "delta_star": target_kl,
        "times_natural": target_kl / swept["natural_kl"],
        "lr_scale": winner.lr_scale,
        "run_id": winner.run_id,
        "val_loss": loss[winner.run_id],
        "seeds": config.calibrate.seeds,
        "losses": {f"{target:g}": nats for target, nats in losses.items() if math.isfinite(nats)},
        "edge": rules.edge_of(list(losses), target_kl) if len(losses) > 1 else None,
        # a target with a failed or lost run says nothing about the window
        "delta_window": window({x: nats for x, nats in losses.items() if conclusive(alike[x], results)}),
        "c_median": c_median(results[winner.run_id]),
        "in_band": outside[winner.run_id] == 0,
        "by_budget": by_budget,
        "ranked": list(ranked),
        "ranked_losses": ranked,
        "margin_sigma": rules.margin_sigma(list(ranked.values()), swept["sigma"]),
        "sigma": swept["sigma"],
    }


def _reach(track: CalibratedTrack) -> str:
    span = track["delta_window"]
    assert span is not None
    ends = f"; at least: open at the {open_ends(span)} end" if open_ends(span) else ""
    return f"{span['low']:.3g} to {span['high']:.3g} nats, loss within {WINDOW_NATS:g} of the best{ends}"


class Calibrate(Choice):
    """The stage that chooses the KL budget δ*, by default the one with the lowest loss."""

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
        Figure("c_median", "median c", "{:.2f}", stage.beside_the_band),
        Figure("val_loss", "validation loss", "{:.4f}", "nats per token"),
        Figure("delta_window.octaves", "δ* window", "{:.1f} octaves", _reach),
    )
    pictures = ("calibrate",)

    def runs(self, config: Config, earlier: Decisions, results: Results) -> list[RunSpec]:
        """Return the runs at every target KL of the grid, for each track and budget, and at up to `max_extra`
        more. A further target KL lies beyond the edge of the grid that holds the best one, or where the
        median c may fall into the band."""
        specs: list[RunSpec] = []
        for name in tracks_of(earlier, self.name):
            for budget in config.calibrate.budgets:
                specs += _search(config, earlier["lr_sweep"]["tracks"][name], budget, results).specs
        return specs

    def decide(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> Decision:
        settings = config.calibrate
        low, high = config.study.band
        tracks: dict[str, CalibratedTrack] = {}
        notes: list[str] = []
        for track, swept in earlier["lr_sweep"]["tracks"].items():
            decided = _decided(config, swept, results)
            if decided is None:
                continue
            tracks[track] = decided
            if settings.choose == "band" and not decided["in_band"]:
                notes.append(f"{track}: no median c fell into {low:g}–{high:g}; the nearest was taken")
            if settings.choose == "loss" and decided["edge"]:
                notes.append(f"{track}: δ* {decided['delta_star']:g} is the {decided['edge']}est tried")
        rule = (
            "the lowest validation loss over a grid of δ*, which grows, at most "
            f"{settings.max_extra} times, while its best point lies on an edge; c is reported, not aimed at"
        )
        if settings.choose == "band":
            rule = (
                f"lowest validation loss among those with median c in {low:g}–{high:g}; none inside: bisect "
                f"or extend by 2, {settings.max_extra} runs at most, then the nearest"
            )
        rule = f"at LR ×{settings.lr_scale:g}: {rule}"
        return make_decision(self.name, rule, config, specs, results, earlier, tracks=tracks, notes=notes)

    def headline(self, track: CalibratedTrack) -> str:
        return (
            f"KL budget δ* {track['delta_star']:g} nats per token ({track['times_natural']:.2f} × the "
            f"natural KL), enforced by budget={track['budget']}{track['bound']}, median clip coefficient c "
            f"{track['c_median']:.2f}, validation loss {track['val_loss']:.4f}; "
            f"δ* window {in_octaves(track['delta_window'])}"
        )

    def why_not(self, chosen: CalibratedTrack, candidate: Candidate, candidates: Sequence[Candidate]) -> str:
        held_back = stage.held_back_by_its_seeds(candidate, candidates, chosen)
        return held_back or stage.outside_the_band(chosen, candidate)

    def invent(self, config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> RunResult:
        """Return an invented result. It makes the search find the best loss, or a median c inside the band,
        after the grid and `scenario.extra` more points."""
        settings = config.calibrate
        natural = settings.delta_grid == "natural"
        points = len(settings.multiples if natural else PUBLISHED_TARGETS)
        if settings.choose == "band":
            return {"c_median": 0.6 if nth >= points - 1 + scenario.extra else 0.1}
        best = nth // settings.seeds
        behind = abs(best - (points // 2 if not scenario.extra else points - 2 + scenario.extra))
        return {"c_median": 0.6, "val_loss": 2.0 + 0.001 * behind}


STAGE = Calibrate()
