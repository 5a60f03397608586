import re
import shutil
from dataclasses import replace

import pytest

from ebc_lab.config.compose import compose
from ebc_lab.records.json_files import read_checksummed, write_checksummed
from ebc_lab.study.autopilot import Listener, autopilot
from ebc_lab.study.inspect import pace
from ebc_lab.study.inspect.forecast import forecast, planned
from ebc_lab.study.inspect.status import status

ALIKE = ", of the same shape on this machine"  # how the source of an estimate from siblings ends


def test_a_finished_study_has_nothing_left(own_copy):
    config, study = own_copy
    before = {p: p.read_bytes() for p in study.root.rglob("*") if p.is_file()}
    found = planned(config)
    trained = sum("overhead" not in p.name for p in study.runs.iterdir())
    for scenario in ("min", "expected", "max"):
        total = found["stages"]["total"][scenario]
        assert total["done"] == total["runs"] == trained
        assert total["eta_s"] == 0
    assert found["begun"]
    assert found["changed"] == []
    assert {p: p.read_bytes() for p in study.root.rglob("*") if p.is_file()} == before


@pytest.mark.thorough
def test_known_results_are_used_and_only_the_rest_costs_time(own_copy):
    config, study = own_copy
    late = [p for p in sorted(study.runs.iterdir()) if re.search(r"_n25_s[01]-", p.name)][4:]
    for folder in late:
        shutil.rmtree(folder)
    found = planned(config)
    assert "finished run(s) of this study" in found["eta_from"]
    assert found["stages"]["finals"]["expected"]["done"] == 4
    assert found["stages"]["finals"]["max"]["runs"] == 4 + len(late)
    assert found["stages"]["lr_sweep"]["expected"]["eta_s"] == 0
    others = planned(replace(config, study=replace(config.study, name="fresh"), seeds=[5, 6]))
    left, all_of_them = (p["stages"]["finals"]["expected"]["eta_s"] for p in (found, others))
    assert 0 < left < all_of_them
    for stage in found["stages"].values():
        for key in ("runs", "steps", "tokens", "eta_s"):
            assert stage["min"][key] <= stage["expected"][key] <= stage["max"][key]


def test_the_least_of_all_stages_together_is_no_more_than_their_sum(tmp_path):
    config = compose(["scale=laptop", "device=cpu", "data=pydoc", f"output_dir={tmp_path}"])
    stages = planned(config)["stages"]
    total = stages.pop("total")
    for key in ("runs", "steps", "tokens"):
        assert total["min"][key] <= sum(stage["min"][key] for stage in stages.values())


def test_failed_runs_of_an_unfinished_study_are_still_to_do(own_copy):
    config, study = own_copy
    (study.root / "auto_decisions.json").unlink()
    path = next(study.runs.glob("*_n15_*")) / "result.json"
    write_checksummed(path, {**read_checksummed(path, ""), "outcome": "failed"})
    total = planned(config)["stages"]["total"]["expected"]
    assert total["eta_s"] > 0
    assert total["done"] < total["runs"]


def test_known_results_that_decide_nothing_leave_the_plan_as_without_them(resolved):
    def diverged(specs):
        return {s.run_id: {"outcome": "diverged", "val_loss": None} for s in specs if s.stage == "lr_sweep"}

    assert forecast(resolved, diverged) == forecast(resolved)


def test_other_settings_are_said_and_the_runs_that_stay_the_same_are_counted(own_copy):
    config, _ = own_copy
    found = planned(replace(config, finals=replace(config.finals, steps=26)))
    assert found["changed"] == ["finals.steps: 25 → 26"]
    assert found["stages"]["finals"]["expected"]["done"] == 0
    assert found["stages"]["lr_sweep"]["expected"]["done"] == found["stages"]["lr_sweep"]["expected"]["runs"]


def test_each_kind_of_run_has_its_own_pace_once_enough_are_finished(own_copy):
    _, study = own_copy
    for record in study.records():
        path = study.run_dir(record.run_id) / "result.json"
        if record.spec["kind"] == "train":
            a_step = 2.0 if record.spec["config"]["stabilizer"]["name"] == "ebc" else 1.0
            write_checksummed(path, {**record.result, "wall_s": a_step * record.result["steps"]})
    found = pace.learned(study.records())
    tokens = 10 * 16
    assert found.by_kind["adam", "none"] * tokens == pytest.approx(1.0)
    assert found.by_kind["adam", "ebc"] * tokens * 1.1 == pytest.approx(2.0)
    assert found.by_kind["adam", "none"] < found.overall < found.by_kind["adam", "ebc"] * 1.1
    assert pace.learned([]) is None
    plain = [r for r in study.records() if "_baseline_" in r.run_id][:1]
    assert pace.learned(plain).by_kind == {}  # one run is no pace of a kind
    assert pace.learned(plain).overall > 0


def test_siblings_of_another_shape_or_machine_say_nothing(own_copy):
    config, study = own_copy
    fresh = replace(config, study=replace(config.study, name="fresh"))
    assert ALIKE not in (planned(replace(fresh, model=replace(config.model, width=32)))["eta_from"] or "")
    header = study.header()
    header["hardware"]["host"] = "another"
    write_checksummed(study.root / "study.json", header)
    assert ALIKE not in (planned(fresh)["eta_from"] or "")


def test_the_three_newest_siblings_are_enough(own_copy):
    config, study = own_copy
    for name in ("a", "b", "c"):
        shutil.copytree(study.root, study.root.parent / name)
    found = planned(replace(config, study=replace(config.study, name="fresh")))
    total = found["stages"]["total"]["expected"]
    assert (total["done"], total["eta_s"]) == (0, 0)  # its runs will be copied
    said = found["eta_from"]
    assert len(said.removesuffix(ALIKE).split(", ")) == 3
    assert said.endswith(ALIKE)


@pytest.mark.thorough
def test_the_eta_of_an_interrupted_study_counts_a_run_that_is_half_done(own_copy):
    config, study = own_copy
    (study.root / "auto_decisions.json").unlink()
    path = next(p for p in sorted(study.runs.glob("*_n25_s0-*")))
    (path / "result.json").unlink()
    whole = status(study)["eta_s"]
    assert whole == pytest.approx(planned(config)["stages"]["total"]["expected"]["eta_s"])
    (path / "progress.json").write_text('{"step": 5, "steps": 25, "steps_per_s": 1.0}')
    assert status(study)["eta_s"] == pytest.approx(0.8 * whole)
    assert autopilot(config, Listener()).trained == 1
    assert status(study)["eta_s"] == 0


def test_seeds_that_may_be_added_are_in_the_forecast(finished, tmp_path):
    config = replace(finished[0], output_dir=str(tmp_path))  # where no runs are to be copied
    more = planned(replace(config, finals=replace(config.finals, max_seeds=7)))["stages"]["finals"]
    least, most = (more[k]["runs"] for k in ("min", "max"))
    fixed = planned(config)["stages"]["finals"]
    assert least == fixed["min"]["runs"]
    assert most * len(config.seeds) == fixed["max"]["runs"] * 7
