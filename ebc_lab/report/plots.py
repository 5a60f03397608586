"""The pictures of a study (DESIGN: files of a study), each to be read without knowing the method or this program.

For every final arm its loss, its clip coefficient and its KL; for the study the LR scales and val loss against mean c.
A picture says in its header what it shows, of which arm, what was found, and which runs are missing. Drawn from the
study's files alone, so that equal files give equal bytes. Import this module late: matplotlib costs half a second.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ..telemetry import CLIPPED_BELOW, KL_BAND, PLATEAU_C, WARM_STEPS, read_json, write_whole
from .curves import Run, audited, by_step, final_validation, read_runs, running_mean, trouble, window
from .sheet import ALERT, EBC, GOAL, OTHER, PLAIN, SPARE, STYLE, Facts, fit, key, page, png, say_nothing_to_draw

OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "muon": "Muon", "sgd": "SGD"}
FRAMED_FROM = 1 / 20  # of a run: the steep first steps may leave the frame, or nothing else could be told apart in it


def draw_study(root: Path) -> list[Path]:
    """Draw every picture of the study in folder `root` and write them there. -> the files, in the order drawn."""
    header, decisions = read_json(root / "study.json"), read_json(root / "auto_decisions.json")
    written = []
    with matplotlib.rc_context(fname=STYLE):
        for name, figure in pictures(root, facts_of(header), decisions):
            written.append(root / f"{name}.png")
            write_whole(written[-1], png(figure))
    return written


def facts_of(header: Mapping[str, Any]) -> Facts:
    """What study.json says that every picture repeats."""
    config, corpus = header["config"], header["corpus"]
    low, high = config["study"]["band"]
    return Facts(
        name=header["study"],
        corpus=corpus["title"],
        warning=corpus["warning"],
        scale=config["scale"],
        tokens_per_step=config["batch_size"] * config["model"]["context"],
        windows=config["eval_windows"],
        band=(low, high),
    )


def pictures(root: Path, facts: Facts, decisions: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """(file name without its ending, figure), one after the other, so that only one arm's runs are in memory."""
    scaled, finals = decisions["lr_scale"]["tracks"], decisions["finals"]["tracks"]
    for track, found in scaled.items():
        best_lr = decisions["lr_sweep"]["tracks"][track]["lr"]
        yield "lr_scale" + f"_{track}" * (len(scaled) > 1), draw_lr_scale(facts, track, found, best_lr)
    arms: dict[str, Mapping[str, Any]] = {}
    spreads: dict[str, tuple[list[float], list[float]]] = {}
    for track, found in finals.items():
        natural_kl = decisions["lr_sweep"]["tracks"][track]["natural_kl"]
        baseline = read_runs(root, found["arms"][found["roles"]["baseline"]])
        for name, arm in found["arms"].items():
            runs = read_runs(root, arm)
            reached = found["efficiency"].get(name)
            yield f"{name}_loss", draw_loss(facts, name, arm, runs, baseline, reached)
            yield f"{name}_clip", draw_clip(facts, name, arm, runs)
            yield f"{name}_kl", draw_kl(facts, name, arm, runs, natural_kl)
            arms[name] = arm
            done = [r.result for r in runs if r.outcome == "completed" and r.result["val_loss"] is not None]
            spreads[name] = ([r["c_mean"] for r in done], [r["val_loss"] for r in done])
    yield "pareto", draw_pareto(facts, arms, spreads)


# -- an arm in words --------------------------------------------------------------------------------------------------


def short(name: str, arm: Mapping[str, Any]) -> str:
    """An arm as a label: `EBC ×4, falling δ*`."""
    text = f"{'EBC' if arm['ebc'] else 'plain'} ×{arm['lr_scale']:g}"
    text += ", falling δ*" if "_lindelta" in name else ""
    text += ", LR decay" if name.endswith("_lrdecay") else ""
    return text + {"baseline": " (baseline)", "control": " (fair control)"}.get(arm["roles"][0], "")


def words(name: str, arm: Mapping[str, Any]) -> str:
    """An arm in plain words, for a title."""
    rate = "the best plain learning rate" if arm["lr_scale"] != 1 else "its best learning rate"
    text = f"{optimizer(arm['track'])} {'with EBC' if arm['ebc'] else 'without EBC'}, "
    text += rate if arm["lr_scale"] == 1 else f"{arm['lr_scale']:g}× {rate}"
    text += ", KL target falling to 5%" if "_lindelta" in name else ""
    text += ", warm-up and decay" if name.endswith("_lrdecay") else ""
    return text + {"baseline": " (the baseline)", "control": " (the fair control)"}.get(arm["roles"][0], "")


