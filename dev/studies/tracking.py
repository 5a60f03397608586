"""How well `shadow` and `tracked` hold the KL: the share of clipped steps within ±30% of the target.

    python dev/studies/tracking.py [budget.measure_every=2 …] [--paper] [--seeds 100 …] [--keep FOLDER]

Trains Adam at 8e-3 with a target of 0.015 and Muon at 0.032 with 0.02, at a constant rate, on a target that
holds and then decays, and audits every step from the 20th on with tokens that did not choose c. `--paper` is
64 sequences of 256 tokens instead of 16 of 64, for 100 steps. Settings of the lab, if any, come first.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.ebc.options import CLIPPED_BELOW
from ebc_lab.records.streams import read_columns
from ebc_lab.training.run import Training
from ebc_lab.workloads.corpus import locate

OPTIMIZERS = {
    "adam": ["optimizer=adam", "optimizer.lr=8e-3", "budget.target_kl=0.015"],
    "muon": ["optimizer=muon", "optimizer.lr=0.032", "budget.target_kl=0.02"],
}
COMMON = [
    *("scale=laptop", "data=shakespeare", "device=cpu", "dtype=bfloat16", "threads_per_run=1", "compile=off"),
    *("stabilizer=ebc", "budget.schedule=hold_decay", "audit_every=1", "evaluate=[val]"),
]
LAPTOP = ["steps=300", "eval_every=300", "audit_tokens=768"]
PAPER = ["batch_size=64", "model.context=256", "steps=100", "eval_every=100", "audit_tokens=2048"]
FIRST = 20  # the first step that counts


def held(overrides: list[str], folder: Path) -> tuple[float, float, int]:
    """One run -> its share of clipped steps within ±30%, its median c, and how many steps were clipped."""
    run = run_part(compose([*COMMON, *overrides], study=False))
    run = replace(run, data=replace(run.data, sha256=locate(run.data).sha256))
    folder.mkdir(parents=True)
    training = Training(run, folder)
    training.advance(run.steps)
    training.recording.close()
    steps = read_columns(folder / "steps.csv")
    counted = (steps["step"] >= FIRST) & (steps["c"] < CLIPPED_BELOW) & ~np.isnan(steps["applied_kl"])
    ratio = (steps["applied_kl"] / steps["target_kl"])[counted]
    c = float(np.median(steps["c"][steps["step"] >= FIRST]))
    return float(np.mean(np.abs(ratio - 1) <= 0.3)), c, int(counted.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description="Shares of clipped steps within ±30% of the target KL.")
    parser.add_argument("settings", nargs="*", help="settings of the lab, name=value")
    parser.add_argument("--paper", action="store_true", help="64 sequences of 256 tokens, 100 steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4], help="that choose c")
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--budgets", nargs="+", default=["shadow", "tracked"])
    parser.add_argument("--keep", type=Path, help="a new folder for every step of every run")
    options = parser.parse_args()
    shape = PAPER if options.paper else LAPTOP
    print("optimizer  sequences  budget    within ±30% of the target, by seed   (median c; clipped steps)")
    with tempfile.TemporaryDirectory() as scratch:
        root = options.keep or Path(scratch)
        for optimizer in options.optimizers:
            for k in options.sequences:
                for budget in options.budgets:
                    chosen = [*OPTIMIZERS[optimizer], f"budget={budget}", f"budget.probe_sequences={k}"]
                    found = [
                        held(
                            [*shape, *chosen, f"seed={seed}", *options.settings],
                            root / f"{optimizer}_{k}_{budget}_{seed}",
                        )
                        for seed in options.seeds
                    ]
                    shares = "  ".join(f"{100 * share:4.1f}%" for share, _, _ in found)
                    c, clipped = np.median([f[1] for f in found]), sum(f[2] for f in found)
                    print(f"{optimizer:9}  {k:9}  {budget:8}  {shares}   ({c:.2f}; {clipped})", flush=True)


if __name__ == "__main__":
    main()
