"""lr_sweep: the best baseline learning rate, the noise between seeds, the natural KL and the fair control."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

from ebc_lab.config.errors import count
from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import Decision, Pair, SweepTrack
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec, optimizer

from .. import rules
from ..rules import Decisions, Results, Specs, Undecidable, best, losses_of, val_loss
from ..runs import Searched, rate_of, scheduled, searched_run, sweep_spec, waiting
from ..search import Point, Search
from ..stage import NOT_APART, Choice, Figure, Scenario
from ..statistics import noise as noise_floor
from .fair_control import control_in_words, control_remark, control_search, fair_control

Roles = dict[str, list[RunSpec]]  # a track's runs by role


class Grids:
    """The outcome of a sweep's grids: each track's best run, and the tracks with which later stages go on.

    A track is an (optimizer, projection). If its best loss is more than `skip_threshold` (relative) above the
    lowest of all tracks, the track is triaged: it is not searched any further.
    """

    def __init__(self, config: Config, specs: Specs, results: Results):
        self.results = results
        self.specs = [s for s in specs if s.role == "grid"]
        self.tracks = list(dict.fromkeys(s.track for s in self.specs))
        found = {t: best([s for s in self.specs if s.track == t], results) for t in self.tracks}
        completed = [winner for winner in found.values() if winner]
        completed.sort(key=lambda winner: val_loss(results[winner.run_id]))
        self.winners = {winner.track: winner for winner in completed}  # best first
        self.losses = {t: val_loss(results[winner.run_id]) for t, winner in self.winners.items()}
        limit = min(self.losses.values(), default=0.0) * (1 + config.lr_sweep.skip_threshold)
        self.alive = [t for t, loss in self.losses.items() if loss <= limit]
        self.kept = self.alive if config.lr_sweep.keep == "all" else self.alive[:1]


def _grid(config: Config, pair: Searched, results: Results) -> Search:
    sweep = config.lr_sweep

    def runs_of(point: Point) -> list[RunSpec]:
        run = searched_run(config, pair, point["lr"], sweep.steps, config.study.stage_seed, 1.0)
        return [sweep_spec(config, "grid", scheduled(run, config.study.lr_schedule, sweep.warmup), 1.0)]

    return Search([{"lr": lr} for lr in sweep.grids[pair[0]]], runs_of, results, {"lr": 2.0}, prefer_low="lr")


def _baselines(config: Config, pair: Searched, lr: float, results: Results) -> list[RunSpec]:
    """Return runs at constant rates around the grid's best, `lr`, and then replicates of the best run."""
    sweep, first = config.lr_sweep, config.study.stage_seed

    def constant(scale: float, seed: int = first, role: str = "baseline") -> RunSpec:
        return sweep_spec(config, role, searched_run(config, pair, lr, sweep.long_steps, seed, scale), scale)

    scales: list[Point] = [{"scale": scale} for scale in sweep.baseline_scales]
    search = Search(scales, lambda p: [constant(p["scale"])], results, {"scale": 2.0}, prefer_low="scale")
    search.grow(sweep.max_extensions if len(scales) > 1 else 0)
    winner = search.best()
    if search.open or winner is None:
        return search.specs
    seeds = range(first + 1, first + sweep.replicates + 1)
    return search.specs + [constant(winner["scale"], seed, "replicate") for seed in seeds]


def _by_role(specs: Specs, track: str) -> Roles:
    """Return a track's runs by role, with a list for each role of the stage."""
    by_role: Roles = {role: [] for role in ("grid", "baseline", "replicate", "control")}
    for spec in specs:
        if spec.track == track:
            by_role[spec.role].append(spec)
    return by_role


def _decided(config: Config, winner: RunSpec, by_role: Roles, results: Results) -> SweepTrack:
    """Return the decision on one track, from the track's runs. Raises Undecidable."""
    baseline = best(by_role["baseline"], results)
    control = best(by_role["control"], results)
    if baseline is None or control is None:
        lacking = f"{winner.track} with {'a constant' if baseline is None else 'a scheduled'} learning rate"
        raise Undecidable(f"lr_sweep could not decide: no run of {lacking} completed.")
    decided = _without_control(config, winner, by_role, results)
    decided["control"] = fair_control(config, control, by_role["control"], rate_of(baseline), results)
    return cast(SweepTrack, decided)


