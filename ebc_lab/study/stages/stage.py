"""A stage is a class: which runs it needs, what it decides from their results, and how both are told.

To add one: a module here with a subclass of `Stage`, or of `Choice` where one candidate wins on each track,
and its one object, `STAGE`; a subclass of `StageConfig` and a field of the stage's name in
`config.schema.Config`, which give its settings, the stages that it needs and its place in the order; its
numbers in `conf/scale/`. Autopilot, `status`, `why`, `diff`, `plan`, the page and the tables ask the stage.
"""

from __future__ import annotations

import functools
import importlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import STAGES, Config
from ebc_lab.records.decisions import Candidate, Decision, Difference
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec, optimizer, track_prefix

from .rules import Decisions as Decisions
from .rules import Results, Specs
from .runs import distinct
from .statistics import by_interval, noise

Track = Mapping[str, Any]  # what a stage decided for one (optimizer, projection): see records.decisions
ResultsOf = Callable[[list[RunSpec]], dict[str, RunResult]]  # of those that have one
MISSING = object()
NOT_APART = ", not told apart by one run each"


@dataclass(frozen=True)
class Figure:
    """One figure of a decided track. `diff` compares all of them; the page shows those that have a label."""

    path: str  # into the track, `control.lr`
    label: str = ""
    form: str = "{}"  # for str.format
    remark: str | Callable[[Any], str] = ""  # its unit, or what makes a remark of the track

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
    """How results that do not exist yet turn out, for the forecast of how many runs there will be."""

    name: str
    edge: bool  # every search goes on as long as it may, and the verdict stays undecided
    extra: int  # calibration runs beyond the grid
    merged: bool  # the chosen scale is the calibrated one, so that arms coincide


