"""The pictures of a suite: its arms side by side, the mechanism over the run, what few levels change,
what parts of a run show, and each arm.

With several tracks, every picture has its track's name in its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from matplotlib.axes import Axes

from ebc_lab.config.parts import PARTS
from ebc_lab.records.figures import KL_BAND
from ebc_lab.study.stages.stage import candidates_of

from ...text.words import capital, mine_of, optimizer, tuned_arms
from ..arm import Rival, draw_clip, draw_kl, draw_loss
from ..curvature import Steps, draw_curvature, steps_of
from ..curves import (
    ArmRuns,
    Run,
    applied_c,
    audited,
    by_step,
    known,
    read_results,
    read_runs,
    running_mean,
    thinned,
    window,
)
from ..ebm import States, draw_states, states_of
from ..forest import draw_forest, missing, rows_of, signed
from ..low_bit import Curve, Factors, curve_of, draw_factors, draw_kl_curve, factors_of
from ..mechanism import Tightness, draw_groups, draw_tightness, tightness_of
from ..overlaid import course_of as losses_of
from ..overlaid import draw_overlaid
from ..sheet.figure import (
    ALERT,
    DASHES,
    EBC,
    FAINT,
    GOAL,
    GREY,
    LABELS_FROM,
    MOST_LINES,
    REST,
    Arms,
    Decisions,
    End,
    Facts,
    Sheet,
    above_over_steps,
    draw_line,
    entry,
    log_axis,
    page,
    say_of_band,
)
from ..sheet.picture import Picture, picture
from ..sheet.place import beside, key, stack
from .windows import draw_tuned, strong_looks, window_pictures

PALETTE = (EBC, ALERT, GOAL, "C4", "C5", "C6", "black")
HIGHLIGHTED = 6  # of more lines
LEAST_RATIO = 0.01  # the log axis of KL / δ* ends there: what lies further off leaves the frame


class PartPicture(Protocol):
    """The picture that a part of a run has of its own, `Part.picture`: a file of this folder with the part's
    name."""

    def gather(self, of: ArmRuns) -> Any:
        """Return what the picture shows of an arm, None for nothing."""

    def draw(self, facts: Facts, track: str, arms: Arms, drawn: Mapping[str, Any]) -> Sheet:
        """Draw the arms that show something."""


DRAWN = [part for part in PARTS if part.picture]
PART_FIGURES = {
    part.picture: cast(PartPicture, import_module(f"..{part.group_name}", __package__)) for part in DRAWN
}


@dataclass
class Gathered:
    """What the pictures of several arms are drawn from, gathered while each arm's runs are in memory."""

    courses: dict[str, Course]
    of_parts: dict[str, dict[str, Any]]  # picture -> arm -> what it draws of that
    tight: dict[str, Tightness]
    curves: dict[str, Curve]  # of KL against c
    paths: dict[str, Steps]  # through KL and length of the steps
    tried: Callable[[str], list[tuple[str, dict[str, Any]]]]  # of an arm: its tuning runs, see ArmRuns
    states: States | None = None  # of the reference, if it is an energy-based model


def suite_pictures(root: Path, facts: Facts, section: str, decisions: Decisions) -> Iterator[Picture]:
    """Draw every track's arms together, and each arm. `section`: the stage that compares them."""
    decision = decisions[section]
    for track, of_track in decision["tracks"].items():
        tail, arms = f"_{track}" * (len(decision["tracks"]) > 1), of_track["arms"]
        yield from window_pictures(facts, track, of_track, tail)
        arms = highlighted_arms(of_track)
        shown = {**of_track, "arms": arms}
        rows = rows_of(root, shown)
        forest = picture(
            f"ablation{tail}", "verdict", facts, draw_forest, track, of_track, rows, decision["rule"]
        )
        together = _together(root, facts, track, shown, decisions, tail)
        for pictures in (together, forest) if mine_of(of_track) else (forest, together):
            yield from pictures
        all_arms = Gathered({}, {}, {}, {}, {}, partial(_tried, root, decisions.get("tune"), track))
        natural_kl = decisions["lr_sweep"]["tracks"][track]["natural_kl"]
        yield from _arm_pictures(root, facts, arms, tail, natural_kl, all_arms, of_track["reference"])
        factors = _factors(root, of_track["arms"])
        for name, draw, *of in _of_all_arms(all_arms, of_track, arms, factors):
            yield from picture(f"{name}{tail}", section, facts, draw, track, *of)