def _without_control(config: Config, winner: RunSpec, by_role: Roles, results: Results) -> dict[str, Any]:
    """Return a track's decision without the control. A baseline must have completed. Raises Undecidable."""
    baseline = best(by_role["baseline"], results)
    assert baseline is not None
    replicates = [results[s.run_id] for s in by_role["replicate"] if s.run_id in results]
    completed = [result for result in replicates if math.isfinite(val_loss(result))]
    natural = [float(kl) for result in completed if (kl := result["kl_median"])]
    if len(completed) < 2 or not natural:
        raise Undecidable(
            f"lr_sweep could not decide: fewer than two replicates of {baseline.arm} at lr "
            f"{rate_of(baseline):g} completed with an audited KL, so neither the noise nor the natural KL is "
            "known."
        )
    noise = [val_loss(result) for result in completed]
    sigma = statistics.stdev(noise)
    descents = [descent for result in replicates if (descent := result.get("descent_median"))]
    grid = by_role["grid"]
    same_run = baseline.run_id in {s.run_id for s in grid}
    tried = grid if same_run else by_role["baseline"]  # others differ in length or schedule
    rates = [rate_of(s) for s in grid]
    return {
        "optimizer": winner.run.optimizer.name,
        "projection": winner.run.projection.name,
        "lr": rate_of(baseline),
        "run_id": baseline.run_id,
        "val_loss": val_loss(results[baseline.run_id]),
        "edge": rules.edge_of([*map(rate_of, tried)], rate_of(baseline)) if len(tried) > 1 else None,
        "grid": {
            "lr": rate_of(winner),
            "val_loss": val_loss(results[winner.run_id]),
            "edge": rules.edge_of(rates, rate_of(winner)),
            "extensions": len(rates) - len(config.lr_sweep.grids[winner.run.optimizer.name]),
        },
        "ranked": [s.run_id for s in tried],
        "margin_sigma": rules.margin_sigma(losses_of(tried, results), sigma),
        "sigma": sigma,
        "replicate_losses": noise,
        "natural_kl": statistics.median(natural),
        "descent_median": statistics.median(descents) if descents else None,  # for the `energy` controller
    }


def _pairs(grids: Grids, tracks: Mapping[str, SweepTrack]) -> list[Pair]:
    """Return every (optimizer, projection), best first. An entry says whether the pair was kept, how far its
    loss on the grid lies behind the best decided track, in nats and in σ, and whether one run of each tells
    the two apart. The dropped pairs are also written into that best track."""
    leader = tracks[next(t for t in grids.winners if t in tracks)]
    floor = noise_floor(leader["replicate_losses"])
    pairs: list[Pair] = []
    for track in dict.fromkeys([*grids.winners, *grids.tracks]):
        loss = grids.losses.get(track)
        behind = None if loss is None else loss - leader["grid"]["val_loss"]
        pair: Pair = {
            "track": track,
            "lr": rate_of(grids.winners[track]) if track in grids.winners else None,
            "val_loss": loss,
            "triaged": track not in grids.alive,
            "kept": track in grids.kept,
            "behind": behind,
            "behind_sigma": behind / floor["sigma"] if behind is not None and floor["sigma"] else None,
            "told_apart": behind is not None and abs(behind) >= (floor["detectable"] or math.inf),
        }
        pairs.append(pair)
    for decided in tracks.values():
        dropped = [p for p in pairs if not p["kept"]] if decided is leader else []
        decided["dropped"] = [{**p, "detectable": floor["detectable"]} for p in dropped]
    return pairs


