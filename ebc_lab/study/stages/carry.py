"""carry: in which unit should a step be measured? Every arm in every setting, over its grid and the seeds.

Which one constant of each unit, chosen in other settings, serves a setting that it was not chosen on? A grid
grows by its own ratio where a setting's best lies on its edge; what is carried is a constant of the grid that
all settings share. A diverged run counts with the loss of its first step, as in Wortsman et al.,
arXiv:2309.14322; a point that lacks a run because it failed is not used.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ebc_lab.config.checks import least_target_kl
from ebc_lab.config.choices import changed, shaped
from ebc_lab.config.dicts import run_part, to_dict
from ebc_lab.config.identity import canonical_json, digest, number, round3, study_environment
from ebc_lab.config.schema import CarryConfig, CarrySettingConfig, Config, RunConfig, UnitConfig
from ebc_lab.records.decisions import Decision, Difference, UnitCurve, UnitPoint, UnitsTrack
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec

from .carried import EARNS, LOSES, NO_GAIN, track_of
from .rules import Results, edge_of, make_decision, refuse_without_tracks
from .runs import distinct, waiting
from .stage import Said, Scenario, Stage
from .statistics import centre_of

NAME = "carry"
RATE = "optimizer.lr"
TARGET = "budget.target_kl"
IN_WORDS = {EARNS: "earns its cost", LOSES: "is worse", NO_GAIN: "does not earn its cost"}
Made = dict[tuple[str, str, float, int], RunSpec]  # by arm, setting, constant and seed


def runs(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
    """Plan every arm in every setting over its grid and the seeds; grids grow as their runs end."""
    curves = searched(config, results)
    return distinct([s for of in curves.values() for tried in of.values() for s in tried.specs])


# -- runs ----------------------------------------------------------------------------------------------------


def run_of(config: Config, unit: UnitConfig, setting: CarrySettingConfig, value: float) -> RunConfig:
    """Build an arm's run in a setting, at a constant."""
    base = run_part(config)
    plain = replace(
        base,
        steps=config.carry.steps,
        evaluate=["val", "test"],
        stabilizer=replace(base.stabilizer, name="none"),
    )
    run = shaped(changed(plain, with_text(base, setting.settings)), setting)
    run = changed(run, unit.settings)
    run = _with(run, RATE, float(f"{setting.lr * unit.lr_scale:.6g}"))
    return _with(run, unit.over, round3(value * setting.width_scale**unit.width_power))


def _with(run: RunConfig, key: str, value: float) -> RunConfig:
    group, _, name = key.partition(".")
    changes: dict[str, Any] = {group: replace(getattr(run, group), **{name: value})}
    return replace(run, **changes)


