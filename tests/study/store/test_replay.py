import json
import shutil

import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.records.json_files import read_checksummed, with_checksum, write_checksummed
from ebc_lab.study.store.replay import replay, replay_in_words


def rewrite(path, change):
    """Change a result as its own writer would: with a checksum that holds."""
    result = read_checksummed(path, "")
    change(result)
    write_checksummed(path, result)


def a_run(study, stage):
    decision = study.decisions()[stage]
    return study.run_dir(decision["tracks"]["adam_none"]["run_id"])


def test_the_recorded_decisions_follow_from_the_results(finished):
    study = finished[1].study
    before = {p: p.stat().st_mtime_ns for p in study.root.rglob("*")}
    found = replay(study)
    assert found["same"]
    assert list(found["stages"]) == ["lr_sweep", "calibrate", "lr_scale", "finals"]
    assert list(replay_in_words(found)) == [f"{stage}: the same" for stage in found["stages"]]
    assert {p: p.stat().st_mtime_ns for p in study.root.rglob("*")} == before


@pytest.mark.parametrize(("by", "same"), [(1e-15, True), (1e-9, False)])
def test_the_last_digits_of_another_machine_are_no_difference(study, by, same):
    path = study.root / "auto_decisions.json"
    decisions = json.loads(path.read_text())
    decisions["lr_sweep"]["tracks"]["adam_none"]["val_loss"] *= 1 + by
    decisions["lr_sweep"] = with_checksum(decisions["lr_sweep"], "decision_sha256")
    path.write_text(json.dumps(decisions))
    found = replay(study, "lr_sweep")
    assert found["same"] == same
    where = {d["path"] for d in found["stages"]["lr_sweep"]["differences"]}
    assert where == (set() if same else {"tracks.adam_none.val_loss", "decision_sha256"})
    decisions["lr_sweep"]["decision_sha256"] = "0" * 64
    path.write_text(json.dumps(decisions))
    assert not replay(study, "lr_sweep")["same"]


@pytest.mark.thorough
@pytest.mark.parametrize("stage", ["lr_sweep", "calibrate", "lr_scale", "finals"])
def test_an_edited_decision_is_shown_leaf_by_leaf(study, stage):
    path = study.root / "auto_decisions.json"
    decisions = json.loads(path.read_text())
    decisions[stage]["candidates"][0]["lr"] = 99.0
    decisions[stage]["rule"] = "mine"
    path.write_text(json.dumps(decisions))
    found = replay(study)
    assert not found["same"]
    assert [s for s, f in found["stages"].items() if not f["same"]] == [stage]
    shown = {d["path"]: (d["recorded"], d["recomputed"]) for d in found["stages"][stage]["differences"]}
    assert shown["candidates[0].lr"][0] == 99.0
    assert shown["rule"][0] == "mine"
    assert len(shown) == 2
    assert replay(study, "lr_sweep")["same"] == (stage != "lr_sweep")
    assert any("candidates[0].lr: 99.0 → 0." in line for line in replay_in_words(found))


def test_another_result_changes_the_decision_and_what_was_built_on_it(study):
    rewrite(a_run(study, "lr_sweep") / "result.json", lambda r: r.update(val_loss=r["val_loss"] - 0.125))
    found = replay(study)["stages"]
    changed = {d["path"]: d["recomputed"] for d in found["lr_sweep"]["differences"]}
    assert {"inputs_sha256", "tracks.adam_none.val_loss"} <= set(changed)
    recorded = study.decisions()["lr_sweep"]["tracks"]["adam_none"]["val_loss"]
    assert changed["tracks.adam_none.val_loss"] == recorded - 0.125
    assert {d["path"] for d in found["finals"]["differences"]} == {"inputs_sha256", "decision_sha256"}


def test_a_result_that_changes_the_winner_asks_for_runs_that_are_not_there(study):
    grid = [c for c in study.decisions()["lr_sweep"]["candidates"] if c["role"] == "grid"]
    won = min(grid, key=lambda c: c["val_loss"])["run_id"]
    rewrite(study.run_dir(won) / "result.json", lambda r: r.update(val_loss=9.0))
    found = replay(study)["stages"]
    assert "missing" in found["lr_sweep"]["problem"]  # what is tuned around the one that would have won
    assert found["calibrate"]["problem"] == "builds on lr_sweep, which could not be decided again"


def test_a_missing_run_and_an_edited_result_are_named(study):
    run = a_run(study, "calibrate")
    text = (run / "result.json").read_text()
    (run / "result.json").write_text(text.replace('"val_loss": ', '"val_loss": 1'))
    found = replay(study)["stages"]
    assert found["lr_sweep"]["same"]
    assert str(run / "result.json") in found["calibrate"]["problem"]
    assert found["finals"]["problem"] == "builds on calibrate, which could not be decided again"
    shutil.rmtree(run)
    found = replay(study)["stages"]
    assert run.name in found["calibrate"]["problem"]
    assert not any(found[s]["same"] for s in ("calibrate", "lr_scale", "finals"))


def test_what_is_not_decided_cannot_be_replayed(study):
    with pytest.raises(UserError, match="tune of study done is not decided yet"):
        replay(study, "tune")
    (study.root / "auto_decisions.json").unlink()
    with pytest.raises(UserError, match="no stage of study done is decided yet"):
        replay(study)