def _of_all_arms(
    found: Gathered, of_track: Mapping[str, Any], arms: Arms, factors: Mapping[str, Factors]
) -> Iterator[tuple[Any, ...]]:
    """Return (name, how it is drawn, what of) of each picture of what was gathered of all arms."""

    def those(labels: Iterable[str]) -> Arms:
        return {label: of_track["arms"][label] for label in labels}

    if courses := found.courses:
        yield "ablation_steps", draw_steps, those(courses), courses
    if tight := found.tight:
        yield "ablation_tightness", draw_tightness, {label: label for label in tight}, arms, tight
    if curves := found.curves:
        yield "kl_curve", draw_kl_curve, those(curves), curves
    if any(len(path.measured_at) for path in found.paths.values()):
        yield "curvature", draw_curvature, those(found.paths), found.paths
    if states := found.states:
        label = of_track["reference"]
        yield "ebm", draw_states, label, arms[label], states
    if factors:
        yield "policy", draw_factors, those(factors), factors
    for name, drawn in found.of_parts.items():
        yield name, PART_FIGURES[name].draw, those(drawn), drawn


def _together(
    root: Path, facts: Facts, track: str, of_track: Any, decisions: Any, tail: str
) -> Iterator[Picture]:
    """Draw the arms' loss curves over each other, and of the curves over the learning rate of
    those that were tuned over one."""
    mine, arms = mine_of(of_track), of_track["arms"]
    looks = strong_looks(list(arms), mine)
    losses = {label: losses_of(root, arm) for label, arm in arms.items() if arm.get("comparable", True)}
    courses = {label: course for label, course in losses.items() if course}
    if len(courses) > 1:
        whom = f"{' and '.join(mine) or 'Every arm'} {'against the others' if mine else 'of the suite'}"
        whom += ", each at its own best" if "tune" in decisions else ""
        of = (whom, courses, looks, mine, of_track["reference"])
        yield from picture(f"ablation_curves{tail}", "verdict", facts, draw_overlaid, *of)
    tuned = tuned_arms(decisions.get("tune"), track)
    curves = {label: arm for label, arm in tuned.items() if label in arms and arm.get("curve")}
    if curves:
        yield from picture(f"tuned_rates{tail}", "verdict", facts, draw_tuned, curves, looks, mine)


def highlighted_arms(of_track: Mapping[str, Any]) -> Arms:
    """The arms that have pictures of their own: of the points of a sweep the best one, and the reference."""
    best, swept = {of_track["reference"]}, set()
    for sweeps in of_track.get("windows", {}).values():
        for sweep in sweeps.values():
            at = sweep["window"]["best"] if sweep["window"] else sweep["points"][0]["value"]
            best |= {p["arm"] for p in sweep["points"] if p["value"] == at}
            swept |= {p["arm"] for p in sweep["points"]}
    return {label: arm for label, arm in of_track["arms"].items() if label in best or label not in swept}


def _arm_pictures(
    root: Path,
    facts: Facts,
    arms: Arms,
    tail: str,
    natural_kl: float,
    all_arms: Gathered,
    reference: str,
) -> Iterator[Picture]:
    """Each arm's own pictures; what the pictures of all arms need of it goes to `all_arms`."""
    references = {v: read_runs(root, arms[v]) for v in {arm["versus"] for arm in arms.values()} if v in arms}
    for label, arm in arms.items():
        runs = references[label] if label in references else read_runs(root, arm)
        specs = read_results(root, arm, "spec")
        own_facts = _sized(facts, specs)
        of = arm["versus"] or label
        itself = of == label
        rival = Rival(of, runs if itself else references.get(of, []), in_words(arm), itself=itself)
        kinds: dict[str, tuple[Any, ...]] = {"loss": (draw_loss, rival)}
        if arm["ebc"]:
            kinds |= {"clip": (draw_clip,), "kl": (draw_kl, natural_kl), "groups": (draw_groups,)}
            if measured := tightness_of(runs):
                all_arms.tight[label] = measured
            all_arms.courses[label] = course_of(runs)
        if label == reference:
            all_arms.states = states_of(runs)
        if curve := curve_of(runs):
            all_arms.curves[label] = curve
        if path := steps_of(runs, specs):
            all_arms.paths[label] = path
        for kind, (draw, *more) in kinds.items():
            name = f"{label}{tail}_{kind}"
            yield from picture(name, "arms", own_facts, draw, label, arm, runs, *more, arm_of=label)
        of_arm = ArmRuns(label, arm, runs, specs, partial(all_arms.tried, label))
        for name, part in PART_FIGURES.items():
            if (drawn := part.gather(of_arm)) is not None:
                all_arms.of_parts.setdefault(name, {})[label] = drawn