class Stage:
    """A stage of a study. A subclass has `name`, `title`, `runs`, `decide` and `headline`; the rest has
    defaults.

    `specs` are always the stage's own runs, and `earlier` the decisions of the stages before it.
    """

    name: str
    title = ""
    about = ""  # what it is for, in a sentence for readers who do not know the method
    figures: tuple[Figure, ...] = ()
    shows = "candidates"  # which table explains its decision: report and screen have one for each word
    pictures: tuple[str, ...] = ()  # names of the pictures drawn of its decision
    concludes = False  # no later stage builds on its decision
    leads_with_optimizer = True  # of sentences about a track; else its name leads, where there are several

    def runs(self, config: Config, earlier: Decisions, results: Results) -> list[RunSpec]:
        """Return the runs that the stage needs; the list may grow with its own results."""
        raise NotImplementedError

    def decide(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> Decision:
        """Return the decision that follows from the results. Raises Undecidable."""
        raise NotImplementedError

    def headline(self, track: Any) -> str:
        """Return what was decided for a track, in one line."""
        raise NotImplementedError

    def so_far(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> list[str]:
        """Return what can be said before the stage is decided, a clause each. Raises Undecidable."""
        return []

    def turning_points(self, name: str, decision: Decision) -> list[str]:
        """Return what would have changed the decision on a track, a clause each."""
        return []

    def passed_over(self, name: str, decision: Decision) -> str:
        """Return what had a lower loss on a track than the choice, and why it was not chosen; empty where
        nothing had."""
        return ""

    def lead_in(self, name: str, decision: Decision) -> str:
        """Return how a sentence about a track begins."""
        return f"{optimizer(name)}: " if self.leads_with_optimizer else track_prefix(name, decision["tracks"])

    def question(self, config: Config) -> str:
        """Return the question of a study that ends with this stage; empty: that of the lab."""
        return str(getattr(getattr(config, self.name), "question", ""))

    def resolve(self, config: Config, say: Callable[[str], None]) -> Config:
        """Return the configuration, filled in where the stage's settings leave something to the machine that
        begins the study."""
        return config

    def settled(self, config: Config, specs: Specs, results: Results) -> dict[str, Any]:
        """Return the decision's tracks as far as no run that is still missing can change them."""
        return {}

    def invent(self, config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> RunResult:
        """Return figures of a result as a forecast needs them: by default a median c that lies in the band at
        the scale that is chosen.

        `nth`: how many runs the stage has made before it. A val_loss of 2.0 stands for the best known one.
        """
        return {"c_median": 0.6 if scenario.merged == (spec.lr_scale == 2) else 0.3}

    # -- what follows from these, for whoever asks a stage ---------------------------------------------------

    @property
    def summary_csv(self) -> str:
        """Return the name of its table of runs."""
        return f"summary_{self.name}.csv"

    def headlines(self, decision: Decision) -> list[str]:
        """Return a decision in one line per track, with the winner's margin and what was passed over."""
        return [
            self.lead_in(name, decision) + self.headline(track) + _margin(track) + self._over(name, decision)
            for name, track in decision["tracks"].items()
        ]

    def would_change(self, decision: Decision) -> list[str]:
        """Return what would have changed the decision, one sentence per track."""
        points = {name: self.turning_points(name, decision) for name in decision["tracks"]}
        return [f"{self.lead_in(name, decision)}{'; '.join(said)}" for name, said in points.items() if said]

    def rows(self, name: str, decision: Decision) -> list[tuple[str, str, str]]:
        """Return (label, figure, remark) of what was decided for a track, as the page shows it. The remark on
        the loss says which lower ones were passed over."""
        track, rows = decision["tracks"][name], []
        for figure in self.figures:
            if figure.label and figure.value(track, MISSING) is not MISSING:
                label, value, remark = figure.row(track)
                over = self._over(name, decision) if figure.path == "val_loss" else ""
                rows.append((label, value, remark + over))
        return rows

    def _over(self, name: str, decision: Decision) -> str:
        over = self.passed_over(name, decision)
        return f"; lower, but passed over: {over}" if over else ""


class Choice(Stage):
    """A stage that chooses one candidate on each track, by its validation loss."""

    setting = "lr {lr:g}"  # what sets a candidate apart, for str.format

    def why_not(self, chosen: Any, candidate: Candidate, candidates: Sequence[Candidate]) -> str:
        """Return why a candidate with a lower loss than the chosen one's was passed over; empty where it
        could not have been chosen, being another seed of what was, or no candidate at all.

        `candidates`: all of the track.
        """
        return ""

    def so_far(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> list[str]:
        """Return what each track would choose now, what lies next, and whether a run of each could tell them
        apart. Raises Undecidable."""
        decision = self.decide(config, specs, results, earlier)
        said = []
        for name, track in decision["tracks"].items():
            others = {c["run_id"]: c for c in candidates_of(name, decision)}
            first = others.pop(track["run_id"])
            setting = self.setting.format_map(first)
            words = self.lead_in(name, decision) + setting
            behind = _ranked_behind(name, decision)
            if not behind:
                alone = "is the nearest to its band, in which none lies yet"
                if all(c["val_loss"] is None for c in others.values()):
                    alone = "is the only result yet"
                elif track["run_id"] in track["ranked"]:
                    alone = "is the only one inside its band"
                said.append(f"{words} {alone}, validation loss {track['val_loss']:.4f}")
                continue
            gap, second = behind[0]
            next_setting = self.setting.format_map(second)
            alike = setting == next_setting  # as one δ* by two budgets
            words += f" ({first['arm']})" * alike
            words += f" leads, {gap:.4f} nats ahead of {next_setting}" + f" ({second['arm']})" * alike
            floor = noise(earlier["lr_sweep"]["tracks"][name]["replicate_losses"])
            said.append(words + NOT_APART * (gap < (floor["detectable"] or math.inf)))
        return said

    def turning_points(self, name: str, decision: Decision) -> list[str]:
        """Return what the next best candidates lacked to be chosen."""
        track = decision["tracks"][name]
        points = []
        if ranked := _ranked_behind(name, decision):
            gap, second = ranked[0]
            sigmas = f" ({gap / track['sigma']:.1f} σ)" if track["sigma"] else ""
            setting = self.setting.format_map(second)
            points.append(f"{second['arm']} at {setting} would have had to be {gap:.4f} nats better{sigmas}")
        if over := self.passed_over(name, decision):
            points.append(f"another rule would have chosen {over}")
        # optimizers that were dropped for this track: grid run against grid run, all as long
        for pair in track.get("dropped", []):
            if pair["behind"] is not None:
                words = f"{pair['track']} would have had to be {pair['behind']:.4f} nats better on the grid"
                unsure = "" if pair["told_apart"] else ", less than one run each can tell apart"
                points.append(words + unsure)
        return points or ["there was no other candidate"]

    def passed_over(self, name: str, decision: Decision) -> str:
        """Return the candidate with the lowest loss below the chosen one's, why it was not chosen, and how
        many more arms have such a loss; empty where none has."""
        track = decision["tracks"][name]
        candidates = candidates_of(name, decision)
        lower: dict[str, tuple[float, str]] = {}  # arm -> its lowest loss, and what is said of it
        for c in candidates:
            chosen = track if "val_loss" in track else track.get("arms", {}).get(c["role"], {})
            loss, limit = c["val_loss"], chosen.get("val_loss")
            if loss is None or limit is None or loss >= limit:
                continue
            if reason := self.why_not(chosen, c, candidates):
                words = f"{self.setting.format_map(c)}, {loss:.4f}: {reason}"
                lower[c["arm"]] = min((loss, words), lower.get(c["arm"], (math.inf, "")))
        if not lower:
            return ""
        more = f"; {len(lower) - 1} more" if len(lower) > 1 else ""
        return min(lower.values())[1] + more


def candidates_of(name: str, decision: Decision) -> list[Candidate]:
    """Return the candidates of one track."""
    alone = len(decision["tracks"]) == 1
    return [c for c in decision["candidates"] if alone or c["run_id"].startswith(f"{name}_")]


def _ranked_behind(name: str, decision: Decision) -> list[tuple[float, Candidate]]:
    """Return the candidates that were ranked behind the chosen one, each with its distance in nats; nearest
    first."""
    track = decision["tracks"][name]
    others = [c for c in candidates_of(name, decision) if c["run_id"] != track["run_id"]]
    ranked = [c for c in others if c["run_id"] in track["ranked"] and c["val_loss"] is not None]
    means = {c["run_id"]: c["val_loss"] for c in ranked} | track.get("ranked_losses", {})
    behind = [(means[c["run_id"]] - track["val_loss"], c) for c in ranked]
    return sorted(behind, key=lambda pair: pair[0])


def _margin(track: Track) -> str:
    """Return how far the runner-up lies behind; empty where no candidates were ranked."""
    if "ranked" not in track:
        return ""
    margin = track["margin_sigma"]
    if margin is None:  # of a lone constant rate its headline says that it is one
        return "" if len(track["ranked"]) == 1 and "replicate_losses" in track else "; no runner-up"
    few = " (σ from 2 seeds)" if len(track.get("replicate_losses", ())) == 2 else ""
    return f"; margin {margin:.1f} σ{few}"


# -- clauses that several stages use -------------------------------------------------------------------------


def or_undecided(words: str, difference: Difference, *, joint: bool) -> str:
    """Return the words about a difference so far, marked as undecided while its interval holds 0."""
    d = by_interval(difference, joint)
    low, high = d["low"], d["high"]
    apart = (low is not None and low > 0) or (high is not None and high < 0)
    return words if apart else f"{words}, undecided so far"


def seeds_of_arm(candidate: Candidate, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the runs of a candidate's arm under every seed, itself among them."""
    return [c for c in candidates if (c["role"], c["arm"]) == (candidate["role"], candidate["arm"])]


def held_back_by_its_seeds(candidate: Candidate, candidates: Sequence[Candidate], chosen: Track) -> str:
    """Return why the other seeds of a candidate's arm keep it from being chosen; empty where they do not."""
    seeds = seeds_of_arm(candidate, candidates)
    if any(c["run_id"] == chosen["run_id"] for c in seeds):
        return ""
    for c in seeds:
        if c["val_loss"] is None:
            became = "diverged" if c["outcome"] == "diverged" else "did not complete"
            if c["outcome"] == "raced":
                became = f"was stopped at step {c['raced']}"
            return f"seed {c['seed']} {became} there"
    mean = statistics.fmean(c["val_loss"] or 0.0 for c in seeds)
    return f"the mean of its seeds is {mean:.4f}" if mean > chosen["val_loss"] else ""


def outside_the_band(track: Track, candidate: Candidate) -> str:
    """Return why a candidate was not ranked by its loss: for its median c; empty where it was ranked."""
    if candidate["run_id"] in track["ranked"]:
        return ""
    c = candidate["c_median"]
    return "its c was not recorded" if c is None else f"its median c, {c:.2f}, is outside the band"


def beside_the_band(track: Track) -> str:
    """Return in words whether the chosen median c lies in the verdict's band."""
    return f"{'inside' if track['in_band'] else 'outside'} the verdict’s band"


# -- asking the stages ---------------------------------------------------------------------------------------


@functools.cache
def stage_of(name: str) -> Stage:
    """Return the stage of this name: the `STAGE` of the module named like it. Raises UserError for an unknown
    one."""
    if name not in STAGES:
        raise UserError(f"{name} is not a stage; the stages are {', '.join(STAGES)}.")
    stage: Stage = importlib.import_module(f".{name}", __package__).STAGE
    return stage


def decision_that_shows(what: str, decisions: Decisions) -> Decision | None:
    """Return the decision whose stage shows this, `verdict` or `arms`, say; None where there is none."""
    return next((d for name, d in decisions.items() if stage_of(name).shows == what), None)


def planned_runs(
    stage: str, config: Config, decisions: Decisions, results_of: ResultsOf
) -> tuple[list[RunSpec], dict[str, RunResult]]:
    """Return all runs that a stage asks for by now, and the results that they have."""
    specs: list[RunSpec] = []
    results: dict[str, RunResult] = {}
    while len(grown := stage_of(stage).runs(config, decisions, results)) > len(specs):
        specs = grown
        results = results_of(grown)
    return specs, results


class Settled(dict[str, Any]):
    """What of a decision, or of a track, is settled: to ask for anything else of it raises `NotSettled`."""

    def __missing__(self, key: str) -> Any:
        raise NotSettled(key)


class NotSettled(LookupError):
    """What was asked for depends on a decision that is still open."""


def speculative_runs(
    config: Config,
    decisions: Decisions,
    stage: str,
    running: Specs,
    later: Sequence[str],
    results_of: ResultsOf = lambda specs: {},
) -> list[RunSpec]:
    """Return runs that an idle worker may start on while `running` ones of a stage train: those that the
    stage asks for by now, and those of `later` stages that the decisions so far already determine, or that do
    not depend on what this stage still looks for. The study will need every one of them.
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
    known = {*results, *(s.run_id for s in running)}
    return [s for s in distinct(certain) if s.kind == "train" and s.run_id not in known]