def seeds_of(number: int) -> str:
    return f"{number} seed{'s' * (number != 1)}"


def optimizer(track: str) -> str:
    """A track (optimizer_projection) in words."""
    name, _, projection = track.partition("_")
    return OPTIMIZERS.get(name, name) + (f" + {projection} projection" if projection not in ("", "none") else "")


# -- one arm ----------------------------------------------------------------------------------------------------------


def arm_page(
    facts: Facts, name: str, arm: Mapping[str, Any], runs: Sequence[Run], what: str, finding: str
) -> tuple[Figure, Axes]:
    """The page of one arm, its x axis the training steps."""
    small = (name, f"lr {arm['lr']:g}", seeds_of(len(runs)))
    figure, axes = page(facts, what, words(name, arm), finding, small, trouble(runs))
    axes.set_xlabel(f"training step  (one step = {facts.tokens_per_step:,} tokens)")
    last = max((float(r.steps["step"][-1]) for r in runs if r.steps), default=0.0)
    axes.set_xlim(-0.01 * last, 1.01 * last + 1)
    return figure, axes


def seed_band(axes: Axes, steps: np.ndarray, table: np.ma.MaskedArray, colour: str) -> None:
    """The seeds' range, step by step."""
    low, high = table.min(axis=0), table.max(axis=0)
    axes.fill_between(steps, low, high, color=colour, alpha=0.16, lw=0, label="seeds, lowest to highest")


def colour_of(arm: Mapping[str, Any]) -> str:
    return EBC if arm["ebc"] else PLAIN


def draw_loss(
    facts: Facts,
    name: str,
    arm: Mapping[str, Any],
    runs: Sequence[Run],
    baseline: Sequence[Run],
    reached: Mapping[str, Any] | None,
) -> Figure:
    """Training loss (running mean, seeds as a band) and validation loss on the fixed windows, with the baseline's."""
    is_baseline = "baseline" in arm["roles"]
    target, own = final_validation(baseline), final_validation(runs)
    finding = "No seed completed" if not own else f"Validation loss ends at {statistics.fmean(own):.3f}"
    if len(own) > 1:
        finding += f" (seeds {min(own):.3f} to {max(own):.3f})"
    if own and target and not is_baseline:
        gap = statistics.fmean(own) - statistics.fmean(target)
        finding += f", {abs(gap):.3f} {'below' if gap < 0 else 'above'} the baseline; "
        finding += (
            f"{reached['seeds']} of {len(runs)} seeds get there, at step {reached['steps']:.0f}"
            if reached
            else "most seeds do not get there"
        )
    figure, axes = arm_page(facts, name, arm, runs, "Is it learning? Training and validation loss", f"{finding}.")
    axes.set_ylabel("loss (nats per token; lower is better)")
    steps, table = by_step((r.steps for r in runs), "loss")
    if not len(steps):
        say_nothing_to_draw(axes)
        return figure
    colour = colour_of(arm)
    smooth = running_mean(table)
    for row in smooth:
        axes.plot(steps, row, color=colour, alpha=0.35, lw=0.6)
    seed_band(axes, steps, smooth, colour)
    label = f"training loss, mean of the seeds over {window(len(steps))} steps"
    axes.plot(steps, smooth.mean(0), color=colour, label=label)
    seen = [smooth[:, steps >= FRAMED_FROM * steps[-1]]]
    if not is_baseline and target:
        at, values = by_step((r.evals for r in baseline if r.outcome == "completed"), "val_loss")
        axes.plot(at, values.mean(0), color=PLAIN, lw=1.0, ls=":", label="baseline, validation")
    if target:
        label = f"target: the baseline's final validation loss, {statistics.fmean(target):.3f}"
        axes.axhline(statistics.fmean(target), color=ALERT, ls="--", lw=1.2, label=label)
        seen.append(np.ma.array(target))
    at, values = by_step((r.evals for r in runs), "val_loss")
    if len(at):
        mean = values.mean(0)
        bars = np.ma.filled([mean - values.min(0), values.max(0) - mean], 0.0)
        label = f"validation loss, {facts.windows} fixed windows (bars: seeds)"
        axes.errorbar(at, mean, bars, color="black", marker="o", ms=4, lw=1.0, elinewidth=0.8, label=label)
        seen += [values]
    for run in runs:
        if run.outcome == "diverged" and run.steps:
            axes.plot(run.steps["step"][-1], 0.97, "x", color=ALERT, ms=9, mew=2, transform=axes.get_xaxis_transform())
    frame(axes, seen, float(table[:, 0].max()) if table[:, 0].count() else math.inf)
    key(axes)
    return figure


