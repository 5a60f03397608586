"""The pictures of a suite: its arms side by side, the mechanism over the run, what few levels change,
recovery from shocks, and each arm.

With several tracks, every picture has its track's name in its own.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ebc_lab.records.figures import KL_BAND, RECOVERY_WINDOW, SHOCK_WINDOW

from ..text.words import mine_of, optimizer, tuned_arms
from .arm import Rival, draw_clip, draw_kl, draw_loss
from .curves import Run, applied_c, audited, by_step, read_results, read_runs, running_mean, thinned, window
from .ebm import States, draw_states, states_of
from .forest import draw_forest, missing, rows_of, signed
from .low_bit import Curve, Factors, curve_of, draw_factors, draw_kl_curve, factors_of
from .mechanism import Tightness, draw_groups, draw_tightness, tightness_of
from .overlaid import course_of as losses_of
from .overlaid import draw_overlaid
from .sheet import (
    ALERT,
    DASHES,
    EBC,
    FAINT,
    GOAL,
    GREY,
    INK,
    MOST_LINES,
    PLAIN,
    REST,
    Arms,
    Decisions,
    End,
    Facts,
    Picture,
    Sheet,
    above_over_steps,
    another,
    beside,
    draw_line,
    entry,
    key,
    log_axis,
    page,
    stack,
)
from .windows import draw_tuned, strong_looks, window_pictures

PALETTE = (EBC, ALERT, GOAL, "C4", "C5", "C6", "black")
WITH_EBC = (EBC, GOAL, "C6", "black")  # the two palettes where arms with and without EBC share a panel
WITHOUT = (PLAIN, "C4", "C5", ALERT)
HIGHLIGHTED = 6  # of more lines
LABELS_FROM = 0.7  # of the width: the lines' labels stand beyond it
LEAST_RATIO = 0.01  # the log axis of KL / δ* ends there: what lies further off leaves the frame
AFTER_SHOCK = 150  # steps shown after a shock
RECOVERY_POINTS = 100  # of a line
SHOCKS = {
    "label_noise": "one batch with {:.0%} of its targets drawn at random",
    "lr_spike": "one step at {:g} times the learning rate",
    "corrupt_gradient": "one gradient with noise of {:g} times its norm",
}


@dataclass
class Gathered:
    """What the pictures of several arms are drawn from, gathered while each arm's runs are in memory."""

    courses: dict[str, Course]
    recoveries: list[Recovery]
    tight: dict[str, Tightness]
    curves: dict[str, Curve]  # of KL against c
    states: States | None = None  # of the reference, if it is an energy-based model


def suite_pictures(root: Path, facts: Facts, section: str, decisions: Decisions) -> Iterator[Picture]:
    """Of every track's arms together, and of each arm. `section`: the stage that compares them."""
    decision = decisions[section]
    for track, found in decision["tracks"].items():
        tail, arms = f"_{track}" * (len(decision["tracks"]) > 1), found["arms"]
        for name, sheet in window_pictures(facts, track, found):
            yield Picture(f"{name}{tail}", "verdict", sheet)
        arms = highlighted_arms(found)
        forest = draw_forest(facts, track, found, rows_of(root, {**found, "arms": arms}), decision["rule"])
        together = [*_together(root, facts, track, {**found, "arms": arms}, decisions)]
        for name, sheet in (
            [*together, ("ablation", forest)] if mine_of(found) else [("ablation", forest), *together]
        ):
            yield Picture(f"{name}{tail}", "verdict", sheet)
        all_arms = Gathered({}, [], {}, {})
        natural_kl = decisions["lr_sweep"]["tracks"][track]["natural_kl"]
        yield from _arm_pictures(root, facts, arms, tail, natural_kl, all_arms, found["reference"])
        if courses := all_arms.courses:
            sheet = draw_steps(facts, track, {label: arms[label] for label in courses}, courses)
            yield Picture(f"ablation_steps{tail}", section, sheet)
        if tight := all_arms.tight:
            sheet = draw_tightness(facts, track, {label: label for label in tight}, arms, tight)
            yield Picture(f"ablation_tightness{tail}", section, sheet)
        if curves := all_arms.curves:
            sheet = draw_kl_curve(facts, track, {label: arms[label] for label in curves}, curves)
            yield Picture(f"kl_curve{tail}", section, sheet)
        if states := all_arms.states:
            label = found["reference"]
            yield Picture(f"ebm{tail}", section, draw_states(facts, track, label, arms[label], states))
        if factors := _factors(root, found["arms"]):
            sheet = draw_factors(facts, track, {label: found["arms"][label] for label in factors}, factors)
            yield Picture(f"policy{tail}", section, sheet)
        if recoveries := all_arms.recoveries:
            sheet = draw_recovery(facts, track, {r.label: arms[r.label] for r in recoveries}, recoveries)
            yield Picture(f"recovery{tail}", section, sheet)


