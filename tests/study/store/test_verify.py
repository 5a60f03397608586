import hashlib
import json
import shutil

import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.report.conclude import concluding, report
from ebc_lab.study.autopilot import autopilot
from ebc_lab.study.store import manifest
from ebc_lab.study.store.verify import verify

RUN_FILES = ("spec.json", "result.json", "steps.csv", "evals.csv", "log.txt", "attempts.jsonl")


def flip_a_byte(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def bad(study):
    return [b["file"] for b in verify(study)["bad"]]


def a_run(study, stage_steps=15):
    return next(p.name for p in sorted(study.runs.iterdir()) if f"_n{stage_steps}_" in p.name)


def test_a_finished_study_is_as_recorded(finished):
    study = finished[1].study
    found = verify(study)
    assert (found["ok"], found["bad"], found["under_way"]) == (True, [], False)
    recorded = manifest.read(study.root)["files"]
    files = [p for p in study.root.rglob("*") if p.is_file() and not p.name.startswith(".")]
    assert found["files"] == len(recorded) == len(files) - 1  # the manifest itself
    assert all(hashlib.sha256((study.root / p).read_bytes()).hexdigest() == h for p, h in recorded.items())


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("study.json", "delete it and run the study's command again"),
        ("auto_decisions.json", "run the study's command again"),
        *(
            (name, "`ebc-lab report done`")
            for name in ("acceptance.json", "summary_final.csv", "lr_scale.png")
        ),
        *((f"runs/{{run}}/{name}", "which trains the run again") for name in RUN_FILES),
    ],
)
def test_one_flipped_byte_and_one_missing_file_are_named_with_the_remedy(study, file, remedy):
    file = file.format(run=a_run(study))
    flip_a_byte(study.root / file)
    [found] = verify(study)["bad"]
    assert found["file"] == file
    assert "changed" in found["what"]
    assert remedy in found["remedy"]
    if file == "study.json":
        return  # there is no study without it
    (study.root / file).unlink()
    [found] = [b for b in verify(study)["bad"] if b["file"] == file]
    assert found["what"] == "missing"


def test_a_run_that_is_another_one_is_named_even_where_the_manifest_agrees(study):
    """Somebody who edits a run and records the study anew: the run's own name and checksum still tell."""
    one, two, three = [p.name for p in sorted(study.runs.iterdir()) if "_n15_" in p.name][:3]
    spec = json.loads((study.run_dir(one) / "spec.json").read_text())
    spec["config"]["optimizer"]["lr"] *= 2
    (study.run_dir(one) / "spec.json").write_text(json.dumps(spec))
    shutil.copy(study.run_dir(one) / "result.json", study.run_dir(two) / "result.json")
    flip_a_byte(study.run_dir(three) / "steps.csv")
    (study.root / "manifest.json").unlink()
    manifest.complete(study.root)
    wrong = {b["file"]: b["what"] for b in verify(study)["bad"]}
    assert wrong == {
        f"runs/{one}/spec.json": "does not describe the run it is named after",
        f"runs/{two}/result.json": "was not written by the run it is named after",
        f"runs/{three}/steps.csv": "changed since it was recorded",
    }


def test_an_edit_of_every_seed_is_named_in_each_run(study):
    for run in study.runs.iterdir():
        spec = json.loads((run / "spec.json").read_text())
        spec["config"]["eval_every"] += 1
        (run / "spec.json").write_text(json.dumps(spec))
    (study.root / "manifest.json").unlink()
    manifest.complete(study.root)
    assert {*bad(study)} == {f"runs/{run.name}/spec.json" for run in study.runs.iterdir()}