def _tried(root: Path, tune: Any, track: str, label: str) -> list[tuple[str, dict[str, Any]]]:
    """Read the results of the runs that an arm was tuned by."""
    runs = candidates_of(track, tune) if tune and track in tune["tracks"] else []
    return [(c["arm"], known(root, c["run_id"])) for c in runs if c["role"] == label]


def _factors(root: Path, arms: Arms) -> dict[str, Factors]:
    """Read the factors of every arm with a policy, also of those that have no pictures of their own."""
    steered = {label: arm for label, arm in arms.items() if "lr_factor" in arm["figures"]}
    measured = {label: factors_of(read_runs(root, arm)) for label, arm in steered.items()}
    return {label: factors for label, factors in measured.items() if factors}


def _sized(facts: Facts, specs: Mapping[str, Mapping[str, Any]]) -> Facts:
    """The study's facts with the tokens of a step of these runs."""
    run = next((spec["config"] for spec in specs.values() if "batch_size" in spec.get("config", {})), None)
    return replace(facts, tokens_per_step=run["batch_size"] * run["model"]["context"]) if run else facts


def in_words(arm: Mapping[str, Any]) -> str:
    """The paired difference in test loss, as the end of a sentence."""
    difference = arm["difference"] or {}
    if difference.get("mean") is None:
        return ""
    half = f" ± {difference['high'] - difference['mean']:.3f}" if difference["high"] is not None else ""
    return f"; test loss {signed(difference['mean'])}{half}"


# -- what the mechanism did ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """An EBC arm over the run."""

    steps: np.ndarray
    c: np.ma.MaskedArray  # median of the seeds, running mean
    audits: np.ndarray
    ratio: np.ma.MaskedArray  # applied KL over its target, median of the seeds, running geometric mean
    seeds: tuple[np.ma.MaskedArray, np.ma.MaskedArray]  # the same two of each seed


def course_of(runs: Sequence[Run]) -> Course:
    steps, table = applied_c(runs)
    streams = [audited(run.steps) for run in runs]
    audits, applied = by_step(streams, "applied_kl")
    ratios = np.ma.log(applied / np.ma.masked_less_equal(by_step(streams, "target_kl")[1], 0.0))
    at, then = thinned(len(steps)), thinned(len(audits))
    (c, own_c), (ratio, own_ratio) = middle_of(table), middle_of(ratios)
    seeds = (own_c[:, at], np.ma.exp(own_ratio)[:, then])
    return Course(steps[at], c[at], audits[then], np.ma.exp(ratio)[then], seeds)


def middle_of(table: np.ma.MaskedArray) -> tuple[np.ma.MaskedArray, np.ma.MaskedArray]:
    """The seeds' median, and each seed, as running means."""
    if not table.shape[1]:
        return np.ma.masked_all(0), table
    return running_mean(np.ma.masked_array(np.ma.median(table, axis=0))[None])[0], running_mean(table)


def drift(arm: Mapping[str, Any]) -> float:
    """How far c moved over the run: |log(c late / c early)|, 0 where it was not measured."""
    early, late = arm["figures"].get("c_early"), arm["figures"].get("c_late")
    return abs(math.log(late / early)) if early and late else 0.0


def distance(arm: Mapping[str, Any]) -> float:
    """How far the applied KL lies from its target: |log(KL / δ*)|, 0 where it was not measured."""
    ratio = arm["figures"].get("kl_ratio_median")
    return abs(math.log(ratio)) if ratio else 0.0