def _together(
    root: Path, facts: Facts, track: str, found: Any, decisions: Any
) -> Iterator[tuple[str, Sheet]]:
    """(name, sheet) of the arms' loss curves over each other, and of the curves over the learning rate of
    those that were tuned over one."""
    mine, arms = mine_of(found), found["arms"]
    looks = strong_looks(list(arms), mine)
    own = {label: losses_of(root, arm) for label, arm in arms.items() if arm.get("comparable", True)}
    courses = {label: course for label, course in own.items() if course}
    if len(courses) > 1:
        whom = f"{' and '.join(mine) or 'Every arm'} {'against the others' if mine else 'of the suite'}"
        whom += ", each at its own best" if "tune" in decisions else ""
        yield "ablation_curves", draw_overlaid(facts, whom, courses, looks, mine, found["reference"])
    tuned = tuned_arms(decisions.get("tune"), track)
    curves = {label: arm for label, arm in tuned.items() if label in arms and arm.get("curve")}
    if curves:
        yield "tuned_rates", draw_tuned(facts, curves, looks, mine)


def highlighted_arms(found: Mapping[str, Any]) -> Arms:
    """The arms that have pictures of their own: of the points of a sweep the best one, and the reference."""
    best, swept = {found["reference"]}, set()
    for sweeps in found.get("windows", {}).values():
        for own in sweeps.values():
            at = own["window"]["best"] if own["window"] else own["points"][0]["value"]
            best |= {p["arm"] for p in own["points"] if p["value"] == at}
            swept |= {p["arm"] for p in own["points"]}
    return {label: arm for label, arm in found["arms"].items() if label in best or label not in swept}


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
        own = {"loss": draw_loss(own_facts, label, arm, runs, rival)}
        if arm["ebc"]:
            own |= {
                "clip": draw_clip(own_facts, label, arm, runs),
                "kl": draw_kl(own_facts, label, arm, runs, natural_kl),
            }
            if sheet := draw_groups(own_facts, label, arm, runs):
                own["groups"] = sheet
            if measured := tightness_of(runs):
                all_arms.tight[label] = measured
            all_arms.courses[label] = course_of(runs)
        if label == reference:
            all_arms.states = states_of(runs)
        if curve := curve_of(runs):
            all_arms.curves[label] = curve
        for kind, sheet in own.items():
            yield Picture(f"{label}{tail}_{kind}", "arms", sheet, label)
        all_arms.recoveries += recovery_of(label, arm, runs, specs)


def _factors(root: Path, arms: Arms) -> dict[str, Factors]:
    """Of every arm with a policy, also of those that have no pictures of their own."""
    steered = {label: arm for label, arm in arms.items() if "lr_factor" in arm["figures"]}
    found = {label: factors_of(read_runs(root, arm)) for label, arm in steered.items()}
    return {label: factors for label, factors in found.items() if factors}


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


