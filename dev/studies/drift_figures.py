"""The figures of findings.md's "Why does δ drift": what each arm's steps did early and late in their run.

    python dev/studies/drift_figures.py outputs/ebc_ablation/drift --write docs/evidence/drift_audits.csv.gz
    python dev/studies/drift_figures.py docs/evidence/drift_audits.csv.gz --picture docs/images/drift.png
    python dev/studies/drift_figures.py docs/evidence/drift_audits.csv.gz --share pi_zero/pi_first
    python dev/studies/drift_figures.py docs/evidence/mechanism_audits.csv.gz --pairs kl_2/kl_05

Reads a finished study, or the audited steps that `--write` kept of one. Prints for every arm the geometric
mean, over the seeds, of the median over the first and over the last 30% of the run, and late over early, with
95% t-intervals over the seeds, in logarithms.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import NullFormatter
from scipy import stats

import ebc_lab

PART = 0.3  # of a run: what is called early and late
WINDOW = 5  # audits of a running geometric mean
KEPT = ["arm", "seed", "step", "c", "applied_kl", "applied_norm", "loss", "sharpness", "on_edge"]
ROWS = {  # of the picture
    "c": "share of the step taken, c",
    "applied_kl": "KL of the step, nats per token",
    "applied_norm": "length of the step, ‖c·ΔW‖",
    "loss": "training loss, nats per token",
}
TICKS = {
    "c": [0.1, 0.2, 0.5, 1],
    "applied_kl": [0.001, 0.003, 0.01, 0.03],
    "applied_norm": [0.15, 0.2, 0.3, 0.5],
}
SHOWN = {  # arm -> its name and look in the picture
    "pi_zero": ("the earlier bound, β from zero, δ moved by pi", "#d55e00", "-"),
    "pi_first": ("the same, β from its first measurement", "#cc79a7", "-"),
    "kl_1": ("one KL, 1 × natural", "#0072b2", "-"),
    "kl_2": ("one KL, 2 × natural", "#56b4e9", "-"),
    "kl_2_falling": ("2 × natural, falling in the last 40%", "#009e73", "--"),
    "length": ("one length, 0.25", "#000000", "-"),
    "length_falling": ("0.5, falling in the last 40%", "#777777", "--"),
    "plain": ("no limit, the best constant rate", "#999999", ":"),
}


def audited(study: ebc_lab.LoadedStudy) -> pd.DataFrame:
    """One row an audited step of a suite's arms: c, KL, length, and the mean loss since the audit before."""
    steps = study.steps()
    asked = steps.arm.isin(study.config["ablation"]["arms"]) & steps.seed.isin(study.config["seeds"])
    steps = steps[asked].sort_values(["arm", "seed", "step"])
    each = steps.groupby(["arm", "seed"])
    every = study.config["audit_every"]
    steps["loss"] = each["loss"].transform(lambda loss: loss.rolling(every, min_periods=1).mean())
    if "preconditioned_sharpness" in steps:
        steps["on_edge"] = steps.eta_eff * steps.preconditioned_sharpness
    rows = steps[steps.applied_norm.notna() & (steps.applied_kl > 0)]
    return rows[[name for name in KEPT if name in rows]]


def geometric(values: pd.Series) -> str:
    """The geometric mean of one value a seed and its 95% t-interval."""
    logs = np.log(values.dropna().to_numpy())
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    low, middle, high = np.exp([logs.mean() - half, logs.mean(), logs.mean() + half])
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def medians(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Of each arm and seed, the medians of its early steps, and of its late ones."""
    end = rows.step.max() + 1
    early = rows[rows.step < PART * end].groupby(["arm", "seed"]).median(numeric_only=True)
    late = rows[rows.step >= (1 - PART) * end].groupby(["arm", "seed"]).median(numeric_only=True)
    return early, late


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Early, late and late over early of each quantity, one row an arm."""
    early, late = medians(rows)
    return pd.DataFrame(
        {
            (name, what): values[name].groupby("arm", sort=False).apply(geometric)
            for name in rows.columns[3:]
            for what, values in (("early", early), ("late", late), ("late/early", late / early))
        }
    )


def draw(rows: pd.DataFrame, to: Path) -> None:
    """Four panels under each other, a line an arm: the seeds' geometric mean, smoothed, and their range."""
    figure, panels = plt.subplots(4, 1, figsize=(8.2, 10.5), sharex=True, layout="constrained")
    for panel, (name, title) in zip(panels, ROWS.items(), strict=True):
        for arm, (label, colour, dash) in SHOWN.items():
            logs = np.log(rows[rows.arm == arm].pivot(index="step", columns="seed", values=name))
            smooth = logs.rolling(WINDOW, min_periods=1, center=True).mean()
            panel.plot(logs.index, np.exp(smooth.mean(axis=1)), dash, color=colour, label=label, lw=1.8)
            panel.fill_between(
                logs.index,
                np.exp(smooth.min(axis=1)),
                np.exp(smooth.max(axis=1)),
                color=colour,
                alpha=0.1,
                lw=0,
            )
        if name in TICKS:
            panel.set_yscale("log")
            panel.set_yticks(TICKS[name], [f"{tick:g}" for tick in TICKS[name]], minor=False)
            panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_title(title, loc="left", fontsize=10)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("training step")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(to, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="What each arm's steps did early and late in their run.")
    parser.add_argument("of", type=Path, help="a study's folder, or what --write kept of one")
    parser.add_argument("--write", type=Path, help="keep its audited steps here, as CSV")
    parser.add_argument("--picture", type=Path, help="draw them here")
    parser.add_argument("--pairs", nargs="*", default=[], help="A/B: late in A over late in B, by seed")
    parser.add_argument("--share", help="A/B: how much of the change of ln c in A is gone in B, by seed")
    options = parser.parse_args()
    rows = pd.read_csv(options.of) if options.of.is_file() else audited(ebc_lab.load(options.of))
    if options.write:
        rows.to_csv(
            options.write, index=False, float_format="%.5g", compression={"method": "gzip", "mtime": 0}
        )
    if options.picture:
        draw(rows, options.picture)
    early, late = medians(rows)
    for pair in options.pairs:
        a, b = pair.split("/")
        for name in ("applied_norm", "applied_kl"):
            print(f"late {name}, {pair}: {geometric(late.loc[a][name] / late.loc[b][name])}")
    if options.share:
        drift = np.log(late.c / early.c)
        a, b = (drift.loc[arm] for arm in options.share.split("/"))
        gone = 1 - b / a
        mean, half = gone.mean(), stats.t.ppf(0.975, len(gone) - 1) * gone.std(ddof=1) / math.sqrt(len(gone))
        print(f"of ln c, {options.share}: {mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]")
    for arm, of in table(rows).iterrows():
        print(arm)
        for name in of.index.levels[0]:
            print(f"    {name:14}" + "".join(f"{what} {of[name, what]:28}" for what in of[name].index))


if __name__ == "__main__":
    main()
