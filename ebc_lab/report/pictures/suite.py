"""The pictures of a suite: the arms side by side, what the mechanism did over the run, how shocks passed, and each arm.

With several tracks, every picture has its track's name in its own.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ebc_lab.records.figures import KL_BAND, RECOVERY_WINDOW, SHOCK_WINDOW

from ..text.words import optimizer
from .arm import Rival, draw_clip, draw_kl, draw_loss
from .curves import Run, applied_c, audited, by_step, read_results, read_runs, running_mean, thinned, window
from .forest import draw_forest, missing, rows_of, signed
from .mechanism import Tightness, draw_groups, draw_tightness, tightness_of
from .sheet import ALERT, EBC, GOAL, PLAIN, Facts, Picture, Sheet, another, beside, key, page, stack

PALETTE = (EBC, ALERT, GOAL, "C4", "C5", "C6", "black")
WITH_EBC, WITHOUT = (EBC, GOAL, "C6", "black"), (PLAIN, "C4", "C5", ALERT)  # where both share a panel
DASHES = ("-", "--", "-.")
REST = "#BBBBBB"
MOST, HIGHLIGHTED = (
    8,
    6,
)  # where there are more than so many EBC arms, so many are told apart; of more, no seed is drawn
LABELS_FROM = 0.7  # of the width: the lines' labels stand beyond it
LEAST_RATIO = 0.01  # the log axis of KL / δ* ends there: what lies further off leaves the frame
AFTER_SHOCK = 150  # steps shown after a shock
RECOVERY_POINTS = 100  # of a line
SHOCKS = {
    "label_noise": "one batch with {:.0%} of its targets drawn at random",
    "lr_spike": "one step at {:g} times the learning rate",
    "corrupt_gradient": "one gradient with noise of {:g} times its norm",
}


def suite_pictures(root: Path, facts: Facts, decisions: Mapping[str, Any]) -> Iterator[Picture]:
    """Of every track's arms together, and of each arm."""
    decision = decisions["ablation"]
    for track, found in decision["tracks"].items():
        tail, arms = f"_{track}" * (len(decision["tracks"]) > 1), found["arms"]
        forest = draw_forest(facts, track, found, rows_of(root, found), decision["rule"])
        yield Picture(f"ablation{tail}", "verdict", forest)
        references = {
            v: read_runs(root, arms[v]) for v in {arm["versus"] for arm in arms.values()} if v in arms
        }
        courses: dict[str, Course] = {}
        recoveries: list[Recovery] = []
        tight: dict[str, Tightness] = {}
        for label, arm in arms.items():
            runs = references[label] if label in references else read_runs(root, arm)
            of = arm["versus"] or label
            rival = Rival(
                of, runs if of == label else references.get(of, []), in_words(arm), itself=of == label
            )
            yield Picture(f"{label}{tail}_loss", "arms", draw_loss(facts, label, arm, runs, rival), label)
            if arm["ebc"]:
                natural_kl = decisions["lr_sweep"]["tracks"][track]["natural_kl"]
                yield Picture(f"{label}{tail}_clip", "arms", draw_clip(facts, label, arm, runs), label)
                yield Picture(
                    f"{label}{tail}_kl", "arms", draw_kl(facts, label, arm, runs, natural_kl), label
                )
                if sheet := draw_groups(facts, label, arm, runs):
                    yield Picture(f"{label}{tail}_groups", "arms", sheet, label)
                if measured := tightness_of(runs):
                    tight[label] = measured
                courses[label] = course_of(runs)
            recoveries += recovery_of(label, arm, runs, read_results(root, arm, "spec"))
        if courses:
            steps = draw_steps(facts, track, {label: arms[label] for label in courses}, courses)
            yield Picture(f"ablation_steps{tail}", "ablation", steps)
        if tight:
            sheet = draw_tightness(facts, track, {label: label for label in tight}, arms, tight)
            yield Picture(f"ablation_tightness{tail}", "ablation", sheet)
        if recoveries:
            drawn = draw_recovery(facts, track, {r.label: arms[r.label] for r in recoveries}, recoveries)
            yield Picture(f"recovery{tail}", "ablation", drawn)


def in_words(arm: Mapping[str, Any]) -> str:
    """The paired difference in test loss, as the end of a sentence."""
    difference = arm["difference"] or {}
    if difference.get("mean") is None:
        return ""
    half = f" ± {difference['high'] - difference['mean']:.3f}" if difference["high"] is not None else ""
    return f"; test loss {signed(difference['mean'])}{half}"


# -- what the mechanism did -------------------------------------------------------------------------------------------


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