@pytest.mark.thorough
def test_no_later_command_accepts_an_edit_and_report_draws_an_edited_plot_again(own_copy):
    config, study = own_copy
    before = (study.root / "lr_scale.png").read_bytes()
    edited = {f"runs/{a_run(study)}/{name}" for name in ("evals.csv", "steps.csv")}
    for path in (*edited, "lr_scale.png", "summary_final.csv"):
        flip_a_byte(study.root / path)
    gone = f"runs/{a_run(study, 25)}/log.txt"
    (study.root / gone).unlink()
    for mine in ("notes.txt", f"runs/{a_run(study)}/more.csv"):  # which nobody recorded
        (study.root / mine).write_text("mine")
        edited |= {mine}
    autopilot(config, concluding(), stages=["lr_sweep"])
    assert {*bad(study)} == {*edited, gone, "lr_scale.png", "summary_final.csv"}
    autopilot(config, concluding())  # writes the tables, has no reason to draw
    assert {*bad(study)} == {*edited, gone, "lr_scale.png"}
    report(study)
    assert {*bad(study)} == {*edited, gone}
    assert (study.root / "lr_scale.png").read_bytes() == before


@pytest.mark.thorough
def test_an_edited_decision_is_decided_again_by_the_next_command_and_reported(own_copy, undrawn):
    config, study = own_copy
    path = study.root / "auto_decisions.json"
    before = path.read_bytes()
    decisions = json.loads(before)
    tables = sorted(p.name for p in study.root.glob("*.csv"))
    decisions["calibrate"]["tracks"]["adam_none"]["delta_star"] *= 2  # its hash of the inputs still holds
    path.write_text(json.dumps(decisions))
    assert bad(study) == ["auto_decisions.json"]
    with pytest.raises(
        UserError, match=r"calibrate: its record in auto_decisions\.json was edited\): run the study's"
    ):
        report(study)
    said: list[str] = []
    autopilot(config, concluding(say=said.append))
    assert any("calibrate: the recorded decision does not follow" in line for line in said)
    assert path.read_bytes() == before
    assert sorted(p.name for p in study.root.glob("*.csv")) == tables
    assert verify(study)["ok"]


def test_while_a_study_is_continued_unrecorded_files_are_not_reported(own_copy, monkeypatch):
    from ebc_lab.report import conclude

    config, study = own_copy
    shutil.rmtree(study.run_dir(a_run(study)))
    states = []

    def stop(*_, **__):
        states.append(verify(study))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conclude, "write_conclusions", stop)
        with pytest.raises(KeyboardInterrupt):
            autopilot(config, concluding())
    states.append(verify(study))  # cut off between the runs and the manifest
    for found in states:
        assert (found["bad"], found["under_way"]) == ([], True)
        assert found["unrecorded"] > 0
    flip_a_byte(study.run_dir(a_run(study, 25)) / "steps.csv")
    assert bad(study) == [f"runs/{a_run(study, 25)}/steps.csv"]  # what is recorded is checked all the same
    autopilot(config, concluding())
    assert not verify(study)["under_way"]
    assert bad(study) == [f"runs/{a_run(study, 25)}/steps.csv"]


def test_a_run_without_a_result_may_grow(study):
    folder = study.runs / "planned-0123456789"
    folder.mkdir()
    for name in ("attempts.jsonl", "log.txt", "checkpoint.pt"):
        (folder / name).write_text("one line\n")
    found = verify(study)
    assert (found["ok"], found["growing"]) == (True, 2)  # a checkpoint is no evidence, and never recorded


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_text(path.read_text()[:-40]), r"manifest\.json is damaged"),
        (flip_a_byte, r"manifest\.json (was edited|is damaged)"),
        (
            lambda path: path.write_text(path.read_text().replace('"lr_scale.png"', '"lr_scala.png"')),
            "was edited",
        ),
        (lambda path: path.unlink(), r"has no manifest\.json, which its command writes when it has finished"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused_with_a_remedy(own_copy, undrawn, damage, words):
    config, study = own_copy
    damage(study.root / "manifest.json")
    with pytest.raises(UserError, match=words):
        verify(study)
    if (study.root / "manifest.json").exists():
        with pytest.raises(UserError, match=words):
            autopilot(config, concluding())
        (study.root / "manifest.json").unlink()
    report(study)  # the remedy that the error names
    assert verify(study)["ok"]
