import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from support.called import called
from support.drivers import without_timing

from ebc_lab.components import optimizer as optimizers
from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.records.columns import COLUMNS, STEP_COLUMNS
from ebc_lab.records.streams import read_columns
from ebc_lab.report.conclude import concluding, write_table
from ebc_lab.study.autopilot import Listener, autopilot
from ebc_lab.study.guards import Limits, StageFailed
from ebc_lab.study.inspect.status import status
from ebc_lab.study.store.study import Study
from ebc_lab.training import run as run_module


def test_a_study_leaves_every_file_it_promises(finished):
    config, outcome, _ = finished
    root = outcome.study.root
    decisions = json.loads((root / "auto_decisions.json").read_text())
    assert list(decisions) == config.study.stages
    names = {p.name for p in root.iterdir() if not p.name.startswith(".")}
    expected = {"study.json", "auto_decisions.json", "results_final.json", "acceptance.json", "manifest.json"}
    expected |= {"runs", "report.html"}
    expected |= {f"summary_{s}.csv" for s in ("lr_sweep", "calibrate", "lr_scale", "final")}
    expected |= {f"{name}.png" for name in ("lr_sweep", "calibrate", "lr_scale", "curves", "steps")}
    expected |= {"figure.pdf"}
    assert expected <= names
    for run in (root / "runs").iterdir():
        kept = {p.name for p in run.iterdir() if not p.name.startswith(".")}
        assert {"spec.json", "result.json"} <= kept
        assert "progress.json" not in kept
        if not run.name.startswith("overhead"):
            assert {"steps.csv", "evals.csv", "log.txt"} <= kept
            assert set(STEP_COLUMNS) <= set(read_columns(run / "steps.csv"))


def test_the_summary_has_one_row_a_run_with_its_figures(finished):
    config, outcome, _ = finished
    table = pd.read_csv(outcome.study.root / "summary_final.csv")
    assert list(table.columns) == list(COLUMNS)
    assert set(table.outcome) == {"completed"}
    assert sorted(set(table.seed)) == config.seeds
    assert not table.duplicated(["arm", "seed"]).any()
    assert not table.run_id.duplicated().any()
    always = ["val_loss", "val_se", "test_loss", "test_se", "heldout_loss", "test_bits_per_char"]
    assert table[[*always, "test_accuracy", "c_median"]].notna().all().all()
    assert np.allclose(table.test_bits_per_char, table.test_loss / np.log(2))
    between = np.minimum(table.val_loss, table.test_loss) <= table.heldout_loss
    assert (between & (table.heldout_loss <= np.maximum(table.val_loss, table.test_loss))).all()
    plain = table[table.stabilizer == "none"]
    ebc = table[table.stabilizer == "ebc"]
    assert (plain.clip_rate == 0).all()
    assert plain.delta_star.isna().all()
    assert (ebc.budget == "tracked").all()
    assert ebc.overhead_pct.notna().all()
    sweep = pd.read_csv(outcome.study.root / "summary_lr_sweep.csv")
    assert sweep.test_loss.isna().all()  # val decides


@pytest.mark.thorough
def test_the_second_call_trains_nothing_and_changes_no_byte(own_copy, monkeypatch):
    config, study = own_copy
    root = study.root
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    monkeypatch.setattr(run_module, "Training", None)
    again = autopilot(config, concluding())
    assert again.trained == 0
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before


def test_another_configuration_of_the_same_study_is_refused(own_copy):
    config, _ = own_copy
    other = replace(config, finals=replace(config.finals, steps=26))
    with pytest.raises(UserError, match=r"finals\.steps: 25 → 26.*--force"):
        autopilot(other, Listener())
    elsewhere = replace(config, launcher=replace(config.launcher, slots=5))  # not part of the study
    assert autopilot(elsewhere, Listener(), stages=["lr_sweep"]).trained == 0


def test_force_changes_a_study_and_keeps_nothing_that_was_concluded_from_the_old_one(own_copy):
    config, study = own_copy
    with pytest.raises(UserError, match="needs the decision of lr_sweep"):
        autopilot(replace(config, audit_every=5), Listener(), stages=["finals"], force=True)
    assert study.decisions() == {}
    assert not any(
        name in str(list(study.root.iterdir())) for name in ("acceptance", "summary", "report", "png")
    )
    other = replace(config, lr_scale=replace(config.lr_scale, steps=16))
    again = autopilot(other, Listener(), stages=["lr_sweep", "calibrate", "lr_scale"], force=True)
    assert 0 < again.trained < 5  # the runs of earlier stages are still the same