def draw_steps(
    facts: Facts, track: str, arms: Mapping[str, Mapping[str, Any]], courses: Mapping[str, Course]
) -> Sheet:
    """The clip coefficient above, the applied KL over its target below, a line for every EBC arm."""
    far = [
        x
        for pair in zip(
            *(sorted(courses, key=lambda x: -by(arms[x])) for by in (drift, distance)), strict=True
        )
        for x in pair
    ]
    shown = [
        label for label in courses if len(courses) <= MOST or label in list(dict.fromkeys(far))[:HIGHLIGHTED]
    ]
    most, farthest = max(arms, key=lambda x: drift(arms[x])), max(arms, key=lambda x: distance(arms[x]))
    parts = []
    if drift(arms[most]):
        parts.append(f"Largest drift of c: {most}, {course_in_words(arms[most])}")
    if distance(arms[farthest]):
        parts.append(
            f"farthest from its target: {farthest}, median KL / δ* {arms[farthest]['figures']['kl_ratio_median']:.2f}"
        )
    text = "; ".join(parts) or "Neither c nor the KL was measured"
    whom = f"{optimizer(track)}: every arm with EBC ({len(courses)}), medians over the seeds"
    small, seeds = (
        ("c: median near the start → near the end of the run",),
        max(len(arm["runs"]) for arm in arms.values()),
    )
    what = "What did the clip do over the run?"
    figure, bottom = page(
        facts, what, whom, f"{text[0].upper()}{text[1:]}.", seeds, small, missing(arms), (10.4, 7.4)
    )
    top = another(bottom)
    last = max((float(c.steps[-1]) for c in courses.values() if len(c.steps)), default=0.0)
    for axes in (top, bottom):
        axes.set_xlim(-0.01 * last, 1.01 * last + 1)
    bottom.set_xlabel(f"training step  (one step = {facts.tokens_per_step:,} tokens)")
    top.set(ylabel="clip coefficient c", ylim=(-0.02, 1.06))
    top.tick_params(labelbottom=False)
    bottom.set_ylabel("applied KL / target δ* (log scale)")
    bottom.set_yscale("log")
    bottom.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    bottom.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bottom.yaxis.set_minor_locator(NullLocator())
    bottom.axhline(1.0, color=GOAL, lw=1.2, ls="--", zorder=1)
    within = (
        f"within ±{100 * KL_BAND:g}% of the target; where nothing is clipped the KL lies below it by right"
    )
    handles: list[Any] = [
        bottom.axhspan(1 - KL_BAND, 1 + KL_BAND, color=GOAL, alpha=0.13, lw=0, label=within)
    ]
    if len(shown) < len(courses):
        label = f"{len(courses) - len(shown)} other arms with EBC: the {len(shown)} whose c or KL / δ* moved most are named"
        handles.append(Line2D([], [], color=REST, lw=1.0, label=label))
    over = window(round(last) + 1)
    handles.append(
        Line2D(
            [], [], color="#666666", label=f"running means: of c over {over} steps, of the KL over 3 audits"
        )
    )
    handles.append(Line2D([], [], color="#666666", lw=0.5, alpha=0.6, label="each seed"))
    tops: list[tuple[float, float, str, str]] = []
    bottoms: list[tuple[float, float, str, str]] = []
    for label, course in courses.items():
        place = shown.index(label) if label in shown else None
        colour, dashes = (
            (REST, "-") if place is None else (PALETTE[place % len(PALETTE)], DASHES[place % len(DASHES)])
        )
        width, order = (1.0, 1.5) if place is None else (1.6, 2.5)
        for axes, ends, x, y, own, words in (
            (top, tops, course.steps, course.c, course.seeds[0], f"{label}  {course_in_words(arms[label])}"),
            (
                bottom,
                bottoms,
                course.audits,
                course.ratio,
                course.seeds[1],
                f"{label}  {ratio_in_words(arms[label])}",
            ),
        ):
            axes.plot(x, y, color=colour, ls=dashes, lw=width, zorder=order)
            if place is not None:
                axes.plot(x, own.T, color=colour, lw=0.5, alpha=0.3, zorder=1.2)
            seen = np.flatnonzero(~np.ma.getmaskarray(y))
            if place is not None and len(seen):
                ends.append((float(x[seen[-1]]), float(y[seen[-1]]), words, colour))
    seen = np.concatenate([c.ratio.compressed() for c in courses.values()])
    low, high = (min(seen), max(seen)) if len(seen) else (1.0, 1.0)
    bottom.set_ylim(max(0.8 * min(low, 0.5), LEAST_RATIO), min(1.25 * max(high, 2.0), 1 / LEAST_RATIO))
    key(bottom, handles)
    stack((top, bottom), (1.0, 1.0), 14, LABELS_FROM)
    beside(top, tops)
    beside(bottom, bottoms)
    return figure


def course_in_words(arm: Mapping[str, Any]) -> str:
    early, late = arm["figures"].get("c_early"), arm["figures"].get("c_late")
    return f"c {early:.2g} → {late:.2g}" if early is not None and late is not None else ""


def ratio_in_words(arm: Mapping[str, Any]) -> str:
    ratio = arm["figures"].get("kl_ratio_median")
    return f"KL / δ* {ratio:.2f} where clipped" if ratio is not None else "never clipped at an audit"


