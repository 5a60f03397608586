"""Can a wrong learning rate be told from the first sixth of a run? The figures of docs/evidence/rate.yaml.

    python dev/studies/rate_figures.py --write docs/evidence/rate_runs.csv.gz FIT_STUDY TEST_STUDY ...
    python dev/studies/rate_figures.py docs/evidence/rate_runs.csv.gz

`--write` keeps of finished studies one row a run: its losses, and what `Probe` measured in its first sixth.
Prints the frozen rules and their rivals on the runs that they were fitted on, then on the others.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

import ebc_lab

SIXTH = 50  # steps, of 300
LATE = 40  # what is called late in a sixth: from this step on
OFF = 4.0  # the factor on the best rate at which a run counts as wrong: two octaves
# frozen before the first run of rate.yaml, from rate_fit.yaml and units.zip
BUMP = 0.02  # nats by which the loss at a sixth may rise from one rate to the next
TOO_LOW = 7.5  # share · gradient norm, late, above which a rate is called too low
FALL = 0.224  # nats: predicted fall of the loss in a step, early, above which a rate is called too high
GAIN = 0.078  # nats: fall of the training loss from early to late, below which it is, too
PAIR = ["schedule", "text", "optimizer"]
MEASURED = {
    "share": "trial",
    "kl": "trial_kl",
    "agreement": "agreement",
    "grad": "grad_norm",
    "fall": "slope",
}


def rows_of(study: ebc_lab.LoadedStudy, kind: str) -> pd.DataFrame:
    """One row a run of a study: what was MEASURED as medians over the steps from 20 to 34
    (`early`) and from 40 to 49 (`late`), training losses as means, `v50` … validation losses on the fixed
    windows."""
    specs, results = study.specs(), study.results()
    steps, made = study.steps(), []
    for name, of in steps.groupby("run_id"):
        run, result = specs[name], results[name]
        seen = of[of.step < SIXTH]
        late = seen[seen.step >= LATE]
        starts = [text for text in study.config["carry"]["settings"] if f"_{text}_" in of.arm.iloc[0]]
        row = {
            "kind": kind,
            "schedule": "long" if run["lr_schedule"].get("warmup_share") else "short",
            "text": starts[0],
            "optimizer": run["optimizer"]["name"],
            "lr": run["optimizer"]["lr"],
            "seed": run["seed"],
            "outcome": result["outcome"],
            "first": result["initial_loss"],
            "val": result["val_loss"],
            "test": result["test_loss"],
        }
        for when, part in (("early", seen[(seen.step >= 20) & (seen.step < 35)]), ("late", late)):
            row |= {f"{name}_{when}": part[column].median() for name, column in MEASURED.items()}
            row |= {f"loss_{when}": part.loss.mean(), f"noise_{when}": part.loss.std()}
        row |= {f"v{int(step)}": loss for step, loss, _ in result.get("curve") or []}
        made.append(row)
    rows = pd.DataFrame(made)
    diverged = rows.outcome == "diverged"
    for loss in ("val", "test"):  # a diverged run counts with the loss of its first step
        rows.loc[diverged, loss] = rows.loc[diverged, "first"]
    return rows


# -- H1: one rate of a grid ----------------------------------------------------------------------------------


def first_low(pair: pd.DataFrame, loss: str = "v50") -> int:
    """The frozen rule of H1, on one seed's runs by rising rate: the lowest validation loss at a sixth among
    the rates before the first that lies more than BUMP above the lowest before it, or has diverged."""
    best = 0
    for i, value in enumerate(pair[loss]):
        if not value <= pair[loss].iloc[best] + BUMP:
            break
        best = i if value < pair[loss].iloc[best] else best
    return best


def lowest(pair: pd.DataFrame, loss: str = "v50") -> int:
    """The lowest validation loss of all rates."""
    return int(np.nanargmin(pair[loss]))


Rule = Callable[[pd.DataFrame], int]
RULES: dict[str, Rule] = {
    "FROZEN: first minimum from below, at a sixth": first_low,
    "lowest validation loss, at a sixth": lowest,
    "an octave below the lowest, at a sixth": lambda pair: max(0, lowest(pair) - 1),
    "critical share nearest to 5": lambda pair: nearest(pair, "share_late", 5),
    "KL nearest to 0.013": lambda pair: nearest(pair, "kl_late", 0.013),
    "first minimum from below, at a third": lambda pair: first_low(pair, "v100"),
    "lowest validation loss, at a third": lambda pair: lowest(pair, "v100"),
    "lowest validation loss, at the end": lambda pair: lowest(pair, "val"),
}


def nearest(pair: pd.DataFrame, name: str, to: float) -> int:
    """The rate at which what was measured is nearest to a constant, in logarithms."""
    off = np.abs(np.log(pair[name].clip(lower=1e-9) / to)).where(pair.v50.notna(), np.inf)
    return int(np.argmin(off))


def regrets(rows: pd.DataFrame, rule: Rule) -> pd.Series:
    """Each pair's regret: the mean test loss over the seeds at the rate that each seed's first sixth names,
    less the least such mean of the grid; the mean over those seeds."""
    found = {}
    for pair, of in rows.groupby(PAIR):
        whole = of.groupby("lr").test.mean()
        by_seed = [one.sort_values("lr") for _, one in of.groupby("seed")]
        found[pair] = np.mean([whole[one.lr.iloc[rule(one)]] - whole.min() for one in by_seed])
    return pd.Series(found, name="regret").rename_axis(PAIR)


def interval(values: pd.Series) -> str:
    """Mean and its 95% t-interval over the pairs."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    mean = values.mean()
    return f"{mean:.4f} [{mean - half:+.4f}, {mean + half:+.4f}], worst {values.max():.3f}, n = {len(values)}"


