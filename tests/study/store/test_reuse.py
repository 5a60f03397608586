import json
import shutil
from dataclasses import replace

import pytest

from ebc_lab.config import identity
from ebc_lab.config.errors import UserError
from ebc_lab.records.json_files import read_checksummed, with_checksum, write_checksummed
from ebc_lab.report.conclude import concluding, report
from ebc_lab.study.autopilot import Listener, autopilot
from ebc_lab.study.inspect.status import status
from ebc_lab.study.inspect.why import why
from ebc_lab.study.stages.rules import FORM
from ebc_lab.study.store.reuse import remaining_work, reusable_results, work_in_words
from ebc_lab.study.store.snapshot import read
from ebc_lab.study.store.verify import verify

LATER = ["calibrate", "lr_scale", "finals"]


def stages(study):
    return {s["stage"]: s for s in status(study)["stages"]}


def won(study, stage):
    return study.run_dir(study.decisions()[stage]["tracks"]["adam_none"]["run_id"])


def test_a_finished_study_is_kept_whole(finished, resolved):
    study = finished[1].study
    found = remaining_work(resolved, reusable_results(study.records(), finished=True))
    assert [look.missing for look in found] == [0, 0, 0, 0]
    assert work_in_words(found).startswith(f"lr_sweep: all {found[0].runs} kept; calibrate: all ")
    assert read(study).stale_decisions() == {}


def test_a_missing_run_makes_its_stage_and_all_after_it_stale(study):
    gone = won(study, "lr_sweep")
    shutil.rmtree(gone)
    found = stages(study)
    assert [found[s]["state"] for s in ("lr_sweep", *LATER)] == ["stale"] * 4
    assert f"is missing ({gone.name})" in found["lr_sweep"]["stale_because"]
    assert found["lr_sweep"]["would_train"] == 1
    assert "it builds on lr_sweep" in found["calibrate"]["stale_because"]
    assert [found[s]["would_train"] for s in LATER] == [None, None, None]
    assert status(study)["state"] == "stale"
    assert why(study, "calibrate")["calibrate"]["stale_because"] == found["calibrate"]["stale_because"]


@pytest.mark.thorough
def test_runs_missing_in_a_later_stage_leave_the_earlier_ones_decided_and_are_trained_as_before(own_copy):
    config, study = own_copy
    gone = sorted(study.runs.glob("*_n25_s0-*"))[:3]
    losses = [study.result(folder.name)["val_loss"] for folder in gone]
    for folder in gone:
        shutil.rmtree(folder)
    assert f"runs/{gone[0].name}/result.json" in [bad["file"] for bad in verify(study)["bad"]]
    found = stages(study)
    assert [found[s]["state"] for s in ("lr_sweep", *LATER)] == ["decided", "decided", "decided", "stale"]
    assert found["finals"]["would_train"] == 3
    assert autopilot(config, concluding()).trained == 3  # as predicted
    assert stages(study)["finals"]["state"] == "decided"
    assert verify(study)["ok"]
    assert [study.result(folder.name)["val_loss"] for folder in gone] == losses


def test_an_edited_result_is_a_problem_of_the_status_and_makes_it_stale(study):
    path = won(study, "calibrate") / "result.json"
    path.write_text(path.read_text().replace('"val_loss": ', '"val_loss": 1'))
    [problem] = status(study)["problems"]
    assert str(path) in problem
    assert f"delete {path.parent}, and the study's command trains the run again" in problem
    found = stages(study)
    assert found["lr_sweep"]["state"] == "decided"
    assert f"is edited ({path.parent.name})" in found["calibrate"]["stale_because"]
    assert found["calibrate"]["would_train"] == 1
    path.write_text(path.read_text()[:100])
    assert "is damaged" in status(study)["problems"][0]


@pytest.mark.thorough
def test_a_result_exchanged_with_its_checksum_makes_the_decision_stale(own_copy):
    config, study = own_copy
    path = won(study, "lr_sweep") / "result.json"
    before = read_checksummed(path, "")
    write_checksummed(path, {**before, "val_loss": before["val_loss"] - 0.125})
    found = stages(study)
    assert "other results" in found["lr_sweep"]["stale_because"]
    assert {found[s]["state"] for s in LATER} == {"stale"}
    assert [s["would_train"] for s in found.values()] == [0, 0, 0, 0]  # the same one wins
    write_checksummed(path, before)
    grid = [c for c in study.decisions()["lr_sweep"]["candidates"] if c["role"] == "grid"]
    path = study.run_dir(min(grid, key=lambda c: c["val_loss"])["run_id"]) / "result.json"
    write_checksummed(path, {**read_checksummed(path, ""), "val_loss": 9.0})
    asked = stages(study)["lr_sweep"]["would_train"]
    assert asked > 0  # a baseline and peaks of a control around another winner
    with pytest.raises(UserError, match=r"result\.json was changed after it was recorded"):
        autopilot(config, Listener(), stages=["lr_sweep"])
    study.manifest_file.unlink()  # as if it had never been recorded
    said: list[str] = []
    assert autopilot(config, Listener(say=said.append), stages=["lr_sweep"]).trained >= asked
    assert any(f"lr_sweep was decided, but {asked} of its" in line for line in said)
    assert any("lr_sweep: the recorded decision does not follow" in line for line in said)
    assert list(study.decisions()) == ["lr_sweep"]