@pytest.mark.thorough
def test_of_a_study_that_is_not_decided_report_says_how_far_it_is_and_how_to_go_on(tiny, tmp_path):
    config = compose([*tiny, "launcher=inline", f"output_dir={tmp_path}", "study.name=begun"])
    command = ["ebc-lab", "autopilot", "study.name=begun"]

    def stopped_after(runs: int) -> str:
        with pytest.raises(StageFailed):
            autopilot(config, Listener(), limits=Limits(max_runs=runs), command=command)
        assert status(Study(tmp_path / "begun"))["state"] == "interrupted"
        return called("report", "begun", "--output-dir", str(tmp_path), cwd=tmp_path).stdout

    page = tmp_path / "begun" / "report.html"
    told = stopped_after(2)
    assert re.search(r"\nso far  lr_sweep: Adam at lr 0\.0\d+ leads, .* \(2 of about \d+ runs\)\n", told)
    assert re.search(r"\nlr_sweep +open .*\ncalibrate +waiting ", told)
    assert "Not decided so far: lr_sweep, calibrate" in page.read_text()
    autopilot(config, Listener(), stages=["lr_sweep"])
    told = stopped_after(1)
    assert re.search(r"\nlr_sweep +decided .* Adam: baseline", told)
    assert "\nso far  calibrate: " in told
    assert re.search(r"\nthis continues the study:\n  .*ebc-lab autopilot study\.name=begun\n", told)
    for words in ("No answer yet.", "So far, calibrate: ", "This continues the study from here:"):
        assert words in page.read_text()


@pytest.mark.thorough
def test_one_crashing_run_never_stops_the_study_and_a_diverging_one_is_a_result(tiny, tmp_path, monkeypatch):
    build = optimizers.build

    def crash_at_one_lr(model, config, *given):
        if config.lr == 2e-2 and not (tmp_path / "crashed").exists():
            (tmp_path / "crashed").write_text("")
            raise RuntimeError("a bug that strikes once")
        return build(model, config, *given)

    monkeypatch.setattr(optimizers, "build", crash_at_one_lr)
    own = ["launcher=inline", f"output_dir={tmp_path}", "study.name=x"]
    config = compose([o for o in tiny if "grids" not in o] + ["lr_sweep.grids.adam=[1e-2,2e-2,3.0]", *own])
    outcome = autopilot(config, Listener(), stages=["lr_sweep"])
    [failed] = outcome.failed
    decision = outcome.study.decisions()["lr_sweep"]
    assert decision["tracks"]["adam_none"]["run_id"] != failed
    grid = {c["lr"]: c for c in decision["candidates"] if c["role"] == "grid"}
    assert [grid[lr]["outcome"] for lr in (1e-2, 2e-2, 3.0)] == ["completed", "failed", "diverged"]
    assert "a bug that strikes once" in grid[2e-2]["cause"]
    assert decision["tracks"]["adam_none"]["lr"] < 1


def test_a_stage_whose_first_runs_fail_for_one_cause_is_stopped_early(tiny, tmp_path, monkeypatch):
    def crash(*_, **named):
        raise RuntimeError("no kernel for this")

    with monkeypatch.context() as patch:
        patch.setattr(optimizers, "build", crash)
        config = compose([*tiny, "launcher=inline", f"output_dir={tmp_path}", "study.name=x"])
        with pytest.raises(StageFailed, match=r"first 2 runs all failed.*no kernel for this"):
            autopilot(config, Listener())
    assert len(list(tmp_path.glob("x/runs/*/result.json"))) == 2
    again = autopilot(config, Listener(), stages=["lr_sweep"])
    assert not again.failed  # fixed: the failed runs are run again


@pytest.mark.thorough
def test_stages_one_by_one_are_the_autopilot(finished, tiny, tmp_path):
    _, outcome, _ = finished
    config = compose([*tiny, "launcher=inline", f"output_dir={tmp_path}", "study.name=x"])
    with pytest.raises(UserError, match="needs the decision of lr_sweep"):
        autopilot(config, Listener(), stages=["calibrate"])
    assert not (tmp_path / "x").exists()
    for stage in config.study.stages:
        autopilot(config, Listener(tabulate=write_table), stages=[stage])
    table = "summary_final.csv"
    assert without_timing(tmp_path / "x" / table) == without_timing(outcome.study.root / table)


LIGHT = {"torch", "numpy", "scipy", "pandas", "matplotlib", "hydra", "omegaconf", "submitit", "jinja2"}
BANNED = {
    "ebc_lab.cli.commands, ebc_lab.study.inspect.status": LIGHT,
    "ebc_lab.study.autopilot": {"torch", "pandas"},
    "ebc_lab.report.text.summaries": {"torch", "pandas"},
}


@pytest.mark.parametrize(("modules", "banned"), BANNED.items())
def test_modules_import_nothing_heavy_that_they_do_not_need(modules, banned):
    code = f"import sys, {modules}; sys.exit(', '.join({banned!r} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