def frame(axes: Axes, seen: Sequence[np.ma.MaskedArray], ceiling: float) -> None:
    """Limit y to what matters: what was seen after the first steps, and never far above the initial loss."""
    low = min((float(x.min()) for x in seen if x.count()), default=0.0)
    high = min(max((float(x.max()) for x in seen if x.count()), default=1.0), 1.1 * ceiling)
    room = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - room, high + room)


def draw_clip(facts: Facts, name: str, arm: Mapping[str, Any], runs: Sequence[Run]) -> Figure:
    """The clip coefficient of every step: median over the seeds, the seeds as a band, and where it should lie."""
    low, high = facts.band
    results = [r.result for r in runs if r.result.get("c_median") is not None]
    if not arm["ebc"]:
        finding = "Without EBC every update is applied whole: c = 1 throughout."
    elif not results:
        finding = "No seed has a result."
    else:
        c = statistics.median(r["c_median"] for r in results)
        where = "inside" if low <= c <= high else "below" if c < low else "above"
        clipped = 100 * statistics.fmean(r["clip_rate"] for r in results)
        longest = max(r["plateau_steps"] for r in results)
        finding = f"Median c {c:.2f}, {where} the target band; {clipped:.0f}% of the steps are clipped; "
        finding += f"longest stretch under {PLATEAU_C:g}: {longest} step{'s' * (longest != 1)}."
    figure, axes = arm_page(facts, name, arm, runs, "How much of each update is applied", finding)
    axes.set(ylabel="clip coefficient c: applied share of the update", ylim=(-0.02, 1.06))
    steps, table = by_step((r.steps for r in runs), "c")
    if not len(steps):
        say_nothing_to_draw(axes)
        return figure
    table.mask = np.ma.getmaskarray(table) | (by_step((r.steps for r in runs), "skipped")[1].filled(1.0) != 0)
    axes.axhspan(low, high, color=GOAL, alpha=0.15, lw=0, label=f"target band for the median, {low:g} to {high:g}")
    axes.axhline(PLATEAU_C, color=ALERT, ls="--", lw=1.2, label=f"plateau line: staying under {PLATEAU_C:g} is a fault")
    colour, middle = colour_of(arm), np.ma.median(table, axis=0)
    seed_band(axes, steps, table, colour)
    axes.plot(steps, middle, color=colour, lw=0.6, alpha=0.6, label="median of the seeds, each step")
    smooth = running_mean(np.ma.masked_array(middle)[None])[0]
    axes.plot(steps, smooth, color=colour, lw=2.2, label=f"the same, mean over {window(len(steps))} steps")
    key(axes)
    return figure


def draw_kl(facts: Facts, name: str, arm: Mapping[str, Any], runs: Sequence[Run], natural_kl: float) -> Figure:
    """Applied KL at the audits on a log axis, with the target δ* of each step or the plain optimizer's natural KL."""
    results = [r.result for r in runs if r.result.get("kl_median") is not None]
    clipped = sum(r.get("kl_clipped_audits") or 0 for r in results)
    if not results:
        finding = "No seed has an audited step."
    elif not arm["ebc"]:
        median = statistics.median(r["kl_median"] for r in results)
        finding = f"Without EBC nothing holds the KL; its median from step {WARM_STEPS} on is {median:.2g}."
    elif not clipped:
        finding = "No audited step was clipped, so the target never acted."
    else:
        within = sum((r["kl_within_30pct"] or 0) * (r["kl_clipped_audits"] or 0) for r in results) / clipped
        ratio = statistics.median(r["kl_ratio_median"] for r in results if r["kl_ratio_median"] is not None)
        finding = f"Of {clipped} audited, clipped steps {100 * within:.0f}% lie within ±{100 * KL_BAND:g}% "
        finding += f"of the target; median KL / target {ratio:.2f}."
    figure, axes = arm_page(facts, name, arm, runs, "How far each step moves the predictions (KL divergence)", finding)
    axes.set_ylabel("applied KL (nats per token, log scale)")
    audits = [audited(r.steps) for r in runs]
    steps, table = by_step(audits, "applied_kl")
    if not len(steps):
        say_nothing_to_draw(axes)
        return figure
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    colour = colour_of(arm)
    if arm["ebc"]:
        at, targets = by_step((r.steps for r in runs), "target_kl")
        target = targets.mean(0)
        around = (target * (1 - KL_BAND), target * (1 + KL_BAND))
        axes.fill_between(at, *around, color=GOAL, alpha=0.2, lw=0, label=f"within ±{100 * KL_BAND:g}% of the target")
        axes.plot(at, target, color=GOAL, lw=1.4, ls="--", label="target δ* of that step")
    else:
        label = f"natural KL: median of the unclipped baseline, {natural_kl:.2g}"
        axes.axhline(natural_kl, color=GOAL, lw=1.4, ls="--", label=label)
    seed_band(axes, steps, table, colour)
    axes.plot(steps, np.ma.median(table, axis=0), color=colour, label="applied KL, median of the seeds")
    # What EBC did not clip lies under the target by right: hollow, so that it is not read as a miss.
    for face, wanted, label in ((colour, True, "audited step, clipped"), ("white", False, "audited step, not clipped")):
        chosen = [(a["step"][m], a["applied_kl"][m]) for a in audits if a for m in [(a["c"] < CLIPPED_BELOW) == wanted]]
        if arm["ebc"] and any(len(x) for x, _ in chosen):
            x, y = (np.concatenate(part) for part in zip(*chosen, strict=True))
            axes.plot(x, y, "o", ms=3.2, mew=0.7, mec=colour, mfc=face, alpha=0.8, label=label)
    key(axes)
    return figure


