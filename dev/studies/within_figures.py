"""The figures of findings.md's "Does one constant carry within one optimizer?": each unit against the rate.

    python dev/studies/within_figures.py docs/evidence/within_adam.zip docs/evidence/function_space_adam.zip

Reads finished studies of docs/evidence/within.yaml and function_space.yaml, of one optimizer. Prints the mean
test loss of every unit at every size, and each unit minus the learning rate: at every size, and the mean of
the four, paired by seed, with a 95% t-interval alone and corrected for the units compared (Bonferroni).
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd
from scipy import stats

import ebc_lab

SIZES = ("width", "batch", "steps", "all")
REFERENCE = "lr"
PRIMARY = "kl"


def losses_of(paths: list[str]) -> pd.DataFrame:
    """Return test losses by seed, a column an arm; names those that did not complete."""
    parts = []
    for path in paths:
        runs = ebc_lab.load(path).runs()
        parts.append(runs[(runs.stage == "ablation") & (runs.kind == "train")])
    runs = pd.concat(parts).drop_duplicates("run_id")
    lost = runs[runs.outcome != "completed"]
    if len(lost):
        print(f"not completed: {', '.join(lost.arm + ' seed ' + lost.seed.astype(str))}")
    return runs.pivot_table(index="seed", columns="arm", values="test_loss")


def interval(differences: np.ndarray, comparisons: int = 1) -> str:
    """Write the mean of differences, (seeds,), with a 95% interval for `comparisons` at once."""
    mean = differences.mean()
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    wide = stats.t.ppf(1 - 0.025 / comparisons, len(differences) - 1) * error
    return f"{mean:+.4f} [{mean - wide:+.4f}, {mean + wide:+.4f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("studies", nargs="+", help="finished studies of one optimizer, or their bundles")
    losses = losses_of(parser.parse_args().studies)
    units = [name.removesuffix("_width") for name in losses if name.endswith("_width")]
    others = sorted(set(units) - {REFERENCE}, key=lambda unit: (unit != PRIMARY, unit))
    for unit in [REFERENCE, *others]:
        at = [f"{size} {losses[f'{unit}_{size}'].mean():.4f}" for size in SIZES]
        own = f"tuned {losses[unit].mean():.4f}, " if unit in losses else ""
        print(f"{unit:10} {own}{', '.join(at)}")
    for unit in others:
        each = {size: (losses[f"{unit}_{size}"] - losses[f"{REFERENCE}_{size}"]).dropna() for size in SIZES}
        mean = pd.concat(each, axis=1).dropna().mean(axis=1).to_numpy()
        alone = interval(mean)
        print(f"{unit} − {REFERENCE}, mean of the four, {len(mean)} seeds: {alone} alone", end="")
        print(f", corrected for {len(others)}: {interval(mean, len(others))}")
        for size, of in each.items():
            print(f"    {size:6} {interval(of.to_numpy())}")


if __name__ == "__main__":
    main()
