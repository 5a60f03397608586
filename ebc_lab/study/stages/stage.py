"""The base classes of stages. A stage plans runs, decides from their results, and puts the decision into
words.

To add a stage, write a module here with a subclass of `Stage`, or of `Choice` if one candidate wins on each
track, and an instance of the subclass named `STAGE`. In `config.schema.Config`, add a field of the stage's
name, with a subclass of `StageConfig` as its type. That class holds the stage's settings, the stages that it
needs and its place in the order. The numbers for each scale go into `conf/scale/`. All commands, the page and
the tables then find the stage by themselves.
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

from .rules import Decisions, Results, Specs
from .runs import distinct
from .statistics import by_interval, noise

Track = Mapping[str, Any]  # the decision for one (optimizer, projection): see records.decisions
ResultsOf = Callable[[list[RunSpec]], dict[str, RunResult]]  # by run id; without runs that have no result
MISSING = object()
NOT_APART = ", not told apart by one run each"


@dataclass(frozen=True)
class Figure:
    """A figure of the decision on a track. `diff` compares all figures; the page shows labelled figures."""

    path: str  # keys of the nested track, joined by dots: `control.lr`
    label: str = ""
    form: str = "{}"  # for str.format
    remark: str | Callable[[Any], str] = ""  # a unit, or a function that makes a remark from the track

    def value(self, track: Any, missing: Any = None) -> Any:
        """Return the value of the figure in this track, or `missing` if the track has no such figure."""
        for key in self.path.split("."):
            if not isinstance(track, Mapping) or key not in track:
                return missing
            track = track[key]
        return track

    def row(self, track: Track) -> tuple[str, str, str]:
        """Return the figure's (label, formatted value, remark) for this track."""
        value = self.value(track)
        remark = self.remark if isinstance(self.remark, str) else self.remark(track)
        return self.label, "none" if value is None else self.form.format(value), remark


@dataclass(frozen=True)
class Scenario:
    """An assumption about results that do not exist yet, used to forecast how many runs a study will make."""

    name: str
    edge: bool  # every search goes on as long as it may, and the verdict remains undecided
    extra: int  # calibration runs beyond the grid
    merged: bool  # the chosen LR scale equals the calibration's, so that some arms coincide