def test_decisions_of_another_form_are_said_to_be_stale_and_are_made_again_from_the_runs(own_copy):
    """As a study is found that an earlier version decided."""
    config, study = own_copy
    earlier = study.decisions()
    for stage, decision in earlier.items():
        unmarked = {k: v for k, v in decision.items() if k != "decision_sha256"}
        earlier[stage] = with_checksum({**unmarked, "form": FORM - 1}, "decision_sha256")
    study.decisions_file.write_text(json.dumps(earlier))
    words = "it was recorded by another version of ebc-lab"
    found = stages(study)
    assert all(s["stale_because"].startswith(words) for s in found.values())
    assert [s["would_train"] for s in found.values()] == [0, 0, 0, 0]
    with pytest.raises(UserError, match=f"lr_sweep: {words}.*decides again from the runs"):
        why(study, "lr_sweep")
    with pytest.raises(UserError, match=words):
        report(study)
    assert autopilot(config, Listener()).trained == 0
    assert {d["form"] for d in study.decisions().values()} == {FORM}


def test_a_study_whose_settings_another_version_wrote_is_named_with_a_remedy(own_copy):
    config, study = own_copy
    header = study.header()
    header["config"]["lr_sweep"]["control_warmup"] = 20
    write_checksummed(study.header_file, header)
    words = "study done cannot be read here .LRSweepConfig has no control_warmup.*another study.name"
    for ask in (status, report, lambda s: why(s, None), lambda s: autopilot(config, Listener())):
        with pytest.raises(UserError, match=words):
            ask(study)


def test_other_timings_make_nothing_stale(study):
    for record in study.records():
        if record.result and "tokens_per_s" in record.result:
            timed = {"wall_s": 1.0, "tokens_per_s": 2.0, "train_s": 3.0, "probe_pct": 4.0, "curve": []}
            write_checksummed(study.run_dir(record.run_id) / "result.json", record.result | timed)
    assert {s["state"] for s in stages(study).values()} == {"decided"}


def test_an_edited_decision_is_stale_and_nothing_would_be_trained(study):
    decisions = study.decisions()
    decisions["lr_scale"]["tracks"]["adam_none"]["lr_scale"] = 77.0
    (study.root / "auto_decisions.json").write_text(json.dumps(decisions))
    found = stages(study)
    assert found["lr_scale"]["stale_because"] == "its record in auto_decisions.json was edited"
    assert found["lr_scale"]["decided"] == []
    with pytest.raises(UserError, match=r"lr_scale: its record in auto_decisions\.json was edited"):
        why(study, None)
    for nonsense in ({**decisions, "lr_sweep": {}}, {**decisions, "lr_sweep": 3}, []):
        (study.root / "auto_decisions.json").write_text(json.dumps(nonsense))
        assert status(study)["state"] in ("stale", "interrupted")
    assert (found["lr_scale"]["would_train"], found["calibrate"]["state"]) == (0, "decided")


def test_another_torch_is_refused_says_what_it_would_train_and_force_says_it_too(own_copy, monkeypatch):
    config, study = own_copy
    monkeypatch.setattr(identity, "_torch_version", lambda: "99.0")
    monkeypatch.setattr(identity, "_NAMES", {})  # as in a process that has named no run yet
    found = stages(study)
    assert "torch is 99.0 here and was 2." in found["lr_sweep"]["stale_because"]
    assert found["lr_sweep"]["would_train"] == 3  # its grid; the rest depends on its winner
    words = r"torch: '2\.\d+' → '99\.0'.*--force.*lr_sweep: all 3 would be trained; calibrate, lr_s"
    with pytest.raises(UserError, match=words):
        autopilot(config, Listener())
    said: list[str] = []
    outcome = autopilot(config, Listener(say=said.append), stages=["lr_sweep"], force=True)
    assert any("lr_sweep: all 3 would be trained" in line for line in said)
    assert outcome.trained > 3
    assert study.header()["environment"]["torch"] == "99.0"


def test_other_settings_are_refused_with_what_they_would_train(own_copy):
    config, _ = own_copy
    multiples = config.calibrate.multiples
    grids = {**config.lr_sweep.grids, "adam": [5e-3, 2e-2, 4e-2]}
    calibrate = (
        f"calibrate: 1 of {len(multiples) + 1} would be trained; lr_scale, finals: decided again after"
    )
    for stage, setting, words in (
        ("calibrate", {"multiples": [0.25, *multiples]}, rf"lr_sweep: all \d+ kept; {calibrate} that"),
        (
            "lr_sweep",
            {"grids": grids},
            "lr_sweep: 1 of 3 would be trained; calibrate, lr_scale, finals: decided",
        ),
        ("finals", {"margin": 0.5}, r"finals: all \d+ kept"),
    ):
        other = replace(config, **{stage: replace(getattr(config, stage), **setting)})
        with pytest.raises(UserError, match=words):
            autopilot(other, Listener())
