"""The lab's own studies, as folders or bundles: the runs of their finals or suite, over the same seeds."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ebc_lab.config.errors import count, require
from ebc_lab.records.files import NO_SOUND_ZIP

from ..asked import Asked
from .reader import Source

if TYPE_CHECKING:
    from ebc_lab.results import LoadedStudy

HEADER = "study.json"
OVER_SEEDS = ("ablation", "finals")  # stages that compare arms; of others the last that trained is read
SETTINGS = ("optimizer", "projection", "stabilizer", "lr", "lr_schedule", "warmup_steps", "delta_star")


TITLE = "studies of ebc-lab"


def claims(path: Path) -> bool:
    if path.is_dir():
        return (path / HEADER).is_file()
    try:
        with zipfile.ZipFile(path) as bundle:
            return any(name.rpartition("/")[2] == HEADER for name in bundle.namelist())
    except NO_SOUND_ZIP:
        return False


def read(path: Path, asked: Asked) -> Source:
    """Return a row an evaluation; the last of a run holds its final validation and test loss."""
    from ebc_lab.results import load  # 0.1 s that other formats do not need

    study = load(path)
    with study.blame_files():
        every = study.runs()
    trained = every[every.kind == "train"]
    require(len(trained) > 0, f"the study in {path} has trained nothing yet.")
    stages = list(trained.stage.unique())
    stage = next((stage for stage in OVER_SEEDS if stage in stages), stages[-1])
    of_stage = trained[trained.stage == stage]
    runs = of_stage[of_stage.outcome.notna()]
    require(len(runs) > 0, f"no run of the stage {stage} in {path} has ended.")
    notes = [
        "What ebc-lab says itself of this study, its tuning counted, is on the study's own page.",
        f"Only the stage {stage} was read; {len(trained) - len(of_stage)} runs of other stages were not.",
    ]
    if begun := len(of_stage) - len(runs):
        notes.append(f"{begun} runs of the stage have not ended and were left out.")
    table = _rows(study, runs)
    if table.test_loss.isna().all():
        table = table.drop(columns="test_loss")
    settings = [name for name in SETTINGS if table[name].nunique(dropna=False) > 1]
    roles = {"run": "run", "arm": "arm", "seed": "seed", "step": "step", "planned": "planned"}
    what = f"{count(len(runs), 'run')} of the study {study.name}"
    return Source(table, what, roles, settings, "lower", notes)


def _rows(study: LoadedStudy, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the evaluations of these runs, the last with what a run ended with: `inf` where it diverged."""
    runs = runs.astype(dict.fromkeys(("run_id", "arm", "track"), object))
    ends = runs[["run_id", "steps", "val_loss", "test_loss"]].rename(columns={"steps": "step"})
    lost = runs.outcome != "completed"
    for name in ("val_loss", "test_loss"):
        ends[name] = ends[name].astype("float64").mask(lost, np.inf)
    before = study.evals()[["run_id", "step", "val_loss"]].astype({"run_id": object})
    before = before[before.step < before.run_id.map(ends.set_index("run_id").step)]
    table = pd.concat([before, ends], ignore_index=True)
    table["val_loss"] = table.val_loss.where(np.isfinite(table.val_loss), np.inf)
    about = runs[["run_id", "arm", "seed", *SETTINGS]].assign(planned=runs.planned_steps.astype("float64"))
    tracks = runs.groupby("arm").track.nunique()
    about["arm"] = runs.arm.mask(runs.arm.map(tracks) > 1, runs.track + ": " + runs.arm)
    order = table.run_id.map({run: place for place, run in enumerate(runs.run_id)})
    table = table.iloc[np.lexsort((table.step, order))]
    whole = about.merge(table, on="run_id", how="right").rename(columns={"run_id": "run"})
    return whole.astype({"seed": "string", "step": "float64"})
