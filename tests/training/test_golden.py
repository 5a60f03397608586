"""Seeded runs whose losses are in the repository: whoever changes a run's numbers sees it in a diff.

`python tests/training/test_golden.py` records golden_run.json again.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.records.streams import read_columns
from ebc_lab.training.outcome import run_and_record

RECORDED_WITH = "2.13.0"  # torch
GOLDEN = Path(__file__).with_name("golden_run.json")
TEXT = "".join(f"{n} sheep and {n * n % 97} goats, {n % 7} dogs; " for n in range(400))
SHAPE = [
    *("scale=smoke", "data=path", "device=cpu", "dtype=float32", "threads_per_run=1", "compile=off"),
    *("model.blocks=2", "model.width=16", "model.context=16", "batch_size=6", "steps=20"),
    *("audit_every=5", "eval_every=10", "eval_windows=8"),
]
RUNS = {
    "plain": ["optimizer.lr=2e-2", "stabilizer=none"],
    "shadow": [
        *("optimizer.lr=4e-2", "stabilizer=ebc", "budget=shadow", "budget.target_kl=0.01"),
        "budget.stretch=null",  # as it was before there was one
    ],
    "muon, surrogate": ["optimizer=muon", "optimizer.lr=4e-2", "stabilizer=ebc", "budget=surrogate"],
    "energy-based": ["workload=ebm", "optimizer.lr=4e-3", "stabilizer=none"],
}
# Muon orthogonalises in bfloat16, which a CPU with AMX multiplies in another order
TOLERANCE = {"plain": 1e-5, "shadow": 1e-5, "muon, surrogate": 5e-3, "energy-based": 1e-4}
COLUMNS = ("loss", "c", "grad_norm", "applied_kl")


def trained(overrides: list[str], folder: Path) -> tuple[str, dict[str, list[float | None]]]:
    """A run's identity; the figures of every step, None where nothing was measured, and its final losses."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    data = [f"data.file={text}", f"data.sha256={hashlib.sha256(TEXT.encode()).hexdigest()}"]
    run = run_part(compose([*SHAPE, *data, *overrides], study=False))
    result = run_and_record(run, folder / "run", "golden")
    steps = read_columns(folder / "run" / "steps.csv")
    found = {name: [None if np.isnan(x) else float(x) for x in steps[name]] for name in COLUMNS}
    found["final"] = [result["val_loss"], result["test_loss"]]
    # of the energy-based model: how well it denoises, on noise that is the same at every evaluation
    evals = read_columns(folder / "run" / "evals.csv")
    denoised = {n: [float(x) for x in evals[n]] for n in ("r2_0p2", "r2_0p5") if n in evals}
    return result["identity"], found | denoised


@pytest.mark.parametrize("name", RUNS)
def test_a_recorded_run_has_the_losses_of_then(name, tmp_path):
    # its bits depend on the machine's kernels; where it was recorded, the figures are equal to the last digit
    identity, found = trained(RUNS[name], tmp_path)
    recorded_identity, golden = json.loads(GOLDEN.read_text())[name]
    if torch.__version__.partition("+")[0] == RECORDED_WITH:  # which is in the identity
        assert identity == recorded_identity
    assert found.keys() == golden.keys()
    for figure, values in golden.items():
        assert [v is None for v in found[figure]] == [v is None for v in values]
        measured = [v for v in found[figure] if v is not None]
        assert measured == pytest.approx([v for v in values if v is not None], rel=TOLERANCE[name]), figure
    assert min(golden["c"]) < 1 or "stabilizer=none" in RUNS[name]


if __name__ == "__main__":
    found = {}
    for name, overrides in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = trained(overrides, Path(folder))
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
