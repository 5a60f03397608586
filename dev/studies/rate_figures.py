"""Can a wrong learning rate be told from the first sixth of a run? The figures of docs/evidence/rate.yaml.

    python dev/studies/rate_figures.py --write docs/evidence/rate_runs.csv.gz FIT_STUDY TEST_STUDY ...
    python dev/studies/rate_figures.py docs/evidence/rate_runs.csv.gz
    python dev/studies/rate_figures.py docs/evidence/units.zip

`--write` keeps of finished studies one row a run: its losses, and what `Probe` measured in its first sixth.
Prints the frozen rules and their rivals on the fitted runs, then on the others; of units.zip H1's alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

import ebc_lab

SIXTH = 50  # steps, of 300
EARLY, LATE = (20, 35), (40, SIXTH)  # what is called so in a sixth
OFF = 4.0  # the factor on the best rate at which a run counts as wrong: two octaves
# frozen before the first run of rate.yaml, from rate_fit.yaml and units.zip
BUMP = 0.02  # nats by which the loss at a sixth may rise from one rate to the next
TOO_LOW = 7.5  # share · gradient norm, late, above which a rate is called too low
FALL = 0.224  # nats: predicted fall of the loss in a step, early, above which a rate is called too high
GAIN = 0.078  # nats: fall of the training loss from early to late, below which it is, too
PAIR = ["schedule", "text", "optimizer"]
MEASURED = dict(share="trial", kl="trial_kl", agreement="agreement", grad="grad_norm", fall="slope")  # noqa: C408
Rule = Callable[[pd.DataFrame], int]  # one seed's runs of a pair by rising rate -> the place of one


def rows_of(study: ebc_lab.LoadedStudy, kind: str) -> pd.DataFrame:
    """One row a run of a study: what was MEASURED as medians over the early and the late steps, training
    losses as means, `v50` … validation losses on the fixed windows. A diverged run has its first loss."""
    specs, results, made = study.specs(), study.results(), []
    for name, of in study.steps().groupby("run_id"):
        run, result = specs[str(name)], results.get(str(name))
        if result is None or of.arm.iloc[0].partition("_")[0] not in study.config["carry"]["arms"]:
            continue  # unfinished, or of an arm that has been taken out
        row = {"kind": kind, "schedule": "long" if run["lr_schedule"].get("warmup_share") else "short"}
        row["text"] = next(t for t in study.config["carry"]["settings"] if f"_{t}_" in of.arm.iloc[0])
        row |= {"optimizer": run["optimizer"]["name"], "lr": run["optimizer"]["lr"], "seed": run["seed"]}
        row |= {"outcome": result["outcome"], "first": result["initial_loss"], "train_s": result["train_s"]}
        for loss in ("val", "test"):
            row[loss] = result["initial_loss" if row["outcome"] == "diverged" else f"{loss}_loss"]
        for when, (start, end) in (("early", EARLY), ("late", LATE)):
            part = of[(of.step >= start) & (of.step < end)]
            row |= {f"{what}_{when}": part[column].median() for what, column in MEASURED.items()}
            row[f"loss_{when}"] = part.loss.mean()
        made.append(row | {f"v{int(step)}": loss for step, loss, _ in result.get("curve") or []})
    return pd.DataFrame(made)


def rows_of_units(study: ebc_lab.LoadedStudy) -> pd.DataFrame:
    """The plain runs of units.zip of 300 steps or 900, their grids of half octaves taken apart into two of
    octaves, which count as halves of one pair."""
    specs, results, runs, made = study.specs(), study.results(), study.runs(), []
    for _, one in runs[runs.role == "lr"].iterrows():
        curve = {step: loss for step, loss, _ in results[one.run_id]["curve"]}
        steps = specs[one.run_id]["steps"]
        if steps >= 300:
            row = {"text": one.arm.removeprefix("lr_").rpartition("_")[0], "val": one.val_loss}
            row |= {key: one[key] for key in ("optimizer", "lr", "seed")}
            row |= {"test": one.test_loss, "v50": curve[steps / 6], "v100": curve[steps / 3]}
            made.append(row | {"v150": curve[steps / 2]})
    rows = pd.DataFrame(made)
    rows = rows[rows.groupby(["text", "lr"]).seed.transform("size") == rows.seed.nunique()]
    return rows.assign(schedule=rows.groupby("text").lr.rank(method="dense") % 2)


# -- H1: one rate of a grid ----------------------------------------------------------------------------------


def first_low(pair: pd.DataFrame, loss: str = "v50") -> int:
    """The frozen rule of H1: the lowest validation loss at a sixth among the rates before the first that lies
    more than BUMP above the lowest before it, or has diverged."""
    best = 0
    for i, value in enumerate(pair[loss]):
        if not value <= pair[loss].iloc[best] + BUMP:
            break
        best = i if value < pair[loss].iloc[best] else best
    return best


def lowest(pair: pd.DataFrame, loss: str = "v50") -> int:
    """The lowest validation loss of all rates."""
    return int(np.nanargmin(pair[loss]))


def nearest(pair: pd.DataFrame, name: str, to: float) -> int:
    """The rate at which what was measured is nearest to a constant, in logarithms."""
    off = np.abs(np.log(pair[name].clip(lower=1e-9) / to)).where(pair.v50.notna(), np.inf)
    return int(np.argmin(off))


RULES: dict[str, Rule] = {
    "FROZEN: first minimum from below, at a sixth": first_low,
    "lowest validation loss, at a sixth": lowest,
    "an octave below the lowest, at a sixth": lambda pair: max(0, lowest(pair) - 1),
    "critical share nearest to 5, at a sixth": lambda pair: nearest(pair, "share_late", 5),
    "KL nearest to 0.013, at a sixth": lambda pair: nearest(pair, "kl_late", 0.013),
    "first minimum from below, at a third": lambda pair: first_low(pair, "v100"),
    "lowest validation loss, at a third": lambda pair: lowest(pair, "v100"),
    "lowest validation loss, half way": lambda pair: lowest(pair, "v150"),
    "lowest validation loss, at the end": lambda pair: lowest(pair, "val"),
}


def regrets(rows: pd.DataFrame, rule: Rule) -> pd.Series:
    """Each pair's regret: the mean test loss at the rate that a seed's first sixth names, less the least such
    mean of the grid; the mean over those seeds."""
    found = {}
    for pair, of in rows.groupby(PAIR):
        whole = of.groupby("lr").test.mean()
        by_seed = [one.sort_values("lr") for _, one in of.groupby("seed")]
        found[pair] = np.mean([whole[one.lr.iloc[rule(one)]] - whole.min() for one in by_seed])
    return pd.Series(found, name="regret").rename_axis(PAIR)


def interval(values: pd.Series) -> str:
    """Mean and its 95% t-interval over the pairs."""
    mean, half = values.mean(), stats.t.ppf(0.975, len(values) - 1) * values.sem()
    return f"{mean:.4f} [{mean - half:+.4f}, {mean + half:+.4f}], worst {values.max():.3f}, n = {len(values)}"


# -- H2: one run by itself -----------------------------------------------------------------------------------


def prepared(rows: pd.DataFrame) -> pd.DataFrame:
    """With the flags, and how far each rate is from its pair's best (`off`, a factor)."""
    rows = rows.copy()
    rows["regret"] = rows.groupby([*PAIR, "lr"]).test.transform("mean")
    rows["regret"] -= rows.groupby(PAIR).regret.transform("min")
    rows["best"] = rows.regret == 0
    best = rows.lr.where(rows.best).groupby([rows[key] for key in PAIR]).transform("min")
    rows["off"] = (rows.lr / best).round(3)
    gone = rows.v50.isna()  # diverged before the sixth
    rows["low"] = ~gone & (rows.share_late * rows.grad_late > TOO_LOW)
    rows["high"] = gone | (-rows.fall_early > FALL) | (rows.loss_early - rows.loss_late < GAIN)
    rows["flag"] = rows.low | rows.high
    return rows