def draw_steps(facts: Facts, track: str, arms: Arms, courses: Mapping[str, Course]) -> Sheet:
    """The clip coefficient above, the applied KL over its target below, a line for every EBC arm."""
    shown = _highlighted(arms, courses)
    what = "What did the clip do over the run?"
    whom = f"{optimizer(track)}: every arm with EBC ({len(courses)}), medians over the seeds"
    small = ("c: median near the start → near the end of the run",)
    seeds = max(len(arm["runs"]) for arm in arms.values())
    figure, bottom = page(facts, what, whom, _farthest(arms), seeds, small, missing(arms), (10.0, 7.4))
    last = max((float(c.steps[-1]) for c in courses.values() if len(c.steps)), default=0.0)
    top = above_over_steps(facts, bottom, last)
    top.set(ylabel="clip coefficient c", ylim=(-0.02, 1.06))
    bottom.set_ylabel("applied KL / target δ* (log scale)")
    log_axis(bottom, "y")
    bottom.axhline(1.0, color=GOAL, lw=1.2, ls="--", zorder=1)
    bottom.axhspan(1 - KL_BAND, 1 + KL_BAND, color=GOAL, alpha=0.13, lw=0)
    say_of_band(bottom, 1 + KL_BAND, f"within ±{100 * KL_BAND:g}% of the target")
    bottom.set_xlabel(
        f"{bottom.get_xlabel()}\nwhere nothing is clipped the KL lies below its target by right"
    )
    handles: list[Any] = []
    if others := len(courses) - len(shown):
        label = f"{others} other arms with EBC: the {len(shown)} whose c or KL / δ* moved most are named"
        handles.append(entry(label, REST, lw=1.0))
    over = window(round(last) + 1)
    handles.append(entry(f"running means: of c over {over} steps, of the KL over 3 audits", GREY))
    handles.append(entry("each seed", GREY, **FAINT))
    tops: list[End] = []
    bottoms: list[End] = []
    for label, course in courses.items():
        place = shown.index(label) if label in shown else None
        c, ratio = (f"{label}  {words_of(arms[label])}" for words_of in (course_in_words, ratio_in_words))
        tops += _draw_course(top, course.steps, course.c, course.seeds[0], c, place)
        bottoms += _draw_course(bottom, course.audits, course.ratio, course.seeds[1], ratio, place)
    seen = np.concatenate([c.ratio.compressed() for c in courses.values()])
    low, high = (min(seen), max(seen)) if len(seen) else (1.0, 1.0)
    bottom.set_ylim(max(0.8 * min(low, 0.5), LEAST_RATIO), min(1.25 * max(high, 2.0), 1 / LEAST_RATIO))
    key(bottom, handles)
    stack((top, bottom), (1.0, 1.0), 14, LABELS_FROM)
    beside(top, tops)
    beside(bottom, bottoms)
    return figure


def _highlighted(arms: Arms, courses: Mapping[str, Course]) -> list[str]:
    """The arms whose lines are named: all while they are few, else those whose c or KL moved most, by
    turns.
    """
    if len(courses) <= MOST_LINES:
        return list(courses)

    def farthest(by: Callable[[Mapping[str, Any]], float]) -> list[str]:
        return sorted(courses, key=lambda label: -by(arms[label]))

    turns = itertools.chain(*zip(farthest(drift), farthest(distance), strict=True))
    named = list(dict.fromkeys(turns))[:HIGHLIGHTED]
    return [label for label in courses if label in named]


def _farthest(arms: Arms) -> str:
    most, farthest = max(arms, key=lambda x: drift(arms[x])), max(arms, key=lambda x: distance(arms[x]))
    parts = []
    if drift(arms[most]):
        parts.append(f"Largest drift of c: {most}, {course_in_words(arms[most])}")
    if distance(arms[farthest]):
        ratio = arms[farthest]["figures"]["kl_ratio_median"]
        parts.append(f"farthest from its target: {farthest}, median KL / δ* {ratio:.2f}")
    text = "; ".join(parts) or "Neither c nor the KL was measured"
    return f"{capital(text)}."


def _draw_course(
    axes: Axes, x: np.ndarray, y: np.ma.MaskedArray, seeds: np.ma.MaskedArray, words: str, place: int | None
) -> list[End]:
    """A line and, where it is told apart, each seed's.

    `place`: which look it has; None: one of the rest. -> its end.
    """
    if place is None:
        axes.plot(x, y, color=REST, ls="-", lw=1.0, zorder=1.5)
        return []
    colour = PALETTE[place % len(PALETTE)]
    end = draw_line(axes, x, y, seeds, 0.3, color=colour, ls=DASHES[place % len(DASHES)])
    return [(*end, words, colour)] if end else []


def course_in_words(arm: Mapping[str, Any]) -> str:
    early, late = arm["figures"].get("c_early"), arm["figures"].get("c_late")
    return f"c {early:.2g} → {late:.2g}" if early is not None and late is not None else ""


def ratio_in_words(arm: Mapping[str, Any]) -> str:
    ratio = arm["figures"].get("kl_ratio_median")
    return f"KL / δ* {ratio:.2f} where clipped" if ratio is not None else "never clipped at an audit"