# -- what the mechanism did
# -------------------------------------------------------------------------------------------


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
    figure, bottom = page(facts, what, whom, _farthest(arms), seeds, small, missing(arms), (10.4, 7.4))
    last = max((float(c.steps[-1]) for c in courses.values() if len(c.steps)), default=0.0)
    top = above_over_steps(facts, bottom, last)
    top.set(ylabel="clip coefficient c", ylim=(-0.02, 1.06))
    bottom.set_ylabel("applied KL / target δ* (log scale)")
    log_axis(bottom, "y")
    bottom.axhline(1.0, color=GOAL, lw=1.2, ls="--", zorder=1)
    band = f"within ±{100 * KL_BAND:g}% of the target; "
    band += "where nothing is clipped the KL lies below it by right"
    within = bottom.axhspan(1 - KL_BAND, 1 + KL_BAND, color=GOAL, alpha=0.13, lw=0, label=band)
    handles: list[Any] = [within]
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
        c, ratio = (f"{label}  {said(arms[label])}" for said in (course_in_words, ratio_in_words))
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
    return f"{text[0].upper()}{text[1:]}."


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


# -- how shocks passed
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recovery:
    """An arm's training loss around its shock.

    `loss`: minus its level before, by `offset` from the shock's step.
    """

    label: str
    kind: str  # of the shock
    size: float
    offset: np.ndarray
    loss: np.ndarray
    seeds: np.ndarray  # the same of each seed
    peaks: Sequence[float]  # of the seeds
    back: Sequence[float | None]  # steps until the loss was back, None: never


def recovery_of(
    label: str, arm: Mapping[str, Any], runs: Sequence[Run], specs: Mapping[str, Mapping[str, Any]]
) -> list[Recovery]:
    """The arm's recovery; none where it had no shock, or no run lasted long enough after it."""
    lines, peaks, back = [], [], []
    offset = np.arange(-SHOCK_WINDOW, AFTER_SHOCK + 1)
    # with the gap at the shock itself
    offset = offset[np.union1d(thinned(len(offset), RECOVERY_POINTS), SHOCK_WINDOW)]
    shock: Mapping[str, Any] = {}
    for run in runs:
        config = specs[run.seed].get("config", {})
        if run.result.get("shock_peak") is None or not run.steps or not config:
            continue
        shock = config["shock"]
        at = config["steps"] // 2 if shock["step"] is None else shock["step"]
        lines.append(around(run.steps["loss"], at, offset))
        peaks.append(float(run.result["shock_peak"]))
        back.append(run.result.get("shock_recovery_steps"))
    if not lines:
        return []
    mean = np.ma.masked_invalid(lines).mean(axis=0).filled(math.nan)
    return [Recovery(label, shock["name"], shock["size"], offset, mean, np.array(lines), peaks, back)]


def around(losses: np.ndarray, shock: int, offset: np.ndarray) -> np.ndarray:
    """Running mean of the last 10 losses, none from before the shock, minus the mean of the 20 before it.

    NaN outside the run, and at the shock itself, whose loss may be of corrupted targets.
    """
    out = np.full(len(offset), math.nan)
    level = losses[max(0, shock - SHOCK_WINDOW) : shock].mean()
    for i, step in enumerate(shock + offset):
        first = max(step - RECOVERY_WINDOW + 1, shock + 1 if step > shock else 0)
        if 0 <= step < len(losses) and step != shock:
            out[i] = losses[first : step + 1].mean() - level
    return out


