"""A stage is one object: which runs it needs, what it decides from their results, and how both are shown.

To add a stage: a module here that exports `STAGE`, a subclass of `StageConfig` with a field of the stage's
name in `config.schema.Config` (it says what the stage needs, and its place in the order), and its numbers in
`conf/scale/`. Autopilot, `status`, `why`, `diff`, `plan`, the page and the tables ask the stage; nothing
branches on its name.
"""

from __future__ import annotations

import functools
import importlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import STAGE_NEEDS, STAGES, Config, StageConfig
from ebc_lab.records.decisions import Candidate, Decision, Difference
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec, optimizer, track_prefix

from .rules import Results
from .runs import distinct
from .statistics import by_interval, noise

Track = Mapping[str, Any]  # what any stage decided for one (optimizer, projection): see records.decisions
MISSING = object()
NOT_APART = ", not told apart by one run each"
ResultsOf = Callable[[list[RunSpec]], dict[str, RunResult]]  # of those that have one


@dataclass(frozen=True)
class Figure:
    """Names a figure of a decided track. `diff` compares all of them; the page shows those that have a
    label."""

    path: str  # into the track, `control.lr`
    label: str = ""
    form: str = "{}"  # for str.format
    remark: str | Callable[[Any], str] = ""  # its unit, or what is to be said of it

    def value(self, track: Any, missing: Any = None) -> Any:
        """Return the figure of this track, or `missing` where the track has none."""
        for key in self.path.split("."):
            if not isinstance(track, Mapping) or key not in track:
                return missing
            track = track[key]
        return track

    def row(self, track: Track) -> tuple[str, str, str]:
        """Return (label, the figure as text, remark)."""
        value = self.value(track)
        remark = self.remark if isinstance(self.remark, str) else self.remark(track)
        return self.label, "none" if value is None else self.form.format(value), remark


@dataclass(frozen=True)
class Scenario:
    """Says how results that do not exist yet might turn out, for the forecast of how many runs there will
    be."""

    name: str
    edge: bool  # the best learning rate lies on the edge until the extensions are used up
    extra: int  # calibration runs beyond the grid
    merged: bool  # the chosen scale is the calibrated one, so that arms coincide
    open: bool  # the verdict stays undecided, so that finals that may add seeds add all of them


def runner_up(stage: Stage, name: str, decision: Decision) -> str | None:
    """Say what the next best candidates lacked to be chosen; None where a stage does not choose one
    winner."""
    track = decision["tracks"][name]
    if "ranked" not in track:
        return None
    parts = []
    if ranked := ranked_others(name, decision):
        gap, second = ranked[0]
        sigmas = f" ({gap / track['sigma']:.1f} σ)" if track["sigma"] else ""
        at = stage.setting.format_map(second)
        parts.append(f"{second['arm']} at {at} would have had to be {gap:.4f} nats better{sigmas}")
    if over := stage.passed_over(name, decision):
        parts.append(f"another rule would have chosen {over}")
    # optimizers that were dropped for this track: grid run against grid run, all as long
    for pair in track.get("dropped", []):
        if pair["behind"] is not None:
            words = f"{pair['track']} would have had to be {pair['behind']:.4f} nats better on the grid"
            unsure = "" if pair["told_apart"] else ", less than one run each can tell apart"
            parts.append(words + unsure)
    return "; ".join(parts) or "there was no other candidate"


def ranked_others(name: str, decision: Decision) -> list[tuple[float, Candidate]]:
    """Return the candidates that were ranked behind the chosen one, each with how far, nats; nearest
    first."""
    track = decision["tracks"][name]
    others = [c for c in candidates_of(name, decision) if c["run_id"] != track["run_id"]]
    ranked = [c for c in others if c["run_id"] in track["ranked"] and c["val_loss"] is not None]
    means = {c["run_id"]: c["val_loss"] for c in ranked} | track.get("ranked_losses", {})
    behind = [(means[c["run_id"]] - track["val_loss"], c) for c in ranked]
    return sorted(behind, key=lambda pair: pair[0])


class Said(NamedTuple):
    """What is said of a stage before it is decided: in `words`, and what of it the rest may overturn.

    `claim`: what it is about, the same word all along the stage; `holds`: what it says of that, empty where
    the words leave it open.
    """

    words: str
    claim: str
    holds: str