def _on_the_grid(grids: Grids) -> str:
    """Return a clause on the run that leads or has won the grids, and on its lead over the runner-up."""
    lead, *others = grids.winners.values()
    loss = grids.losses[lead.track]
    first = f"{optimizer(lead.track)} at lr {rate_of(lead):g}"
    none_yet = [optimizer(track) for track in grids.tracks if track not in grids.winners]
    but = f" (nothing yet of {', '.join(none_yet)})" if none_yet else ""
    second = others[0] if others else best([s for s in grids.specs if s.run_id != lead.run_id], grids.results)
    if second is None:
        return f"{first} is the only result yet, validation loss {loss:.4f}{but}"
    leads = "leads" if waiting(grids.specs, grids.results) else "won the grid"
    whose = f"{optimizer(second.track)} at " if others else ""
    gap = val_loss(grids.results[second.run_id]) - loss
    return f"{first} {leads}, {gap:.4f} nats ahead of {whose}lr {rate_of(second):g}{but}"


def _dropped_in_words(pair: Pair) -> str:
    """Return a clause such as `muon_none, 0.0412 nats behind on the grid, not told apart by one run each`."""
    if pair["behind"] is None:
        return f"{pair['track']}, of which no grid run completed"
    unsure = "" if pair["told_apart"] else NOT_APART
    return f"{pair['track']}, {pair['behind']:.4f} nats behind on the grid{unsure}"


def _notes(config: Config, tracks: Mapping[str, SweepTrack], pairs: Sequence[Pair]) -> Iterator[str]:
    for t, d in tracks.items():
        control, grid = d["control"], d["grid"]
        if control["edge"] and control["used"]:
            yield (
                f"{t}: the fair control's lr {control['lr']:g} is the {control['edge']}est tried on its "
                "schedule: it may be under-tuned"
            )
        if control["longest_warmup"] and control["used"]:
            yield f"{t}: the fair control has the longest warm-up that was tried"
        if grid["edge"]:
            edge = f"{grid['edge']} edge even after {count(grid['extensions'], 'extension')}"
            yield f"{t}: the grid's best lr, {grid['lr']:g}, lies on its {edge}"
        if d["edge"]:
            yield f"{t}: the baseline's lr {d['lr']:g} is the {d['edge']}est tried"
        worse = control["val_loss"] - d["val_loss"]
        if worse > 0 and control["used"]:
            yield (
                f"{t}: the fair control is {worse:.4f} nats worse than the constant baseline: beating it "
                "shows little; try more peaks and shapes with lr_sweep.control_scales and control_shapes"
            )
        for pair in (p for p in d["dropped"] if p["behind"] is not None):
            note = f"{t} goes on without {_dropped_in_words(pair)}"
            if not pair["told_apart"] and not pair["triaged"]:
                least = pair["detectable"]
                note += "" if least is None else f" (smallest detectable {least:.4f} nats)"
                note += ": lr_sweep.keep=all goes on with both"
            yield note
    for pair in (p for p in pairs if p["val_loss"] is None):
        yield f"{pair['track']}: no grid run completed"
    for pair in (p for p in pairs if p["triaged"] and p["val_loss"] is not None):
        yield f"{pair['track']}: triaged, more than {100 * config.lr_sweep.skip_threshold:g}% behind the best"


def _edge(track: SweepTrack) -> str:
    if len(track["ranked"]) == 1:
        return "constant; no other was tried"
    return f"constant; the {track['edge']}est tried" if track["edge"] else "constant; lower and higher tried"


def _noise(track: SweepTrack) -> str:
    floor = noise_floor(track["replicate_losses"])
    return f"nats, {floor['seeds']} replicate seeds; 95% interval {floor['low']:.4f} to {floor['high']:.4f}"


