"""Job folders as Hydra writes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.runs_of_others import written

from ebc_lab.config.errors import UserError
from ebc_lab.judging.asked import Asked
from ebc_lab.judging.readers import hydra, read

APP = """
import csv, hydra
from hydra.core.hydra_config import HydraConfig
from pathlib import Path

@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config):
    with (Path(HydraConfig.get().runtime.output_dir) / "metrics.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerows([("step", "val_loss"), (1, 3.0), (2, config.optimizer.lr + config.seed)])

main()
"""


def job(folder: Path, overrides: list[str], config: str, metrics: str = "step,val_loss\n1,3\n2,2\n") -> None:
    written(folder / ".hydra" / "overrides.yaml", "".join(f"- {each}\n" for each in overrides))
    written(folder / ".hydra" / "config.yaml", config)
    if metrics:
        written(folder / "metrics.csv", metrics)


def test_what_one_job_overrides_is_read_from_the_configuration_of_the_others(tmp_path: Path) -> None:
    sweep = tmp_path / "multirun" / "2024-05-01" / "10-11-12"
    job(sweep / "0", ["optimizer=muon", "seed=1"], "optimizer: {name: muon, lr: 0.02}\nseed: 1\n")
    job(sweep / "1", ["optimizer=adam", "optimizer.lr=0.5"], "optimizer: {name: adam, lr: 0.5}\nseed: 7\n")
    job(sweep / "2", ["optimizer=adam"], "optimizer: {name: adam, lr: 0.1}\nseed: 7\n", metrics="")
    (source,) = read([tmp_path], Asked())
    rows = source.frame.drop_duplicates("run")
    assert list(rows.optimizer) == ["muon", "adam"]
    assert list(rows["optimizer.lr"]) == [0.02, 0.5]
    assert list(rows.seed) == [1, 7]
    assert list(rows.started) == ["2024-05-01 10:11:12"] * 2
    assert source.roles == {"run": "run", "seed": "seed", "started": "started"}
    assert list(source.settings) == ["optimizer", "optimizer.lr"]
    assert any("left no metrics" in note for note in source.notes)


def test_one_job_alone_is_a_run(tmp_path: Path) -> None:
    job(tmp_path / "0", ["optimizer=muon"], "optimizer: {name: muon}\nseed: 1\n")
    source = hydra.read(tmp_path / "0", Asked())
    assert source.frame.val_loss.tolist() == [3, 2]
    assert source.frame.run.nunique() == 1


def test_no_metrics_in_any_job(tmp_path: Path) -> None:
    job(tmp_path / "0", ["seed=1"], "seed: 1\n", metrics="")
    with pytest.raises(UserError, match="job folders of Hydra"):
        read([tmp_path], Asked())


@pytest.mark.thorough
def test_a_sweep_that_hydra_ran(tmp_path: Path) -> None:
    for name in ("adam", "muon"):
        written(tmp_path / "conf" / "optimizer" / f"{name}.yaml", f"name: {name}\nlr: {len(name) / 8}\n")
    (tmp_path / "conf" / "config.yaml").write_text("defaults: [optimizer: adam, _self_]\nseed: 0\n")
    (tmp_path / "app.py").write_text(APP)
    command = [sys.executable, "app.py", "-m", "optimizer=adam,muon", "seed=1,2", "hydra.sweep.dir=sweep"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (source,) = read([tmp_path / "sweep"], Asked())
    last = source.frame[source.frame.step == 2]
    assert list(last.val_loss) == [1.5, 2.5, 1.5, 2.5]
    assert list(last.optimizer) == ["adam", "adam", "muon", "muon"]
    assert list(last.seed) == [1, 2, 1, 2]
