"""What exact training costs in accuracy: python dev/studies/verity_figures.py [OVERRIDES…]

Gradients of the first step beside float64, and validation losses over three seeds beside plain Adam's from
the same initial weights and batches, with the noise of replicate seeds. About ten minutes at the usual scale.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from ebc_lab.config.choices import changed
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.config.schema import RunConfig
from ebc_lab.training.run import Training
from ebc_lab.verity import VerityGPT, ops
from ebc_lab.verity.__main__ import plain_logits
from ebc_lab.workloads.gpt import build_exact
from ebc_lab.workloads.starts import pinned
from ebc_lab.workloads.text import checked_text

SETTINGS = (
    *("scale=laptop", "steps=150", "dtype=float32", "threads_per_run=1", "compile=off", "device=cpu"),
    *("lr_schedule=warmup_linear", "stabilizer=none"),
)
SEEDS = (0, 1, 2)


def initial(run: RunConfig, vocabulary: int) -> VerityGPT:
    return build_exact(run.model, vocabulary, run.seed)


def gradients(model: VerityGPT) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def gradient_errors(training: Training) -> None:
    """Relative error of each tensor's gradient at the first batch: exact layers, and plain float32."""
    x, y = training.batches.at(0)
    run, vocabulary = training.run_config, training.workload.vocabulary
    wide, plain, exact = initial(run, vocabulary).double(), initial(run, vocabulary), initial(run, vocabulary)
    for model in (wide, plain):
        F.cross_entropy(plain_logits(model, x).flatten(0, 1), y.flatten(), reduction="sum").backward()
    ops.cross_entropy(exact(x), y).backward()
    for name, model in (("exact", exact), ("plain float32", plain)):
        pairs = zip(gradients(model), gradients(wide), strict=True)
        errors = [float((g - h).norm() / h.norm()) for g, h in pairs]
        told = f"{min(errors):.1e} to {max(errors):.1e}"
        print(f"gradients, {name}: relative error per tensor against float64 {told}", flush=True)


def losses(run: RunConfig, folder: Path) -> dict[str, float]:
    """The validation loss of a run under each mode, from the same initial weights."""
    found = {}
    for mode in ("none", "verity"):
        own = folder / f"{mode}{run.seed}"
        own.mkdir()
        training = Training(changed(run, {"determinism": {"name": mode}}), own)
        if run.seed == SEEDS[0] and mode == "none":
            gradient_errors(training)
        training.model.load_state_dict(initial(run, training.workload.vocabulary).state_dict())
        found[mode] = training.run()["val_loss"]
    return found


def main(overrides: Sequence[str]) -> None:
    run = run_part(compose([*SETTINGS, *overrides], study=False))
    run = pinned(run, *checked_text(run))
    differences, plain = [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            found = losses(replace(run, seed=seed), Path(folder))
            differences.append(found["verity"] - found["none"])
            plain.append(found["none"])
            print(
                f"seed {seed}: validation loss {found['none']:.4f} plain, {found['verity']:.4f} exact",
                flush=True,
            )
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    print(f"exact minus plain: {mean:+.1e} nats, standard deviation {spread:.1e}")
    print(f"standard deviation of plain runs of {len(SEEDS)} seeds: {statistics.stdev(plain):.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