class LRSweep(Choice):
    """The stage that finds the best constant rate, the noise, the natural KL and the fair control."""

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
        """Return the runs of every track's grid, with its extensions. Once the grids are complete, also
        return, for each track that is kept, the runs at constant rates, replicates of the best of these, and
        the search for the fair control."""
        sweep = config.lr_sweep
        pairs = {"_".join(pair): pair for pair in itertools.product(sweep.optimizers, sweep.projections)}
        searches = {track: _grid(config, pair, results) for track, pair in pairs.items()}

        def asked() -> list[RunSpec]:
            return [s for search in searches.values() for s in search.specs]

        # triaged tracks do not grow; which these are is known once every grid has its results
        for track in [] if waiting(asked(), results) else Grids(config, asked(), results).alive:
            searches[track].grow(sweep.max_extensions)
        specs = asked()
        if waiting(specs, results):
            return specs
        grids = Grids(config, specs, results)
        for track in grids.kept:
            lr = rate_of(grids.winners[track])
            specs += _baselines(config, pairs[track], lr, results)
            specs += control_search(config, pairs[track], lr, results)
        return specs

    def decide(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> Decision:
        grids = Grids(config, specs, results)
        rules.refuse_without_tracks(grids.winners, self.name, grids.specs, results)
        tracks: dict[str, SweepTrack] = {}
        undecided = []
        for track in grids.kept:
            try:
                tracks[track] = _decided(config, grids.winners[track], _by_role(specs, track), results)
            except Undecidable as why:
                undecided.append(str(why))
        if not tracks:
            raise Undecidable(" ".join(undecided))
        pairs = _pairs(grids, tracks)
        sweep = config.lr_sweep
        constant = f"a constant rate {sweep.baseline_scales[0]:g} times the grid's best (no other is tried)"
        if len(sweep.baseline_scales) > 1:
            constant = "the best of several constant rates around the grid's best"
        rule = (
            f"the lowest validation loss on the grid; then, at the length of the finals, {constant}, and the "
            "fair control, whose peak, warm-up and shape are tuned one after the other; a grid whose best "
            f"point lies on an edge grows by a factor 2, at most {sweep.max_extensions} times, the grid of "
            f"the control's peaks at most {sweep.control_extensions} times; sigma is the standard "
            "deviation over fresh replicate seeds of the baseline"
        )
        chosen = {"tracks": tracks, "pairs": pairs, "notes": [*_notes(config, tracks, pairs), *undecided]}
        return rules.make_decision(self.name, rule, config, specs, results, earlier, **chosen)

    def headline(self, track: SweepTrack) -> str:
        dropped = "".join(f"; dropped: {_dropped_in_words(pair)}" for pair in track["dropped"])
        which = "the only constant rate tried" if len(track["ranked"]) == 1 else "best constant rate"
        seeds = count(len(track["replicate_losses"]), "seed")
        return (
            f"baseline ({which}): lr {track['lr']:g}, validation loss {track['val_loss']:.4f}, σ "
            f"(its spread over {seeds}) {track['sigma']:.4f}; natural KL (of a step without EBC) "
            f"{track['natural_kl']:.4g} nats{control_in_words(track)}{dropped}"
        )

    def so_far(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> list[str]:
        """Return the run that leads the grids and, once these end, each track's best baseline and control."""
        grids = Grids(config, specs, results)
        if not grids.winners:
            return []
        clauses = [_on_the_grid(grids)]
        for track in [] if waiting(grids.specs, results) else grids.kept:
            by_role = _by_role(specs, track)
            for role, called in (("baseline", "best constant rate"), ("control", "best schedule")):
                if lead := best(by_role[role], results):
                    words = f"{called} lr {rate_of(lead):g}, {val_loss(results[lead.run_id]):.4f}"
                    several = sum(map(math.isfinite, losses_of(by_role[role], results))) > 1
                    clauses.append(words + " (the only one so far)" * (not several))
        return clauses

    def settled(self, config: Config, specs: Specs, results: Results) -> dict[str, Any]:
        """Return, for each track whose baseline and replicates have their results, the decision on it without
        the fair control."""
        winners = Grids(config, specs, results).winners
        tracks: dict[str, Any] = {}
        for name in dict.fromkeys(s.track for s in specs if s.role == "replicate"):
            by_role = _by_role(specs, name)
            if best(by_role["baseline"], results) and not waiting(by_role["replicate"], results):
                with suppress(Undecidable):
                    tracks[name] = _without_control(config, winners[name], by_role, results)
        return tracks

    def invent(self, config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> RunResult:
        """Return an invented result. In the scenario `max`, the control has to search its peaks again."""
        result = super().invent(config, scenario, spec, nth)
        sweep = config.lr_sweep
        first = scheduled(spec.run, sweep.control_shapes[0], sweep.control_warmups[0]).lr_schedule
        if spec.role == "control" and spec.run.lr_schedule != first and not scenario.merged:
            result["val_loss"] = 1.0 + 1e-6 * nth
        return result


STAGE = LRSweep()