# -- H2: one run by itself -----------------------------------------------------------------------------------


def prepared(rows: pd.DataFrame) -> pd.DataFrame:
    """With what the flags read, and how far each rate is from its pair's best (`off`, a factor)."""
    rows = rows.copy()
    rows["short_of"] = rows.share_late * rows.grad_late
    rows["gain"] = rows.loss_early - rows.loss_late
    means = rows.groupby([*PAIR, "lr"]).test.transform("mean")
    rows["regret"] = means - means.groupby([rows[key] for key in PAIR]).transform("min")
    rows["best"] = rows.regret == 0
    at = rows[rows.best].groupby(PAIR).lr.first()
    rows["off"] = (rows.lr / rows.set_index(PAIR).index.map(at).to_numpy()).round(3)
    gone = rows.v50.isna()  # diverged before the sixth
    rows["low"] = ~gone & (rows.short_of > TOO_LOW)
    rows["high"] = gone | (-rows.fall_early > FALL) | (rows.gain < GAIN)
    rows["flag"] = rows.low | rows.high
    return rows


def wilson(flags: pd.Series) -> str:
    """How many of these runs are flagged, and their share's 95% interval by Wilson."""
    hits, of = int(flags.sum()), len(flags)
    if not of:
        return "none"
    low, high = stats.binomtest(hits, of).proportion_ci(method="wilson")
    return f"{hits} of {of}, {hits / of:.2f} [{low:.2f}, {high:.2f}]"


def tell(rows: pd.DataFrame) -> None:
    """Print every figure of some runs."""
    print(f"  {len(rows)} runs, {rows.outcome.value_counts().to_dict()}; best rates:")
    print(rows[rows.best].groupby(PAIR).agg(lr=("lr", "first"), test=("test", "mean")).round(4).to_string())
    print("  H1, regret in nats of test loss")
    for name, rule in RULES.items():
        print(f"    {name:46}{interval(regrets(rows, rule))}")
    found = regrets(rows, first_low)
    for key in PAIR[1:]:
        print(f"    frozen, by {key}: {found.groupby(key).mean().round(4).to_dict()}")
    wrong = rows[rows.off.isin([OFF, 1 / OFF])]
    print("  H2, flagged runs")
    print(f"    at the best rate          {wilson(rows[rows.best].flag)}")
    print(f"    an octave off             {wilson(rows[rows.off.isin([2, 0.5])].flag)}")
    print(f"    two octaves off           {wilson(wrong.flag)}")
    print(f"      below, as too low       {wilson(wrong[wrong.off < 1].low)}")
    print(f"      above, as too high      {wilson(wrong[wrong.off > 1].high)}")
    print(f"      that lose ≥ 0.05 nats   {wilson(wrong[wrong.regret >= 0.05].flag)}")
    for key in PAIR[1:]:
        for name, of in rows.groupby(key):
            off = of[of.off.isin([OFF, 1 / OFF])]
            print(f"      {name:22}  off {wilson(off.flag):30} best {wilson(of[of.best].flag)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="What a first sixth tells of a learning rate.")
    parser.add_argument("of", type=Path, nargs="+", help="studies, fitted one first; or what --write kept")
    parser.add_argument("--write", type=Path, help="keep a row a run here, as CSV")
    options = parser.parse_args()
    if options.write:
        kinds = ["fit"] + ["test"] * (len(options.of) - 1)
        rows = pd.concat(
            [rows_of(ebc_lab.load(at), kind) for at, kind in zip(options.of, kinds, strict=True)]
        )
        packed = {"method": "gzip", "mtime": 0}
        rows.to_csv(options.write, index=False, float_format="%.6g", compression=packed)
    else:
        rows = pd.read_csv(options.of[0])
    for (kind, schedule), part in prepared(rows).groupby(["kind", "schedule"]):
        print(f"\n{kind}, {schedule} warm-up")
        tell(part)


if __name__ == "__main__":
    main()