def with_text(base: RunConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a setting's settings with checksums of its own text and tokens, where it has its own: the
    study's are of another text. Before the study is resolved, in a plan, something that is no checksum of
    any text stands for them."""
    made = dict(settings)
    if {"data", "tokens"} & set(settings):
        data = {**to_dict(base.data), "file": None, "sha256": None, **settings.get("data", {})}
        if "data" not in settings:
            data = to_dict(base.data)
        tokens = {**to_dict(base.tokens), "sha256": None, **settings.get("tokens", {})}
        data["sha256"] = data["sha256"] or digest(["text", data["name"], data["file"]])
        tokens["sha256"] = tokens["sha256"] or digest(["tokens", tokens["name"], tokens["size"]])
        if tokens["name"] == "characters":
            tokens["sha256"] = None
        made |= {"data": data, "tokens": tokens}
    return made


def resolved(config: Config, say: Callable[[str], None]) -> Config:
    """Fill in the checksums of the texts and tokens of those settings that have their own."""
    from ebc_lab.workloads.text import checked_text, pinned

    carry = config.carry
    settings = dict(carry.settings)
    for name, setting in carry.settings.items():
        if {"data", "tokens"} & set(setting.settings):
            asked = with_text(run_part(config), setting.settings)
            given = {key: setting.settings.get(key, {}).get("sha256") for key in ("data", "tokens")}
            open_ = {key: {**asked[key], "sha256": given[key]} for key in given}
            run = shaped(changed(run_part(config), {**setting.settings, **open_}), setting)
            run = pinned(run, *checked_text(run))
            own = {"data": to_dict(run.data), "tokens": to_dict(run.tokens)}
            settings[name] = replace(setting, settings={**setting.settings, **own})
            say(f"{NAME}: {name} has a text of its own, {run.data.name} in {run.tokens.name}")
    return replace(config, carry=replace(carry, settings=settings))


@functools.lru_cache(maxsize=4)
def _made(key: str) -> Made:
    """Return where the runs of a configuration are kept once they are made: naming thousands of them takes
    seconds, and a study asks for all of them whenever a run ends."""
    return {}


def _specs_of(config: Config) -> Callable[[str, str, float], list[RunSpec]]:
    """Return what makes an arm's runs in a setting at a constant, one for each seed."""
    carry = config.carry
    named = {"run": run_part(config), "carry": carry}
    parts = {key: to_dict(value) for key, value in named.items()}
    made = _made(canonical_json({**parts, "environment": study_environment(config)}))
    track = f"{config.optimizer.name}_{config.projection.name}"

    def specs(arm: str, name: str, value: float) -> list[RunSpec]:
        unit, setting = carry.arms[arm], carry.settings[name]
        lacking = [seed for seed in config.seeds if (arm, name, value, seed) not in made]
        run = run_of(config, unit, setting, value) if lacking else None
        for seed in lacking:
            assert run is not None
            label = f"{arm}_{name}_{number(value)}"
            scale = float(f"{run.optimizer.lr / setting.lr:.6g}")
            made[arm, name, value, seed] = RunSpec(
                NAME, arm, label, scale, replace(run, seed=seed), of_track=track
            )
        return [made[arm, name, value, seed] for seed in config.seeds]

    return specs


# -- the search of each setting's best -----------------------------------------------------------------------


@dataclass
class Tried:
    """The runs of an arm in a setting, by constant, and what they came to."""

    runs: dict[float, list[RunSpec]]
    results: Results

    @property
    def specs(self) -> list[RunSpec]:
        return [s for value in self.runs for s in self.runs[value]]

    def curve(self) -> UnitCurve:
        """Return what was measured, by rising constant; of equal ones the smaller constant is best."""
        starts = self._starts()
        points = [_point(v, self.runs[v], self.results, starts) for v in sorted(self.runs)]
        usable = [(p["mean"], p["value"]) for p in points if p["mean"] is not None]
        loss, best = min(usable, default=(None, None))
        edge = None if best is None else edge_of([p["value"] for p in points], best)
        return {"points": points, "best": best, "loss": loss, "edge": edge}

    def _starts(self) -> dict[str, float]:
        """Return each seed's loss at the first step, which no constant changes."""
        starts: dict[str, float] = {}
        for spec in self.specs:
            first = self.results.get(spec.run_id, RunResult()).get("initial_loss")
            if first is not None and math.isfinite(first):
                starts.setdefault(str(spec.run.seed), first)
        return starts


def _point(
    value: float, specs: Sequence[RunSpec], results: Results, starts: Mapping[str, float]
) -> UnitPoint:
    point: UnitPoint = {"value": value, "val": {}, "test": {}, "mean": None, "diverged": []}
    for spec in specs:
        seed = str(spec.run.seed)
        result = results.get(spec.run_id, RunResult())
        diverged = result.get("outcome") == "diverged"
        if diverged:
            point["diverged"].append(seed)
        completed = result.get("outcome") == "completed"
        start = starts.get(seed) if diverged else None
        point["val"][seed] = result.get("val_loss") if completed else start
        point["test"][seed] = result.get("test_loss") if completed else start
    known = [loss for loss in point["val"].values() if loss is not None]
    whole = len(known) == len(specs) and None not in point["test"].values()
    point["mean"] = statistics.fmean(known) if whole else None
    return point


def searched(config: Config, results: Results) -> dict[str, dict[str, Tried]]:
    """Search each arm's best constant in each setting, as far as the results tell."""
    make = _specs_of(config)
    carry = config.carry
    return {
        arm: {
            name: _tried(carry, unit, functools.partial(make, arm, name), results)
            for name in carry.settings
        }
        for arm, unit in carry.arms.items()
    }


def _tried(
    carry: CarryConfig, unit: UnitConfig, make: Callable[[float], list[RunSpec]], results: Results
) -> Tried:
    tried = Tried({float(value): make(float(value)) for value in unit.grid}, results)
    ratio = ratio_of(unit.grid)
    for _ in range(carry.max_extensions):
        if waiting(tried.specs, results):
            break
        edge = tried.curve()["edge"]
        if edge is None:
            break
        value = round3(max(tried.runs) * ratio if edge == "high" else min(tried.runs) / ratio)
        made = make(value)
        run = made[0].run
        if unit.over == TARGET and run.budget.target_kl < least_target_kl(run):
            break  # no precision shows so small a KL
        tried.runs[value] = made
    return tried


def ratio_of(grid: Sequence[float]) -> float:
    """Return the mean ratio of a grid's neighbours, which rounded values show better than two of them."""
    return float((grid[-1] / grid[0]) ** (1 / (len(grid) - 1)))


# -- the decision --------------------------------------------------------------------------------------------


def decide(
    config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> Decision:
    """Carry every unit's constant from all settings but one to that one, and judge it there."""
    carry = config.carry
    curves = {
        arm: {name: tried.curve() for name, tried in of.items()}
        for arm, of in searched(config, results).items()
    }
    track = track_of(carry, curves)
    judged = any(found["carried"] for found in track["arms"].values())
    tracks = {specs[0].track: track}
    refuse_without_tracks(tracks if judged else {}, NAME, specs, results)
    rule = (
        "each setting in turn is left out; each arm takes the constant of its grid with the least mean "
        "regret in the other settings (mean validation loss less the best of all arms there; settings that "
        "are kept for the judgement choose nothing) and is judged by its test loss in the one left out, "
        f"{len(config.seeds)} seeds; a challenger earns its cost if its mean test loss over the settings is "
        f"at least {carry.margin:g} nats below that of {carry.reference} and the upper end of the 95% "
        f"interval that holds for all {len(carry.challengers)} challengers at once is below 0; a run is "
        f"broken if it diverged or its test loss is more than {carry.broken:g} nats above the median of all "
        "runs at carried constants in its setting; a diverged run counts with the loss of its first step"
    )
    notes = list(_notes(carry, track))
    return make_decision(NAME, rule, config, specs, results, earlier, tracks=tracks, notes=notes)


def _notes(carry: CarryConfig, track: UnitsTrack) -> Iterator[str]:
    """Note what is to be known of a grid, and of runs that are missing."""
    for arm, found in track["arms"].items():
        on_edge = [f"{name} ({c['edge']})" for name, c in found["curves"].items() if c["edge"]]
        if on_edge:
            yield f"{arm}: the best constant lies on the edge of what was tried in {', '.join(on_edge)}"
        grid = carry.arms[arm].grid
        ends = {c["constant"] for c in found["carried"].values()} & {grid[0], grid[-1]}
        if ends:
            at = " and ".join(f"{value:g}" for value in sorted(ends))
            yield f"{arm}: a constant that is carried, {at}, is the end of its grid"
        lacking = [
            f"{name} at {p['value']:g}"
            for name, curve in found["curves"].items()
            for p in curve["points"]
            if p["mean"] is None
        ]
        if lacking:
            more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
            yield f"{arm}: runs are missing, so not used: {', '.join(lacking[:5])}{more}"
        unjudged = [name for name in track["settings"] if name not in found["carried"]]
        if unjudged:
            yield f"{arm} could not be judged in {', '.join(unjudged)}"


def headline(track: UnitsTrack) -> str:
    """Write a decided track in one sentence: which unit carries best, and what each challenger came to."""
    judged = {arm: found["excess"] for arm, found in track["arms"].items() if found["excess"] is not None}
    least = min(judged, key=lambda arm: judged[arm])
    parts = [f"{least} carries best, {judged[least]:.4f} nats above the best of all arms on average"]
    for arm in track["challengers"]:
        said = IN_WORDS.get(track["verdicts"][arm], "is undecided")
        parts.append(f"{arm} {said}: {_against(track['against'][arm])} from {track['reference']}")
    return "; ".join(parts)


def _against(difference: Difference) -> str:
    """Write `-0.0123 nats [-0.0200, -0.0046]`, by the interval that holds for all challengers."""
    mean, low, high = centre_of(difference), difference["joint_low"], difference["joint_high"]
    if mean is None:
        return "nothing to compare"
    ends = "" if low is None or high is None else f" [{low:+.4f}, {high:+.4f}]"
    return f"{mean:+.4f} nats{ends}"


def so_far(
    stage: Stage, config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> list[Said]:
    """Say in how many settings every arm has a best constant by now."""
    curves = searched(config, results)
    known = {
        arm: sum(not waiting(tried.specs, results) for tried in of.values()) for arm, of in curves.items()
    }
    whole, every = sum(known.values()), len(known) * len(config.carry.settings)
    return [Said(f"{whole} of {every} pairs of an arm and a setting are searched", NAME, "")]


def invented(config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> RunResult:
    """Invent a result for the forecast: the middle of a grid is best, or at the most its upper end always."""
    unit = config.carry.arms[spec.role]
    group, _, key = unit.over.partition(".")
    at = float(getattr(getattr(spec.run, group), key))
    if not scenario.merged:
        loss = 2.0 + 1 / (1 + at)
    else:
        loss = 2.0 + abs(math.log(at / unit.grid[len(unit.grid) // 2]))
    return {"val_loss": loss, "test_loss": loss, "initial_loss": 5.0}


STAGE = Stage(
    name=NAME,
    runs=runs,
    decide=decide,
    headline=headline,
    so_far=so_far,
    invented=invented,
    flips=lambda stage, name, decision: None,
    concludes=True,
    title="One constant in every setting",
    about="Each arm limits or sets a step in a unit of its own. Which one constant, chosen in other settings, "
    "serves a setting that it was not chosen on?",
    resolved=resolved,
    question=lambda config: config.carry.question,
    shows="units",
)