def draw_recovery(facts: Facts, track: str, arms: Arms, recoveries: Sequence[Recovery]) -> Sheet:
    """A panel for each kind of shock, a line for each arm that had it."""
    kinds = list(dict.fromkeys((r.kind, r.size) for r in recoveries))
    of_kind = {kind: [r for r in recoveries if (r.kind, r.size) == kind] for kind in kinds}
    worst, least = (choose(recoveries, key=lambda r: statistics.fmean(r.peaks)) for choose in (max, min))
    text = f"Largest peak: {worst.label}, {signed(statistics.fmean(worst.peaks))}"
    text += (
        f"; smallest: {least.label}, {signed(statistics.fmean(least.peaks))}" if least is not worst else ""
    )
    what = "How does a run recover from a shock?"
    whom = f"{optimizer(track)}: training loss around a shock, "
    whom += f"minus its mean over the {SHOCK_WINDOW} steps before"
    small = ("peak: the highest mean of any 10 later steps",)
    seeds = max(len(arm["runs"]) for arm in arms.values())
    size = (10.4, 2.4 + 2.2 * len(kinds))
    figure, last = page(facts, what, whom, f"{text}.", seeds, small, missing(arms), size)
    panels = [*(another(last) for _ in kinds[1:]), last]
    last.set_xlabel("steps since the shock")
    handles = []
    for dashes, words, ebc in (("-", "with", True), ("--", "without", False)):
        label = f"{words} EBC, mean of the seeds over the last {RECOVERY_WINDOW} steps at most"
        if any(bool(arm["ebc"]) == ebc for arm in arms.values()):
            handles.append(entry(label, INK, ls=dashes))
    if any(len(own) <= MOST_LINES for own in of_kind.values()):
        handles.append(entry("each seed", GREY, **FAINT))
    handles.append(entry("the shock (its own step is left out)", ALERT, ls=":", lw=1.2))
    key(last, handles)
    box = last.get_position()
    last.set_position((box.x0, box.y0, box.width, box.height - 12 / 72 / figure.get_figheight()))
    stack(panels, [1.0] * len(panels), 36, LABELS_FROM)
    for ((kind, strength), own), axes in zip(of_kind.items(), panels, strict=True):
        title = SHOCKS.get(kind, kind + " {:g}").format(strength)
        axes.set_title(title, loc="left", size=9.5, color=INK)
        _draw_recoveries(axes, arms, own)
    return figure


def _draw_recoveries(axes: Axes, arms: Arms, recoveries: Sequence[Recovery]) -> None:
    """The lines of one kind of shock: thinner when the colours are used up, and dashed differently after
    that."""
    axes.set_ylabel("loss − before (nats)")
    axes.axhline(0, color="#999999", lw=0.8)
    axes.axvline(0, color=ALERT, ls=":", lw=1.2)
    looks = {
        ebc: itertools.cycle(itertools.product(dashes, (1.8, 0.9), palette))
        for ebc, dashes, palette in ((True, ("-", "-."), WITH_EBC), (False, ("--", ":"), WITHOUT))
    }
    ends = []
    for recovery in recoveries:
        dashes, width, colour = next(looks[bool(arms[recovery.label]["ebc"])])
        axes.plot(recovery.offset, recovery.loss, color=colour, lw=width, ls=dashes)
        if len(recoveries) <= MOST_LINES:
            axes.plot(recovery.offset, recovery.seeds.T, color=colour, lw=0.5, alpha=0.3, zorder=1.2)
        end = np.flatnonzero(np.isfinite(recovery.loss))[-1]
        ends.append((float(recovery.offset[end]), float(recovery.loss[end]), told(recovery), colour))
    axes.set_xlim(-SHOCK_WINDOW - 1, max(x for x, *_ in ends) + 1)
    beside(axes, ends)


def told(recovery: Recovery) -> str:
    """The arm with its peak, and after how many steps its loss was back."""
    back = [steps for steps in recovery.back if steps is not None]
    label = recovery.label.removesuffix(f"_{recovery.kind}")  # the panel says which shock it was
    text = f"{label}  peak {signed(statistics.fmean(recovery.peaks))}, "
    after = round(statistics.fmean(back)) if back else 0
    if after:
        text += f"back after {after} step{'s' * (after != 1)}"
    else:
        text += "back immediately" if back else "not back"
    some = 0 < len(back) < len(recovery.back)
    return text + (f" ({len(back)} of {len(recovery.back)} seeds)" if some else "")