# -- the study --------------------------------------------------------------------------------------------------------

LR_ARMS = {  # role -> label, colour, marker, horizontal shift that keeps error bars apart
    "none": ("without EBC", PLAIN, "s", 0.985),
    "ebc": ("with EBC", EBC, "o", 1.015),
    "fixed_tau": ("with a fixed trust radius τ", OTHER, "D", 1.0),
}


def draw_lr_scale(facts: Facts, track: str, found: Mapping[str, Any], best_lr: float) -> Figure:
    """Validation loss against the LR scale, with and without EBC; the baseline's noise as a band; the chosen scale."""
    reach = {arm: f"up to ×{s:g}" if s else "nowhere" for arm, s in found["headroom"].items()}
    finding = f"Within 1σ of the baseline: with EBC {reach.get('ebc', '–')}, without {reach.get('none', '–')}."
    if found["headroom_is_tautology"]:
        finding += " At hollow points c < 1 cancels the learning rate."
    rows = [row for arm in found["arms"].values() for row in arm]
    seeds = sorted({str(row["seed"]) for row in rows})
    what = "How far can the learning rate rise?"
    whom = f"{optimizer(track)} with and without EBC; ×1 is its best learning rate without EBC, {best_lr:g}"
    figure, axes = page(facts, what, whom, finding, ("stage lr_scale", f"{seeds_of(len(seeds))} ({', '.join(seeds)})"))
    base, sigma = found["baseline_val_loss"], found["sigma"]
    label = f"baseline ± 1σ (σ = {sigma:.3f} over seeds)"
    axes.axhspan(base - sigma, base + sigma, color=GOAL, alpha=0.15, lw=0, label=label)
    axes.axhline(base, color=GOAL, ls="--", lw=1.2)
    scales = {row["lr_scale"]: f"×{row['lr_scale']:g}\nlr {row['lr']:g}" for row in rows}
    for row in found["arms"].get("ebc", []):
        scales[row["lr_scale"]] += f"\nc {row['c_median']:.2f}" if row["c_median"] is not None else ""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(scales), [scales[s] for s in sorted(scales)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(scales) / 1.15, max(scales) * 1.15)
    handles = axes.get_legend_handles_labels()[0]
    ring: list[Line2D] = []
    rows_of_crosses = 0
    for role, arm in found["arms"].items():
        label, colour, marker, shift = LR_ARMS.get(role, (role, SPARE, "v", 1.0))
        whole = [r for r in arm if r["outcome"] == "completed" and r["val_loss"] is not None]
        x = [r["lr_scale"] * shift for r in whole]
        handles += axes.plot(x, [r["val_loss"] for r in whole], color=colour, marker=marker, label=label)
        axes.errorbar(x, [r["val_loss"] for r in whole], [r["val_se"] or 0 for r in whole], fmt="none", ecolor=colour)
        for at, row in zip(x, whole, strict=True):
            if row["inert"]:
                axes.plot(at, row["val_loss"], marker, color=colour, mfc="white", mew=1.5, zorder=3)
            if row["run_id"] == found["run_id"]:
                label = f"chosen for the finals: ×{found['lr_scale']:g}"
                ring = axes.plot(at, row["val_loss"], "o", color=ALERT, ms=13, mfc="none", mew=1.6, label=label)
        broken, height = [r for r in arm if r not in whole], 0.95 - 0.08 * rows_of_crosses
        rows_of_crosses += bool(broken)
        for row in broken:
            at, top = row["lr_scale"], axes.get_xaxis_transform()
            axes.plot(at, height, "x", color=colour, ms=9, mew=2.2, transform=top)
            axes.text(1.02 * at, height, str(row["outcome"]), color=colour, size=8, transform=top, va="center")
    handles += ring
    if any(row["inert"] for row in rows):
        label = "LR inert: the same run up to rounding"
        handles.append(Line2D([], [], color=EBC, ls="", marker="o", mfc="white", label=label))
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.05 * (high - low), high + (0.05 + 0.12 * rows_of_crosses) * (high - low))
    axes.set_xlabel("learning rate, as a multiple of the best without EBC; c: median clip coefficient of EBC there")
    axes.set_ylabel("validation loss (nats per token; bars: ± s.e.)")
    key(axes, handles)
    return figure


