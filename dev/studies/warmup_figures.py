"""The figures of findings.md's "EBC in place of a warm-up": each arm against a tuned warm-up, and its spread.

    python dev/studies/warmup_figures.py docs/evidence/warmup_adam.zip

Prints for every arm of a finished study of docs/evidence/warmup.yaml: what it was tuned to, mean and standard
deviation of the test loss over the seeds, the difference from the reference as the study judges it, and the
ratio of the two standard deviations with its 95% limits (Pitman 1939 and Morgan 1939, for paired samples).
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import pandas as pd
from scipy import stats

import ebc_lab


def ratio_of_spreads(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Return sd(a)/sd(b) of paired samples, (n,) each, with its 95% limits."""
    n = len(a)
    ratio = float(np.std(a, ddof=1) / np.std(b, ddof=1))
    r = float(np.corrcoef(a, b)[0, 1])
    t = float(stats.t.ppf(0.975, n - 2))
    k = 1 + 2 * t**2 * (1 - r**2) / (n - 2)  # limits of the ratio of variances: its estimate times k ± root
    root = math.sqrt(k**2 - 1)
    return ratio, ratio * math.sqrt(k - root), ratio * math.sqrt(k + root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("study", help="a finished study, or its bundle")
    study = ebc_lab.load(parser.parse_args().study)
    track = next(iter(study.decisions["ablation"]["tracks"].values()))
    reference = study.config["ablation"]["reference"]
    test_loss = study.runs().set_index("run_id").test_loss
    losses = pd.DataFrame(  # two arms that were tuned to the same point share their runs
        {
            name: {seed: test_loss[run] for seed, run in arm["runs"].items()}
            for name, arm in track["arms"].items()
        }
    )
    for arm in losses:
        of_arm = losses[arm].dropna()
        tuned = ", ".join(f"{key} {value:g}" for key, value in track["arms"][arm]["point"].items())
        print(f"{arm:14} {tuned}; {len(of_arm)} seeds, ", end="")
        print(f"{of_arm.mean():.4f} ± {of_arm.std():.4f}", end="")
        if arm == reference:
            print()
            continue
        d = track["arms"][arm]["difference"]
        print(f"; difference {d['mean']:+.4f}, alone [{d['low']:+.4f}, {d['high']:+.4f}], ", end="")
        print(f"joint over {d['comparisons']} [{d['joint_low']:+.4f}, {d['joint_high']:+.4f}]", end="")
        both = losses[[arm, reference]].dropna().to_numpy()
        ratio, low, high = ratio_of_spreads(both[:, 0], both[:, 1])
        print(f"; spread × {ratio:.2f} [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()