# -- how shocks passed ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recovery:
    """An arm's training loss around its shock. `loss`: minus its level before, by `offset` from the shock's step."""

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
    offset = offset[
        np.union1d(thinned(len(offset), RECOVERY_POINTS), SHOCK_WINDOW)
    ]  # with the gap at the shock itself
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
    """Running mean of the last 10 losses, none from the other side of the shock, minus the mean of the 20 before it.

    NaN at the shock itself, whose loss may be of spoilt targets, and outside the run.
    """
    out = np.full(len(offset), math.nan)
    level = losses[max(0, shock - SHOCK_WINDOW) : shock].mean()
    for i, step in enumerate(shock + offset):
        first = max(step - RECOVERY_WINDOW + 1, shock + 1 if step > shock else 0)
        if 0 <= step < len(losses) and step != shock:
            out[i] = losses[first : step + 1].mean() - level
    return out


def draw_recovery(
    facts: Facts, track: str, arms: Mapping[str, Mapping[str, Any]], recoveries: Sequence[Recovery]
) -> Sheet:
    """A panel for each kind of shock, a line for each arm that had it."""
    kinds = list(dict.fromkeys((r.kind, r.size) for r in recoveries))
    worst, least = (choose(recoveries, key=lambda r: statistics.fmean(r.peaks)) for choose in (max, min))
    text = f"Largest peak: {worst.label}, {signed(statistics.fmean(worst.peaks))}"
    text += (
        f"; smallest: {least.label}, {signed(statistics.fmean(least.peaks))}." if least is not worst else "."
    )
    whom = f"{optimizer(track)}: training loss around a shock, minus its mean over the {SHOCK_WINDOW} steps before"
    what, of = "How does a run recover from a shock?", max(len(arm["runs"]) for arm in arms.values())
    size = (10.4, 2.4 + 2.2 * len(kinds))
    figure, last = page(
        facts, what, whom, text, of, ("peak: the highest mean of any 10 later steps",), missing(arms), size
    )
    panels = [*(another(last) for _ in kinds[1:]), last]
    last.set_xlabel("steps since the shock")
    handles = [
        Line2D(
            [],
            [],
            color="#333333",
            ls=dashes,
            label=f"{words} EBC, mean of the seeds over the last {RECOVERY_WINDOW} steps at most",
        )
        for dashes, words, ebc in (("-", "with", True), ("--", "without", False))
        if any(bool(arm["ebc"]) == ebc for arm in arms.values())
    ]
    if any([(r.kind, r.size) for r in recoveries].count(kind) <= MOST for kind in kinds):
        handles.append(Line2D([], [], color="#666666", lw=0.5, alpha=0.6, label="each seed"))
    handles.append(Line2D([], [], color=ALERT, ls=":", lw=1.2, label="the shock (its own step is left out)"))
    key(last, handles)
    box = last.get_position()
    last.set_position((box.x0, box.y0, box.width, box.height - 12 / 72 / figure.get_figheight()))
    stack(panels, [1.0] * len(panels), 36, LABELS_FROM)
    for (kind, strength), axes in zip(kinds, panels, strict=True):
        axes.set_title(
            SHOCKS.get(kind, kind + " {:g}").format(strength), loc="left", size=9.5, color="#333333"
        )
        axes.set_ylabel("loss − before (nats)")
        axes.axhline(0, color="#999999", lw=0.8)
        axes.axvline(0, color=ALERT, ls=":", lw=1.2)
        ends = []
        own = [r for r in recoveries if (r.kind, r.size) == (kind, strength)]
        looks = {  # thinner when the colours come round again, then dashed otherwise
            ebc: itertools.cycle(itertools.product(dashes, (1.8, 0.9), palette))
            for ebc, dashes, palette in ((True, ("-", "-."), WITH_EBC), (False, ("--", ":"), WITHOUT))
        }
        for recovery in own:
            ebc = bool(arms[recovery.label]["ebc"])
            dashes, width, colour = next(looks[ebc])
            axes.plot(recovery.offset, recovery.loss, color=colour, lw=width, ls=dashes)
            if len(own) <= MOST:
                axes.plot(recovery.offset, recovery.seeds.T, color=colour, lw=0.5, alpha=0.3, zorder=1.2)
            at = np.flatnonzero(np.isfinite(recovery.loss))
            ends.append(
                (float(recovery.offset[at[-1]]), float(recovery.loss[at[-1]]), told(recovery), colour)
            )
        reach = max(x for x, *_ in ends)
        axes.set_xlim(-SHOCK_WINDOW - 1, reach + 1)
        beside(axes, ends)
    return figure


def told(recovery: Recovery) -> str:
    """The arm with its peak, and after how many steps its loss was back."""
    back = [steps for steps in recovery.back if steps is not None]
    label = recovery.label.removesuffix(f"_{recovery.kind}")  # the panel says which shock it was
    text = f"{label}  peak {signed(statistics.fmean(recovery.peaks))}, "
    after = round(statistics.fmean(back)) if back else 0
    text += (
        f"back after {after} step{'s' * (after != 1)}" if after else "back at once" if back else "not back"
    )
    return text + (
        f" ({len(back)} of {len(recovery.back)} seeds)" if 0 < len(back) < len(recovery.back) else ""
    )
