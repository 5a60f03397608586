"""lr_sweep: the best baseline learning rate, the noise between seeds, the natural KL and the fair control."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import Decision, Pair, SweepTrack
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec, optimizer

from ..rules import (
    Results,
    Undecidable,
    best,
    edge_of,
    losses_of,
    make_decision,
    margin_sigma,
    refuse_without_tracks,
    val_loss,
)
from ..runs import Searched, rate_of, scheduled, searched_run, sweep_spec, waiting
from ..search import Point, Search
from ..stage import NOT_APART, Choice, Decisions, Figure, Scenario
from ..statistics import noise as noise_floor
from .fair_control import control_in_words, control_remark, control_search, fair_control


def runs(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
    """Plan the grid of every (optimizer, projection) and its extensions; then, for the kept tracks and at the
    length of `long_steps`, constant rates, their winner's replicates, and the search for the fair control.
    """
    sweep = config.lr_sweep
    pairs = itertools.product(sweep.optimizers, sweep.projections)
    grids = {"_".join(pair): _grid(config, pair, results) for pair in pairs}
    if not waiting(_runs_of(grids), results):  # only then is known which tracks are triaged: they do not grow
        for track in untriaged(config, sweep_winners(_runs_of(grids), results), results):
            grids[track].grow(sweep.max_extensions)
    specs = _runs_of(grids)
    if waiting(specs, results):
        return specs
    winners = sweep_winners(specs, results)
    for track in kept_tracks(config, winners, results):
        won = winners[track].run
        pair = (won.optimizer.name, won.projection.name)
        specs += _baselines(config, pair, won.optimizer.lr, results)
        specs += control_search(config, pair, won.optimizer.lr, results)
    return specs


def _runs_of(grids: Mapping[str, Search]) -> list[RunSpec]:
    return [s for grid in grids.values() for s in grid.specs]


def _grid(config: Config, pair: Searched, results: Results) -> Search:
    rates: list[Point] = [{"lr": lr} for lr in config.lr_sweep.grids[pair[0]]]
    return Search(rates, lambda p: [_grid_run(config, pair, p["lr"])], results, {"lr": 2.0}, prefer_low="lr")


def _grid_run(config: Config, pair: Searched, lr: float) -> RunSpec:
    sweep = config.lr_sweep
    run = searched_run(config, pair, lr, sweep.steps, config.study.stage_seed, 1.0)
    return sweep_spec(config, "grid", scheduled(run, config.study.lr_schedule, sweep.warmup), 1.0)


def _baselines(config: Config, pair: Searched, lr: float, results: Results) -> list[RunSpec]:
    """Plan constant rates around the grid's best `lr`, and replicates of the best of them."""
    sweep = config.lr_sweep
    seed = config.study.stage_seed

    def constant(scale: float, seed: int, role: str) -> RunSpec:
        run = searched_run(config, pair, lr, sweep.long_steps, seed, scale)
        return sweep_spec(config, role, run, scale)

    scales: list[Point] = [{"scale": scale} for scale in sweep.baseline_scales]
    search = Search(
        scales,
        lambda p: [constant(p["scale"], seed, "baseline")],
        results,
        {"scale": 2.0},
        prefer_low="scale",
    )
    search.grow(sweep.max_extensions if len(scales) > 1 else 0)
    winner = None if search.open else search.best()
    if winner is None:
        return search.specs
    seeds = range(seed + 1, seed + sweep.replicates + 1)
    return search.specs + [constant(winner["scale"], seed, "replicate") for seed in seeds]


def sweep_winners(grid: Sequence[RunSpec], results: Results) -> dict[str, RunSpec]:
    """Return each track's best grid run, best track first; a track without a completed run is absent."""
    tracks: dict[str, list[RunSpec]] = {}
    for spec in grid:
        tracks.setdefault(spec.track, []).append(spec)
    winners = {t: w for t, specs in tracks.items() if (w := best(specs, results))}
    return dict(sorted(winners.items(), key=lambda item: val_loss(results[item[1].run_id])))


def untriaged(config: Config, winners: Mapping[str, RunSpec], results: Results) -> list[str]:
    """Return the tracks that are not triaged, best first."""
    losses = {t: val_loss(results[w.run_id]) for t, w in winners.items()}
    return [t for t in losses if not triaged(config, losses, t)]