def draw_pareto(
    facts: Facts, arms: Mapping[str, Mapping[str, Any]], spreads: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> Figure:
    """Validation loss against mean c of the final arms; `spreads`: arm -> its completed runs' (mean c, val loss).

    Labels stand in a column beside the axes, in the order of the points, because plain arms share c = 1.
    """
    tracks = sorted({arm["track"] for arm in arms.values()})

    def label(name: str) -> str:
        whose = f"{optimizer(arms[name]['track']).removesuffix(' projection')}, " if len(tracks) > 1 else ""
        return whose + short(name, arms[name])

    points = {n: (statistics.fmean(c), statistics.fmean(loss)) for n, (c, loss) in spreads.items() if loss}
    best = min(points, key=lambda n: points[n][1], default=None)
    finding = f"Lowest validation loss: {points[best][1]:.3f}, {label(best)}." if best else "No run completed."
    gone = "; ".join(f"{label(n)}: no run completed" for n in arms if n not in points)
    seeds = max((len(arm["runs"]) for arm in arms.values()), default=0)
    what = "What does it cost to hold the updates back?"
    whom = f"{optimizer(tracks[0])}: e" if len(tracks) == 1 else "E"
    whom += "very final arm's validation loss against its mean clip coefficient"
    figure, axes = page(facts, what, whom, finding, (seeds_of(seeds),), gone)
    axes.set_xlabel("mean clip coefficient c over all steps (1 = every update applied whole)")
    axes.set_ylabel("validation loss, whole split (nats per token)")
    handles = []
    for colour, meaning in ((PLAIN, "without EBC"), (EBC, "with EBC")):
        handles.append(Line2D([], [], color=colour, marker="o", ls="", label=meaning))
    handles.append(Line2D([], [], color="#666666", lw=1, label="bars: ± one standard deviation over the seeds"))
    for name, (x, y) in points.items():
        dx, dy = (statistics.stdev(values) if len(values) > 1 else 0.0 for values in spreads[name])
        marker = "osDv^P*X"[tracks.index(arms[name]["track"]) % 8]
        axes.errorbar(x, y, dy, dx, fmt=marker, ms=7, color=colour_of(arms[name]), elinewidth=1)
    axes.margins(0.08)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # fixed, so that the leader lines do not move them
    key(axes, handles)
    box, column = axes.get_position(), 0.68 if len(tracks) == 1 else 0.6
    axes.set_position((box.x0, box.y0, column - box.x0, box.height))
    ordered = sorted(points, key=lambda n: points[n][1])
    places = spread([float(axes.transLimits.transform(points[n])[1]) for n in ordered], 1 / max(len(ordered), 14))
    for name, place in zip(ordered, places, strict=True):
        arm, end = arms[name], axes.transLimits.inverted().transform((1.02, place))
        done, all_of_them = len(spreads[name][1]), len(arm["runs"])
        text = f"{points[name][1]:.3f}  {label(name)}"
        text += f" [{done} of {all_of_them} runs]" if done < all_of_them else ""
        axes.plot(*zip(points[name], end, strict=True), color="#AAAAAA", lw=0.6, clip_on=False, zorder=1)
        beside = axes.text(1.03, place, text, transform=axes.transAxes, va="center", size=8, color=colour_of(arm))
        fit(beside, figure.bbox.width - beside.get_window_extent().x0)
    return figure


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending places in [0, 1], at least `gap` apart, near those wanted."""
    places = list(wanted)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], 1.0 if i == len(places) - 1 else places[i + 1] - gap)
    return places