class Stage:
    """A stage of a study. A subclass defines `name`, `title`, `runs`, `decide` and `headline`; everything
    else has a default.

    In every method, `specs` are the stage's own runs and `earlier` holds the decisions of earlier stages.
    """

    name: str
    title = ""
    about = ""  # its purpose, in a sentence for readers who do not know the method
    figures: tuple[Figure, ...] = ()
    shows = "candidates"  # which kind of table explains its decision, in the report and on the screen
    pictures: tuple[str, ...] = ()  # names of the pictures that show its decision
    concludes = False  # no later stage builds on its decision
    leads_with_optimizer = True  # sentences on a track begin with its optimizer, else with its name

    def runs(self, config: Config, earlier: Decisions, results: Results) -> list[RunSpec]:
        """Return all runs that the stage needs so far. The list may grow as their results arrive."""
        raise NotImplementedError

    def decide(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> Decision:
        """Return the decision that follows from the results. Raises Undecidable."""
        raise NotImplementedError

    def headline(self, track: Any) -> str:
        """Return a one-line summary of the decision on a track."""
        raise NotImplementedError

    def so_far(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> list[str]:
        """Return clauses on the results so far, while the stage is undecided. Raises Undecidable."""
        return []

    def turning_points(self, name: str, decision: Decision) -> list[str]:
        """Return clauses that say what would have changed the decision on a track."""
        return []

    def passed_over(self, name: str, decision: Decision) -> str:
        """Return a clause that names a candidate with a lower loss than the chosen one on a track and says
        why it was not chosen; an empty string if there is none."""
        return ""

    def lead_in(self, name: str, decision: Decision) -> str:
        """Return the opening words of a sentence about a track."""
        return f"{optimizer(name)}: " if self.leads_with_optimizer else track_prefix(name, decision["tracks"])

    def leads(self, decision: Decision) -> bool:
        """Return whether a decision that concludes a study is its answer, and does not only add to one."""
        return True

    def question(self, config: Config) -> str:
        """Return the question answered by a study that ends with this stage, or an empty string if the
        default question applies."""
        return str(getattr(getattr(config, self.name), "question", ""))

    def resolve(self, config: Config, say: Callable[[str], None]) -> Config:
        """Return the configuration with the stage's machine-dependent settings filled in, on the machine
        where the study begins. `say` prints a line."""
        return config

    def settled(self, config: Config, specs: Specs, results: Results) -> dict[str, Any]:
        """Return, by track, the parts of the decision that no missing run can change."""
        return {}

    def invent(self, config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> RunResult:
        """Return an invented result of a run for a forecast. The default is a median c. It lies in the band
        at LR ×2 if `scenario.merged`, and otherwise at every other scale.

        `nth`: the number of earlier runs of the stage. A val_loss of 2.0 stands for the best known.
        """
        return {"c_median": 0.6 if scenario.merged == (spec.lr_scale == 2) else 0.3}

    # -- what all stages derive from these methods -----------------------------------------------------------

    @property
    def summary_csv(self) -> str:
        """The file name of the stage's table of runs."""
        return f"summary_{self.name}.csv"

    def headlines(self, decision: Decision) -> list[str]:
        """Return one line per track: the decision, the winner's margin, and any lower loss passed over."""
        return [
            self.lead_in(name, decision) + self.headline(track) + _margin(track) + self._over(name, decision)
            for name, track in decision["tracks"].items()
        ]

    def would_change(self, decision: Decision) -> list[str]:
        """Return one sentence per track that says what would have changed the decision."""
        clauses = {name: self.turning_points(name, decision) for name in decision["tracks"]}
        return [f"{self.lead_in(name, decision)}{'; '.join(c)}" for name, c in clauses.items() if c]

    def rows(self, name: str, decision: Decision) -> list[tuple[str, str, str]]:
        """Return (label, value, remark) for each figure of a track that the page shows. The remark on the
        validation loss also names a candidate that was passed over despite a lower loss."""
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
    """A stage that chooses one candidate on each track, usually the one with the lowest validation loss."""

    setting = "lr {lr:g}"  # a str.format template for a candidate in words

    def why_not(self, chosen: Any, candidate: Candidate, candidates: Sequence[Candidate]) -> str:
        """Return why a candidate was not chosen although its loss is lower than the chosen candidate's. The
        string is empty if the candidate is no rival, for example another seed of the chosen one.

        `candidates`: all candidates of the track.
        """
        return ""

    def so_far(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> list[str]:
        """Return a clause for each track. It names the leading candidate and the runner-up, and says so if
        one run of each is not enough to tell them apart. Raises Undecidable."""
        decision = self.decide(config, specs, results, earlier)
        clauses = []
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
                clauses.append(f"{words} {alone}, validation loss {track['val_loss']:.4f}")
                continue
            gap, second = behind[0]
            next_setting = self.setting.format_map(second)
            alike = setting == next_setting  # for example, one δ* under two budgets
            words += f" ({first['arm']})" * alike
            words += f" leads, {gap:.4f} nats ahead of {next_setting}" + f" ({second['arm']})" * alike
            floor = noise(earlier["lr_sweep"]["tracks"][name]["replicate_losses"])
            clauses.append(words + NOT_APART * (gap < (floor["detectable"] or math.inf)))
        return clauses

    def turning_points(self, name: str, decision: Decision) -> list[str]:
        """Return clauses that say how much better the runner-up and each dropped optimizer would have had to
        be, and which candidate another rule would have chosen."""
        track = decision["tracks"][name]
        points = []
        if ranked := _ranked_behind(name, decision):
            gap, second = ranked[0]
            sigmas = f" ({gap / track['sigma']:.1f} σ)" if track["sigma"] else ""
            setting = self.setting.format_map(second)
            points.append(f"{second['arm']} at {setting} would have had to be {gap:.4f} nats better{sigmas}")
        if over := self.passed_over(name, decision):
            points.append(f"another rule would have chosen {over}")
        # optimizers dropped in favour of this track, compared by grid runs of equal length
        for pair in track.get("dropped", []):
            if pair["behind"] is not None:
                words = f"{pair['track']} would have had to be {pair['behind']:.4f} nats better on the grid"
                unsure = "" if pair["told_apart"] else ", less than one run each can tell apart"
                points.append(words + unsure)
        if not points and (others := len({c["arm"] for c in candidates_of(name, decision)}) - 1):
            return [f"none of the other {others} candidates was eligible"]
        return points or ["there was no other candidate"]

    def passed_over(self, name: str, decision: Decision) -> str:
        """Return a clause on the candidate with the lowest loss, if that loss is lower than the chosen
        candidate's. The clause says why it was not chosen, and how many more arms have lower losses. Return
        an empty string if no candidate was passed over."""
        track = decision["tracks"][name]
        candidates = candidates_of(name, decision)
        lower: dict[str, tuple[float, str]] = {}  # arm -> its lowest loss, and a clause on it
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
    alone = len(decision["tracks"]) == 1
    return [c for c in decision["candidates"] if alone or c["run_id"].startswith(f"{name}_")]


def _ranked_behind(name: str, decision: Decision) -> list[tuple[float, Candidate]]:
    """Return (nats behind the chosen candidate, candidate) for all others ranked, the nearest first."""
    track = decision["tracks"][name]
    others = [c for c in candidates_of(name, decision) if c["run_id"] != track["run_id"]]
    ranked = [c for c in others if c["run_id"] in track["ranked"] and c["val_loss"] is not None]
    means = {c["run_id"]: c["val_loss"] for c in ranked} | track.get("ranked_losses", {})
    behind = [(means[c["run_id"]] - track["val_loss"], c) for c in ranked]
    return sorted(behind, key=lambda pair: pair[0])


def _margin(track: Track) -> str:
    """Return a clause on how far the runner-up lies behind. It is empty if no candidates were ranked, or if
    only one constant rate was tried."""
    if "ranked" not in track:
        return ""
    margin = track["margin_sigma"]
    if margin is None:  # the headline already says where only one constant rate was tried
        return "" if len(track["ranked"]) == 1 and "replicate_losses" in track else "; no runner-up"
    few = " (σ from 2 seeds)" if len(track.get("replicate_losses", ())) == 2 else ""
    return f"; margin {margin:.1f} σ{few}"


# -- clauses that several stages use -------------------------------------------------------------------------


def or_undecided(words: str, difference: Difference, *, joint: bool) -> str:
    """Return `words`, marked as undecided so far unless the (joint) interval of `difference` excludes 0."""
    d = by_interval(difference, joint)
    low, high = d["low"], d["high"]
    apart = (low is not None and low > 0) or (high is not None and high < 0)
    return words if apart else f"{words}, undecided so far"


def seeds_of_arm(candidate: Candidate, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates of the same role and arm under every seed, including this candidate."""
    return [c for c in candidates if (c["role"], c["arm"]) == (candidate["role"], candidate["arm"])]


def held_back_by_its_seeds(candidate: Candidate, candidates: Sequence[Candidate], chosen: Track) -> str:
    """Return how the seeds of a candidate's arm ruled the arm out: one seed has no loss, or the mean over the
    seeds is too high. Return an empty string if neither is so, or if the chosen run belongs to this arm."""
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
    """Return why a candidate's median c kept it from being ranked; empty if the candidate was ranked."""
    if candidate["run_id"] in track["ranked"]:
        return ""
    c = candidate["c_median"]
    return "its c was not recorded" if c is None else f"its median c, {c:.2f}, is outside the band"


def beside_the_band(track: Track) -> str:
    """Return a remark on whether the median c of the chosen run lies in the verdict's band."""
    return f"{'inside' if track['in_band'] else 'outside'} the verdict’s band"


# -- asking the stages ---------------------------------------------------------------------------------------


@functools.cache
def stage_of(name: str) -> Stage:
    """Return the stage of this name, which is `STAGE` in the module of the same name. Raises UserError if
    there is no such stage."""
    if name not in STAGES:
        raise UserError(f"{name} is not a stage; the stages are {', '.join(STAGES)}.")
    stage: Stage = importlib.import_module(f".{name}", __package__).STAGE
    return stage


def concluding_stages(decisions: Decisions) -> list[str]:
    """Return the stages whose decisions answer the study's question, the one that leads first."""
    made = [name for name in reversed([*decisions]) if stage_of(name).concludes]
    return sorted(made, key=lambda name: not stage_of(name).leads(decisions[name]))


def ending_stages(decisions: Decisions) -> list[str]:
    """Return the stages whose headlines say what a study found: the last that is decided and, where that only
    adds to an answer, those that gave the answer, before it. There must be a decision."""
    last = [*decisions][-1]
    adds = stage_of(last).concludes and not stage_of(last).leads(decisions[last])
    return concluding_stages(decisions) if adds else [last]


def decision_that_shows(what: str, decisions: Decisions) -> Decision | None:
    """Return the decision of the stage whose `shows` is `what`, such as `verdict`; None if there is none."""
    return next((d for name, d in decisions.items() if stage_of(name).shows == what), None)


def planned_runs(
    stage: str, config: Config, decisions: Decisions, results_of: ResultsOf
) -> tuple[list[RunSpec], dict[str, RunResult]]:
    """Return all runs that a stage asks for so far, and the known results of these runs by run id."""
    specs: list[RunSpec] = []
    results: dict[str, RunResult] = {}
    while len(grown := stage_of(stage).runs(config, decisions, results)) > len(specs):
        specs = grown
        results = results_of(grown)
    return specs, results


class Settled(dict[str, Any]):
    """A decision or track with settled values only. Reading any other key raises `NotSettled`."""

    def __missing__(self, key: str) -> Any:
        raise NotSettled(key)


class NotSettled(LookupError):
    """Raised when a value is read that depends on an open decision."""


def speculative_runs(
    config: Config,
    decisions: Decisions,
    stage: str,
    running: Specs,
    later: Sequence[str],
    results_of: ResultsOf = lambda specs: {},
) -> list[RunSpec]:
    """Return the training runs that an idle worker may start while the `running` ones of a stage train. They
    are the runs that the stage asks for so far, and the runs of `later` stages that depend on nothing still
    open. The study will need every one of them. Runs that are in progress or have a result are left out.
    `results_of` returns the known results of runs."""
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
