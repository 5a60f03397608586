"""The pictures of a study (DESIGN: files of a study), each to be read without knowing the method or this program.

For every final arm its loss, its clip coefficient and its KL; for the study the LR scales and val loss against mean c; for a
suite what `suites` draws.
A picture says in its header what it shows, of which arm, what was found, and which runs are missing. Drawn from the
study's files alone, so that equal files give equal bytes. Import this module late: matplotlib costs half a second.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from ..config import AblationConfig, from_dict
from ..telemetry import read_json, write_whole
from .arm import Rival, colour_of, draw_clip, draw_kl, draw_loss, optimizer, short
from .catalogue import write_catalogue
from .curves import read_runs
from .render import png, svg
from .sheet import ALERT, EBC, GOAL, OTHER, PLAIN, SPARE, STYLE, Facts, Picture, Sheet, fit, key, page, spread
from .suites import suite_pictures


def draw_study(root: Path) -> list[Path]:
    """Draw every picture of the study in folder `root`, and write them and their list there. -> the files."""
    header, decisions = read_json(root / "study.json"), read_json(root / "auto_decisions.json")
    written, entries = [], []
    with matplotlib.rc_context(fname=STYLE):
        for picture in pictures(root, facts_of(header), decisions):
            for ending, content in (("png", png(picture.sheet)), ("svg", svg(picture.sheet, picture.name))):
                written.append(root / f"{picture.name}.{ending}")
                write_whole(written[-1], content)
            entries.append(picture.entry)
    return [*written, write_catalogue(root, entries)]


def facts_of(header: Mapping[str, Any]) -> Facts:
    """What study.json says that every picture repeats."""
    config, corpus = header["config"], header["corpus"]
    suite = from_dict(AblationConfig, config.get("ablation") or {})
    low, high = config["study"]["band"]
    return Facts(
        name=header["study"],
        corpus=corpus["title"],
        warning=corpus["warning"],
        scale=config["scale"],
        tokens_per_step=config["batch_size"] * config["model"]["context"],
        windows=config["eval_windows"],
        band=(low, high),
        question=suite.question,
        arms=tuple(suite.all_arms()),
    )


def pictures(root: Path, facts: Facts, decisions: Mapping[str, Any]) -> Iterator[Picture]:
    """One after the other, so that only one arm's runs are in memory."""
    scaled = decisions["lr_scale"]["tracks"] if "lr_scale" in decisions else {}
    for track, found in scaled.items():
        best_lr = decisions["lr_sweep"]["tracks"][track]["lr"]
        yield Picture("lr_scale" + f"_{track}" * (len(scaled) > 1), "headroom", draw_lr_scale(facts, track, found, best_lr))
    if "finals" in decisions:
        yield from final_pictures(root, facts, decisions)
    if "ablation" in decisions:
        yield from suite_pictures(root, facts, decisions)


def final_pictures(root: Path, facts: Facts, decisions: Mapping[str, Any]) -> Iterator[Picture]:
    """Those of every final arm, and all of them together."""
    arms: dict[str, Mapping[str, Any]] = {}
    spreads: dict[str, tuple[list[float], list[float]]] = {}
    for track, found in decisions["finals"]["tracks"].items():
        natural_kl = decisions["lr_sweep"]["tracks"][track]["natural_kl"]
        baseline = read_runs(root, found["arms"][found["roles"]["baseline"]])
        for name, arm in found["arms"].items():
            runs = read_runs(root, arm)
            reached = found["efficiency"].get(name)
            there = f"{reached['seeds']} of {len(runs)} seeds get there, at step {reached['steps']:.0f}" if reached else ""
            rival = Rival(
                "the baseline", baseline, f"; {there or 'most seeds do not get there'}", itself="baseline" in arm["roles"]
            )
            yield Picture(f"{name}_loss", "arms", draw_loss(facts, name, arm, runs, rival), name)
            yield Picture(f"{name}_clip", "arms", draw_clip(facts, name, arm, runs), name)
            yield Picture(f"{name}_kl", "arms", draw_kl(facts, name, arm, runs, natural_kl), name)
            arms[name] = arm
            done = [r.result for r in runs if r.outcome == "completed" and r.result["val_loss"] is not None]
            spreads[name] = ([r["c_mean"] for r in done], [r["val_loss"] for r in done])
    yield Picture("pareto", "finals", draw_pareto(facts, arms, spreads))


# -- the study --------------------------------------------------------------------------------------------------------

LR_ARMS = {  # role -> label, colour, marker, horizontal shift that keeps error bars apart
    "none": ("without EBC", PLAIN, "s", 0.985),
    "ebc": ("with EBC", EBC, "o", 1.015),
    "fixed_tau": ("with a fixed trust radius τ", OTHER, "D", 1.0),
}


def draw_lr_scale(facts: Facts, track: str, found: Mapping[str, Any], best_lr: float) -> Sheet:
    """Validation loss against the LR scale, with and without EBC; the baseline's noise as a band; the chosen scale."""
    reach = {arm: f"up to ×{s:g}" if s else "nowhere" for arm, s in found["headroom"].items()}
    finding = f"Within 1σ of the baseline: with EBC {reach.get('ebc', '–')}, without {reach.get('none', '–')}."
    if found["headroom_is_tautology"]:
        finding += " At hollow points c < 1 cancels the learning rate."
    rows = [row for arm in found["arms"].values() for row in arm]
    seeds = sorted({str(row["seed"]) for row in rows})
    what = "How far can the learning rate rise?"
    whom = f"{optimizer(track)} with and without EBC; ×1 is its best learning rate without EBC, {best_lr:g}"
    figure, axes = page(facts, what, whom, finding, len(seeds), (f"stage lr_scale, seed {', '.join(seeds)}",))
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
) -> Sheet:
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
    figure, axes = page(facts, what, whom, finding, seeds, alert=gone)
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