def leading(
    stage: Stage, config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> list[Said]:
    """Say what each track would choose if the stage were decided now, what lies next, and whether a run of
    each could tell them apart. Raises Undecidable."""
    decision = stage.decide(config, specs, results, earlier)
    said = []
    for name, track in decision["tracks"].items():
        by_id = {c["run_id"]: c for c in candidates_of(name, decision)}
        first, at = by_id[track["run_id"]], stage.setting.format_map
        words = stage.of(name, decision) + at(first)
        others = ranked_others(name, decision)
        if not others:
            why = _alone(track, by_id)
            said.append(Said(f"{words} {why}, validation loss {track['val_loss']:.4f}", name, ""))
            continue
        gap, second = others[0]
        alike = at(first) == at(second)  # as one δ* by two budgets
        words += f" ({first['arm']})" * alike
        words += f" leads, {gap:.4f} nats ahead of {at(second)}" + f" ({second['arm']})" * alike
        floor = noise(earlier["lr_sweep"]["tracks"][name]["replicate_losses"])
        apart = gap >= (floor["detectable"] or math.inf)
        said.append(Said(words + NOT_APART * (not apart), name, track["run_id"] if apart else ""))
    return said


def _alone(track: Track, candidates: Mapping[str, Candidate]) -> str:
    """Say why no candidate is ranked behind the chosen one."""
    if not any(c["val_loss"] is not None for c in candidates.values() if c["run_id"] != track["run_id"]):
        return "is the only result yet"
    if track["run_id"] in track["ranked"]:
        return "is the only one inside its band"
    return "is the nearest to its band, in which none lies yet"


def compared(words: str, claim: str, difference: Difference, *, joint: bool) -> Said:
    """Say a difference so far, and that it is open while its interval holds 0."""
    d = by_interval(difference, joint)
    low, high = d["low"], d["high"]
    side = ""
    if low is not None and low > 0:
        side = "above"
    elif high is not None and high < 0:
        side = "below"
    return Said(words + (", undecided so far" if not side else ""), claim, side)


def candidates_of(name: str, decision: Decision) -> list[Candidate]:
    """Return the candidates of one track."""
    alone = len(decision["tracks"]) == 1
    return [c for c in decision["candidates"] if alone or c["run_id"].startswith(f"{name}_")]


def seeds_of_arm(candidate: Candidate, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the runs of a candidate's arm under every seed, itself among them."""
    return [c for c in candidates if (c["role"], c["arm"]) == (candidate["role"], candidate["arm"])]


def held_back_by_its_seeds(candidate: Candidate, candidates: Sequence[Candidate], chosen: Track) -> str:
    """Say why the other seeds of a candidate's arm keep it from being chosen; empty where they do not."""
    seeds = seeds_of_arm(candidate, candidates)
    if any(c["run_id"] == chosen["run_id"] for c in seeds):
        return ""
    for c in seeds:
        if c["val_loss"] is None:
            return f"seed {c['seed']} {_became(c)} there"
    mean = statistics.fmean(c["val_loss"] or 0.0 for c in seeds)
    return f"the mean of its seeds is {mean:.4f}" if mean > chosen["val_loss"] else ""


def _became(candidate: Candidate) -> str:
    """Say what became of a run without a final loss."""
    if candidate["outcome"] == "raced":
        return f"was stopped at step {candidate['raced']}"
    return "diverged" if candidate["outcome"] == "diverged" else "did not complete"


def outside_the_band(track: Track, candidate: Candidate) -> str:
    """Say why a candidate that was not ranked by its loss was not: for its median c; empty where it was."""
    if candidate["run_id"] in track["ranked"]:
        return ""
    c = candidate["c_median"]
    return "its c was not recorded" if c is None else f"its median c, {c:.2f}, is outside the band"


def beside_the_band(track: Track) -> str:
    """Say whether the chosen median c lies in the verdict's band."""
    return f"{'inside' if track['in_band'] else 'outside'} the verdict’s band"


def invented(config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> RunResult:
    """Invent what the forecast assumes of a run in addition to its loss: a median c in the band at the scale
    that is chosen."""
    return {"c_median": 0.6 if scenario.merged == (spec.lr_scale == 2) else 0.3}


@dataclass(frozen=True)
class Stage:
    """Describes one stage. The fields from `figures` on have defaults that serve a stage which chooses one
    winner per track."""

    name: str
    # (config, earlier decisions, results so far) -> its runs; the list may grow with the results
    runs: Callable[[Config, Mapping[str, Decision], Results], list[RunSpec]]
    # (config, its runs, their results, earlier decisions); raises Undecidable
    decide: Callable[[Config, Sequence[RunSpec], Results, Mapping[str, Decision]], Decision]
    headline: Callable[[Any], str]  # a decided track, of this stage's class, in one line
    figures: tuple[Figure, ...] = ()
    # (stage, name of a track, decision): what would change it
    flips: Callable[[Stage, str, Decision], str | None] = runner_up
    # (this, configuration, its runs, the results so far, earlier decisions): what is known before it is
    # decided; raises Undecidable
    so_far: Callable[[Stage, Config, Sequence[RunSpec], Results, Mapping[str, Decision]], list[Said]] = (
        leading
    )
    setting: str = "lr {lr:g}"  # what sets a candidate apart, for str.format
    # (what was chosen, a candidate with a lower loss, its track's candidates): why it was passed over; empty
    # where it could not have been chosen, being another seed of what was, or no candidate at all
    overlooked: Callable[[Any, Candidate, Sequence[Candidate]], str] = lambda chosen, candidate, every: ""
    grows: bool = True  # its list of runs grows with its own results; if not, asking once is enough
    concludes: bool = False  # no later stage builds on its decision
    # while this run is still in progress, the one that would follow if it wins: an idle worker may start on
    # it
    follow_up: Callable[[Config, RunSpec], RunSpec | None] = lambda config, spec: None
    # (config, its runs, their results): its tracks as far as nothing that it still waits for changes them
    settled: Callable[[Config, Sequence[RunSpec], Results], dict[str, Any]] = lambda config, specs, known: {}
    # (config, scenario, run, how many runs the stage has made before it) -> figures of a result that the
    # forecast invents; of a val_loss 2.0 stands for the best loss that is known
    invented: Callable[[Config, Scenario, RunSpec, int], RunResult] = invented
    title: str = ""
    about: str = ""  # what it is for, in a sentence for readers who do not know the method
    question: Callable[[Config], str] = lambda config: ""  # the question of a study that ends with this stage
    shows: Literal["candidates", "points", "verdict", "arms", "modes", "units", "profiles"] = (
        "candidates"  # the table that explains its decision
    )
    # (config, say): fills in what its settings leave to the machine that begins the study
    resolved: Callable[[Config, Callable[[str], None]], Config] = lambda config, say: config
    pictures: tuple[str, ...] = ()  # names of the pictures drawn of its decision
    summary: str = ""  # name of its table of runs, if not summary_<name>.csv

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the stages without which it cannot be asked for."""
        return STAGE_NEEDS[self.name]

    @property
    def summary_csv(self) -> str:
        return self.summary or f"summary_{self.name}.csv"

    def settings(self, config: Config) -> StageConfig:
        """Return its part of the configuration."""
        settings: StageConfig = getattr(config, self.name)
        return settings

    def headlines(self, decision: Decision) -> list[str]:
        """Write a decision in one line per track, with the winner's margin where there is one winner. Of
        points, each of several seeds, some single run nearly always lies lower: `would_change` says which."""
        lines = []
        for name, track in decision["tracks"].items():
            over = "" if self.shows == "points" else self._passed_over(name, decision)
            lines.append(f"{self.of(name, decision)}{self.headline(track)}{_margin(track)}{over}")
        return lines

    def of(self, name: str, decision: Decision) -> str:
        """Begin a sentence about a track. The only one of a suite's stage is not named."""
        if self.shows in ("points", "arms", "modes", "units", "profiles"):
            return track_prefix(name, decision["tracks"])
        return f"{optimizer(name)}: "

    def would_change(self, decision: Decision) -> list[str]:
        """Say what would have changed the decision, one sentence per track."""
        flips = {name: self.flips(self, name, decision) for name in decision["tracks"]}
        return [f"{self.of(name, decision)}{words}" for name, words in flips.items() if words]

    def passed_over(self, name: str, decision: Decision) -> str:
        """Name the candidates of a track whose loss is lower than that of the chosen one, the lowest with the
        reason why it was not chosen; empty where there are none."""
        track = decision["tracks"][name]
        candidates = candidates_of(name, decision)
        lower: dict[str, tuple[float, str]] = {}  # arm -> its lowest loss, and what is said of it
        for c in candidates:
            chosen = track if "val_loss" in track else track.get("arms", {}).get(c["role"], {})
            loss, limit = c["val_loss"], chosen.get("val_loss")
            if loss is None or limit is None or loss >= limit:
                continue
            if reason := self.overlooked(chosen, c, candidates):
                words = f"{self.setting.format_map(c)}, {loss:.4f}: {reason}"
                lower[c["arm"]] = min((loss, words), lower.get(c["arm"], (math.inf, "")))
        if not lower:
            return ""
        more = f"; {len(lower) - 1} more" if len(lower) > 1 else ""
        return min(lower.values())[1] + more

    def _passed_over(self, name: str, decision: Decision) -> str:
        over = self.passed_over(name, decision)
        return f"; lower, but passed over: {over}" if over else ""

    def rows(self, name: str, decision: Decision) -> list[tuple[str, str, str]]:
        """Return (label, figure, remark) of what was decided for a track, as the page shows it. The loss says
        which lower ones were passed over."""
        track = decision["tracks"][name]
        shown = [f for f in self.figures if f.label and f.value(track, MISSING) is not MISSING]
        over = self._passed_over(name, decision)
        rows = [(f.path, *f.row(track)) for f in shown]
        return [(label, value, remark + over * (path == "val_loss")) for path, label, value, remark in rows]


def _margin(track: Track) -> str:
    if "ranked" not in track:
        return ""
    margin = track["margin_sigma"]
    if margin is None:  # of a lone constant rate its headline says that it is one
        return "" if len(track["ranked"]) == 1 and "replicate_losses" in track else "; no runner-up"
    return f"; margin {margin:.1f} σ{of_few_seeds(track)}"


def of_few_seeds(track: Track) -> str:
    """Warn beside a figure in units of σ that two replicates alone tell."""
    return " (σ from 2 seeds)" if len(track.get("replicate_losses", ())) == 2 else ""


@functools.cache
def stage_of(name: str) -> Stage:
    """Return the stage of this name: the `STAGE` of the module named like it. Raises UserError for an unknown
    one."""
    if name not in STAGES:
        raise UserError(f"{name} is not a stage; the stages are {', '.join(STAGES)}.")
    stage: Stage = importlib.import_module(f".{name}", __package__).STAGE
    return stage


def decision_that_shows(what: str, decisions: Mapping[str, Decision]) -> Decision | None:
    """Return the decision whose stage shows a `verdict`, or its `arms`; None where there is none."""
    return next((d for name, d in decisions.items() if stage_of(name).shows == what), None)


def planned_runs(
    stage: str,
    config: Config,
    decisions: Mapping[str, Decision],
    results_of: ResultsOf,
) -> tuple[list[RunSpec], dict[str, RunResult]]:
    """Return the runs that a stage asks for, and the results that they have; its list grows with the
    results."""
    specs: list[RunSpec] = []
    results: dict[str, RunResult] = {}
    while True:
        grown = stage_of(stage).runs(config, decisions, results)
        if len(grown) == len(specs):
            return specs, results
        specs = grown
        results = results_of(grown)
        if not stage_of(stage).grows:
            return specs, results


class Settled(dict[str, Any]):
    """What of a decision, or of a track, is settled: to ask for anything else of it raises `NotSettled`."""

    def __missing__(self, key: str) -> Any:
        raise NotSettled(key)


class NotSettled(LookupError):
    """What was asked for depends on a decision that is still open."""


def speculative_runs(
    config: Config,
    decisions: Mapping[str, Decision],
    stage: str,
    running: Sequence[RunSpec],
    later: Sequence[str],
    results_of: ResultsOf = lambda specs: {},
) -> list[RunSpec]:
    """Return runs that an idle worker may start on while `running` ones of a stage train: those that the
    stage asks for by now; those of `later` stages that the decisions so far already determine, or that do not
    depend on what this stage still looks for; and those that will follow `running` ones if they win (the only
    runs that may turn out not to be needed).
    """
    asked, results = planned_runs(stage, config, decisions, results_of)
    certain = list(asked)
    for name in later:
        certain += stage_of(name).runs(config, decisions, {})
    if tracks := stage_of(stage).settled(config, asked, results):
        part: Any = Settled(tracks={name: Settled(track) for name, track in tracks.items()})
        for name in later:
            with suppress(NotSettled):
                certain += stage_of(name).runs(config, {**decisions, stage: part}, {})
    following = [stage_of(s.stage).follow_up(config, s) for s in running]
    known = {*results, *(s.run_id for s in running)}
    runs = [s for s in certain if s.kind == "train"] + [s for s in following if s is not None]
    return [s for s in distinct(runs) if s.run_id not in known]