def wilson(flags: pd.Series) -> str:
    """How many of these runs are flagged, and their share's 95% interval by Wilson."""
    hits, of = int(flags.sum()), max(1, len(flags))
    low, high = stats.binomtest(hits, of).proportion_ci(method="wilson")
    return f"{hits} of {of}, {hits / of:.2f} [{low:.2f}, {high:.2f}]"


def tell(rows: pd.DataFrame) -> None:
    """Print every figure of some runs."""
    print(f"  {len(rows)} runs, {rows.outcome.value_counts().to_dict()}, {rows.train_s.sum() / 3600:.2f} h")
    best, wrong = rows[rows.best], rows[rows.off.isin([OFF, 1 / OFF])]
    print(best.groupby(PAIR).agg(lr=("lr", "first"), test=("test", "mean")).round(4).to_string())
    for name, rule in RULES.items():
        print(f"  H1 {name:46}{interval(regrets(rows, rule))}")
    for key in PAIR[1:]:
        print(f"    frozen, by {key}: {regrets(rows, first_low).groupby(key).mean().round(4).to_dict()}")
    print(f"  H2 flagged at the best rate {wilson(best.flag)}, low {best.low.sum()}, high {best.high.sum()}")
    print(f"     an octave off            {wilson(rows[rows.off.isin([2, 0.5])].flag)}")
    print(f"     two octaves off          {wilson(wrong.flag)}")
    print(f"       below, as too low      {wilson(wrong[wrong.off < 1].low)}")
    print(f"       above, as too high     {wilson(wrong[wrong.off > 1].high)}")
    print(f"       that lose ≥ 0.05 nats  {wilson(wrong[wrong.regret >= 0.05].flag)}")
    for key in PAIR[1:]:
        for name, of in rows.groupby(key):
            off = of[of.off.isin([OFF, 1 / OFF])]
            print(f"       {name!s:12} off {wilson(off.flag):28} best {wilson(of[of.best].flag)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="What a first sixth tells of a learning rate.")
    parser.add_argument("of", type=Path, nargs="+", help="studies, fitted one first; or what --write kept")
    parser.add_argument("--write", type=Path, help="keep a row a run here, as CSV")
    options = parser.parse_args()
    if options.of[0].name == "units.zip":
        rows = rows_of_units(ebc_lab.load(options.of[0]))
        for name, rule in RULES.items():
            if "share" not in name and "KL" not in name:
                print(f"{name:46}{interval(regrets(rows, rule).groupby('text').mean())}")
        return
    if options.write:
        rows = pd.concat(rows_of(ebc_lab.load(at), "test" if i else "fit") for i, at in enumerate(options.of))
        rows.to_csv(
            options.write, index=False, float_format="%.6g", compression={"method": "gzip", "mtime": 0}
        )
    rows = prepared(pd.read_csv(options.write or options.of[0]))
    for (kind, schedule), part in rows.groupby(["kind", "schedule"]):
        print(f"\n{kind}, {schedule} warm-up")
        tell(part)


if __name__ == "__main__":
    main()