def kept_tracks(config: Config, winners: Mapping[str, RunSpec], results: Results) -> list[str]:
    """Return the tracks that later stages continue with: the best, or every one that is not triaged."""
    alive = untriaged(config, winners, results)
    return alive if config.lr_sweep.keep == "all" else alive[:1]


def triaged(config: Config, losses: Mapping[str, float], track: str) -> bool:
    """Tell whether a track lies more than `skip_threshold` (relative) behind the best."""
    return losses[track] > min(losses.values()) * (1 + config.lr_sweep.skip_threshold)


def decide(
    config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> Decision:
    """Choose the best baseline learning rate of each track, and measure the noise, the natural KL and the
    fair control."""
    grid = [s for s in specs if s.role == "grid"]
    winners = sweep_winners(grid, results)
    refuse_without_tracks(winners, "lr_sweep", grid, results)
    continued = kept_tracks(config, winners, results)
    tracks: dict[str, SweepTrack] = {}
    dropped = []
    for track in continued:
        try:
            of_track = [s for s in specs if s.track == track]
            tracks[track] = _decided(config, winners[track], of_track, results)
        except Undecidable as why:
            dropped.append(str(why))
    if not tracks:
        raise Undecidable(" ".join(dropped))
    pairs = _pairs(config, grid, winners, results, continued)
    _add_dropped(tracks, pairs)
    scales = config.lr_sweep.baseline_scales
    constant = f"a constant rate {scales[0]:g} times the grid's best (no other is tried)"
    if len(scales) > 1:
        constant = "the best of several constant rates around the grid's best"
    rule = (
        f"the lowest validation loss on the grid; then, at the length of the finals, {constant}, and the "
        "fair control, whose peak, warm-up and shape are tuned one after the other; a grid whose best point "
        f"lies on an edge grows by a factor 2, at most {config.lr_sweep.max_extensions} times, the grid of "
        f"the control's peaks at most {config.lr_sweep.control_extensions} times; sigma is the standard "
        "deviation over fresh replicate seeds of the baseline"
    )
    notes = [*_notes(config, tracks, pairs), *dropped]
    return make_decision(
        "lr_sweep", rule, config, specs, results, earlier, tracks=tracks, pairs=pairs, notes=notes
    )


def _decided(config: Config, winner: RunSpec, specs: Sequence[RunSpec], results: Results) -> SweepTrack:
    """Decide for one track, from its runs. Raises Undecidable."""
    of_role = _by_role(specs)
    baseline = best(of_role["baseline"], results)
    control = best(of_role["control"], results)
    if baseline is None or control is None:
        lacking = "a constant" if baseline is None else "a scheduled"
        raise Undecidable(
            f"lr_sweep could not decide: no run of {winner.track} with {lacking} learning rate completed."
        )
    decided = _without_control(config, winner, baseline, of_role, results)
    decided["control"] = fair_control(config, control, of_role["control"], rate_of(baseline), results)
    return cast(SweepTrack, decided)


def _by_role(specs: Sequence[RunSpec]) -> dict[str, list[RunSpec]]:
    of_role: dict[str, list[RunSpec]] = {role: [] for role in ("grid", "baseline", "replicate", "control")}
    for spec in specs:
        of_role[spec.role].append(spec)
    return of_role


def _without_control(
    config: Config,
    winner: RunSpec,
    baseline: RunSpec,
    of_role: Mapping[str, Sequence[RunSpec]],
    results: Results,
) -> dict[str, Any]:
    """Return all of a decided track but its fair control. Raises Undecidable."""
    grid = of_role["grid"]
    noise, natural = _replicated(baseline, of_role["replicate"], results)
    sigma = statistics.stdev(noise)
    same_run = baseline.run_id in {s.run_id for s in grid}
    tried = grid if same_run else of_role["baseline"]  # runs of another length or schedule tell nothing
    rates = [rate_of(s) for s in grid]
    return {
        "optimizer": winner.run.optimizer.name,
        "projection": winner.run.projection.name,
        "lr": rate_of(baseline),
        "run_id": baseline.run_id,
        "val_loss": val_loss(results[baseline.run_id]),
        "edge": edge_of([rate_of(s) for s in tried], rate_of(baseline)) if len(tried) > 1 else None,
        "grid": {
            "lr": rate_of(winner),
            "val_loss": val_loss(results[winner.run_id]),
            "edge": edge_of(rates, rate_of(winner)),
            "extensions": len(rates) - len(config.lr_sweep.grids[winner.run.optimizer.name]),
        },
        "ranked": [s.run_id for s in tried],
        "margin_sigma": margin_sigma(losses_of(tried, results), sigma),
        "sigma": sigma,
        "replicate_losses": noise,
        "natural_kl": statistics.median(natural),
        "descent_median": _descent(of_role["replicate"], results),
    }


def settled(config: Config, specs: Sequence[RunSpec], results: Results) -> dict[str, Any]:
    """Return each track without its control, whose search may go on, once its baseline and the replicates
    are known."""
    winners = sweep_winners([s for s in specs if s.role == "grid"], results)
    tracks: dict[str, Any] = {}
    for name in dict.fromkeys(s.track for s in specs if s.role == "replicate"):
        of_role = _by_role([s for s in specs if s.track == name])
        baseline = best(of_role["baseline"], results)
        if baseline is not None and not waiting(of_role["replicate"], results):
            with suppress(Undecidable):
                tracks[name] = _without_control(config, winners[name], baseline, of_role, results)
    return tracks


def _replicated(
    baseline: RunSpec, replicates: Sequence[RunSpec], results: Results
) -> tuple[list[float], list[float]]:
    """Return the replicates' losses and their KL divergences of a step. Raises Undecidable."""
    completed = [results[s.run_id] for s in replicates if math.isfinite(val_loss(results.get(s.run_id)))]
    natural = [float(kl) for result in completed if (kl := result["kl_median"])]
    if len(completed) < 2 or not natural:
        raise Undecidable(
            f"lr_sweep could not decide: fewer than two replicates of {baseline.arm} at lr "
            f"{rate_of(baseline):g} completed with an audited KL, so neither the noise nor the natural KL is "
            "known."
        )
    return [val_loss(result) for result in completed], natural


def _descent(replicates: Sequence[RunSpec], results: Results) -> float | None:
    """Return the predicted decrease in loss of the baseline's steps, nats a step: the unit of the `energy`
    controller."""
    every = (results[s.run_id].get("descent_median") for s in replicates if s.run_id in results)
    known = [descent for descent in every if descent]
    return statistics.median(known) if known else None


def _pairs(
    config: Config,
    grid: Sequence[RunSpec],
    winners: Mapping[str, RunSpec],
    results: Results,
    continued: Sequence[str],
) -> list[Pair]:
    """List every (optimizer, projection), the best first, and whether it was kept."""
    losses = {t: val_loss(results[w.run_id]) for t, w in winners.items()}
    pairs: list[Pair] = [
        {
            "track": t,
            "lr": w.run.optimizer.lr,
            "val_loss": losses[t],
            "triaged": triaged(config, losses, t),
            "kept": t in continued,
        }
        for t, w in winners.items()
    ]
    for track in dict.fromkeys(s.track for s in grid):
        if track not in winners:
            pairs.append({"track": track, "lr": None, "val_loss": None, "triaged": True, "kept": False})
    return pairs


def _add_dropped(tracks: Mapping[str, SweepTrack], pairs: list[Pair]) -> None:
    """Say of every pair how far it lies behind the best on the grid, `behind` in nats and `behind_sigma`, and
    whether one run each could tell them apart; and give the best track those that were `dropped` for it."""
    best = next((t for p in pairs if (t := p["track"]) in tracks), None)
    if best is None:
        return
    floor = noise_floor(tracks[best]["replicate_losses"])
    first = tracks[best]["grid"]["val_loss"]
    for pair in pairs:
        loss = pair["val_loss"]
        behind = None if loss is None else loss - first
        pair["behind"] = behind
        pair["behind_sigma"] = behind / floor["sigma"] if behind is not None and floor["sigma"] else None
        pair["told_apart"] = behind is not None and abs(behind) >= (floor["detectable"] or math.inf)
    for name, track in tracks.items():
        dropped = [p for p in pairs if not p["kept"] and name == best]
        track["dropped"] = [{**p, "detectable": floor["detectable"]} for p in dropped]


def so_far(
    config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> list[str]:
    """Say who leads on the grids; once these are done, for each track that goes on, what its baseline and its
    control would be now."""
    grid = [s for s in specs if s.role == "grid"]
    winners = sweep_winners(grid, results)
    if not winners:
        return []
    said = [_on_the_grid(grid, winners, results)]
    if waiting(grid, results):
        return said
    for track in kept_tracks(config, winners, results):
        of_role = _by_role([s for s in specs if s.track == track])
        for role, called in (("baseline", "best constant rate"), ("control", "best schedule")):
            if lead := best(of_role[role], results):
                words = f"{called} lr {rate_of(lead):g}, {val_loss(results[lead.run_id]):.4f}"
                several = sum(map(math.isfinite, losses_of(of_role[role], results))) > 1
                said.append(words + " (the only one so far)" * (not several))
    return said


def _on_the_grid(grid: Sequence[RunSpec], winners: Mapping[str, RunSpec], results: Results) -> str:
    """Say which run of the grids leads, or won, and the next track; of a single track, the next rate."""
    lead, *others = winners.values()
    leads = "leads" if waiting(grid, results) else "won the grid"
    mine = val_loss(results[lead.run_id])
    at = f"{optimizer(lead.track)} at lr {rate_of(lead):g}"
    none_yet = [t for t in dict.fromkeys(s.track for s in grid) if t not in winners]
    but = f" (nothing yet of {', '.join(map(optimizer, none_yet))})" if none_yet else ""
    second = best([s for s in grid if s.run_id != lead.run_id], results)
    if others:
        gap = val_loss(results[others[0].run_id]) - mine
        next_best = f"{optimizer(others[0].track)} at lr {rate_of(others[0]):g}"
    elif second is not None:
        gap = val_loss(results[second.run_id]) - mine
        next_best = f"lr {rate_of(second):g}"
    else:
        return f"{at} is the only result yet, validation loss {mine:.4f}{but}"
    return f"{at} {leads}, {gap:.4f} nats ahead of {next_best}{but}"


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _note_of_dropped(best: str, pair: Pair) -> str:
    text = f"{best} goes on without {_dropped_in_words(pair)}"
    if pair["told_apart"] or pair["triaged"]:
        return text
    least = "" if pair["detectable"] is None else f" (smallest detectable {pair['detectable']:.4f} nats)"
    return f"{text}{least}: lr_sweep.keep=all goes on with both"


def _dropped_in_words(pair: Pair) -> str:
    """Write `muon_none, 0.0412 nats behind on the grid, not told apart by one run each`."""
    if pair["behind"] is None:
        return f"{pair['track']}, of which no grid run completed"
    unsure = "" if pair["told_apart"] else NOT_APART
    return f"{pair['track']}, {pair['behind']:.4f} nats behind on the grid{unsure}"


def _notes(config: Config, tracks: Mapping[str, SweepTrack], pairs: Sequence[Pair]) -> list[str]:
    notes = []
    for t, d in tracks.items():
        control = d["control"]
        if control["edge"] and control["used"]:
            notes.append(
                f"{t}: the fair control's lr {control['lr']:g} is the {control['edge']}est tried on its "
                "schedule: it may be under-tuned"
            )
        if control["longest_warmup"] and control["used"]:
            notes.append(f"{t}: the fair control has the longest warm-up that was tried")
        if d["grid"]["edge"]:
            notes.append(
                f"{t}: the grid's best lr, {d['grid']['lr']:g}, lies on its {d['grid']['edge']} edge even "
                f"after {_times(d['grid']['extensions'], 'extension')}"
            )
        if d["edge"]:
            notes.append(f"{t}: the baseline's lr {d['lr']:g} is the {d['edge']}est tried")
        worse = control["val_loss"] - d["val_loss"]
        if worse > 0 and control["used"]:
            notes.append(
                f"{t}: the fair control is {worse:.4f} nats worse than the constant baseline: beating it "
                "shows little; try more peaks and shapes with lr_sweep.control_scales and control_shapes"
            )
        notes += [_note_of_dropped(t, p) for p in d["dropped"] if p["behind"] is not None]
    notes += [f"{p['track']}: no grid run completed" for p in pairs if p["val_loss"] is None]
    behind = f"triaged, more than {100 * config.lr_sweep.skip_threshold:g}% behind the best"
    return notes + [f"{p['track']}: {behind}" for p in pairs if p["triaged"] and p["val_loss"] is not None]


def follow_up(config: Config, spec: RunSpec) -> RunSpec | None:
    """Return the grid point that would follow if this extension wins, unless it is the last one allowed."""
    if spec.role != "grid":
        return None
    grid = config.lr_sweep.grids[spec.run.optimizer.name]
    lr = spec.run.optimizer.lr
    if lr > max(grid):
        further = 2 * lr
    elif lr < min(grid):
        further = lr / 2
    else:
        return None
    reach = 2.0**config.lr_sweep.max_extensions * (1 + 1e-6)
    if not min(grid) / reach <= further <= max(grid) * reach:
        return None
    return _grid_run(config, (spec.run.optimizer.name, spec.run.projection.name), further)


def headline(track: SweepTrack) -> str:
    """Write a decided track in one line."""
    dropped = "".join(f"; dropped: {_dropped_in_words(pair)}" for pair in track["dropped"])
    which = "the only constant rate tried" if len(track["ranked"]) == 1 else "best constant rate"
    seeds = _times(len(track["replicate_losses"]), "seed")
    return (
        f"baseline ({which}): lr {track['lr']:g}, validation loss {track['val_loss']:.4f}, σ "
        f"(its spread over {seeds}) {track['sigma']:.4f}; natural KL (of a step without EBC) "
        f"{track['natural_kl']:.4g} nats{control_in_words(track)}{dropped}"
    )


def _edge(track: SweepTrack) -> str:
    if len(track["ranked"]) == 1:
        return "constant; no other was tried"
    return f"constant; the {track['edge']}est tried" if track["edge"] else "constant; lower and higher tried"


def _noise(track: SweepTrack) -> str:
    floor = noise_floor(track["replicate_losses"])
    return f"nats, {floor['seeds']} replicate seeds; 95% interval {floor['low']:.4f} to {floor['high']:.4f}"


class LRSweep(Choice):
    """The best constant learning rate, the noise, the natural KL and the fair control."""

    name = "lr_sweep"
    title = "Learning rate, noise and a fair control"
    about = (
        "Without EBC: which optimizer is best, and at which constant learning rate, how much luck there is "
        "in a loss (σ, the spread over replicate seeds), how far predictions move by themselves (the natural "
        "KL), and how good the same optimizer gets on a schedule whose peak, warm-up and shape are tuned "
        "(the fair control)."
    )
    figures = (
        Figure("lr", "baseline’s learning rate", "{:.3g}", _edge),
        Figure("val_loss", "validation loss", "{:.4f}", "nats per token"),
        Figure("sigma", "noise σ", "{:.4f}", _noise),
        Figure("natural_kl", "natural KL", "{:.3g}", "nats per step, without EBC"),
        Figure("control.lr", "fair control", "lr {:.3g}", control_remark),
        Figure("control.val_loss"),
    )
    pictures = ("lr_sweep",)

    def runs(self, config: Config, earlier: Decisions, results: Results) -> list[RunSpec]:
        return runs(config, earlier, results)

    def decide(
        self, config: Config, specs: Sequence[RunSpec], results: Results, earlier: Decisions
    ) -> Decision:
        return decide(config, specs, results, earlier)

    def headline(self, track: SweepTrack) -> str:
        return headline(track)

    def so_far(
        self, config: Config, specs: Sequence[RunSpec], results: Results, earlier: Decisions
    ) -> list[str]:
        return so_far(config, specs, results, earlier)

    def follow_up(self, config: Config, spec: RunSpec) -> RunSpec | None:
        return follow_up(config, spec)

    def settled(self, config: Config, specs: Sequence[RunSpec], results: Results) -> dict[str, Any]:
        return settled(config, specs, results)

    def invent(self, config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> RunResult:
        """Return the usual figures; at the most, another warm-up or shape than the control's first wins, so
        that its peaks are looked at again."""
        result = super().invent(config, scenario, spec, nth)
        sweep = config.lr_sweep
        first = scheduled(spec.run, sweep.control_shapes[0], sweep.control_warmups[0]).lr_schedule
        if spec.role == "control" and spec.run.lr_schedule != first and not scenario.merged:
            result["val_loss"] = 1.0 + 1e-6 * nth
        return result


STAGE = LRSweep()
