import json
import os
import subprocess
import sys

import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.records.json_files import write_checksummed
from ebc_lab.study.stages.stage import stage_of
from ebc_lab.study.store.find import find
from ebc_lab.study.store.study import OfAnotherRun, Study

HOLD = """
import sys
from pathlib import Path
from ebc_lab.study.store.study import Study
with Study(Path(sys.argv[1])).held():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def study(tmp_path):
    study = Study(tmp_path / "s")
    study.prepare()
    return study


def test_a_held_study_names_its_holder_and_is_free_after_kill_9(study):
    assert study.holder() is None
    command = [sys.executable, "-c", HOLD, str(study.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert study.holder()["pid"] == other.pid
        words = rf"is being run by process {other.pid} on \S+ since 20\d\d"
        with pytest.raises(UserError, match=words), study.held():
            pass
        other.kill()
    assert study.holder() is None
    with study.held():
        assert study.holder()["pid"] == os.getpid()


def test_an_output_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another output_dir"):
        Study(tmp_path / "file" / "s").prepare()


def test_a_new_decision_takes_the_later_ones_with_it(study):
    for stage in ("lr_sweep", "calibrate", "lr_scale"):
        study.write_decision(stage, {"inputs_sha256": "a"})
    study.write_decision("calibrate", {"inputs_sha256": "a"})
    assert list(study.decisions()) == ["lr_sweep", "calibrate", "lr_scale"]
    (study.root / "acceptance.json").write_text("{}")
    study.write_decision("calibrate", {"inputs_sha256": "b"})
    assert not (study.root / "acceptance.json").exists()
    assert list(study.decisions()) == ["lr_sweep", "calibrate"]


def test_an_edited_spec_is_refused(own_copy):
    _, study = own_copy
    run_id = study.run_ids()[0]
    path = study.run_dir(run_id) / "spec.json"
    edited = json.loads(path.read_text())
    edited["config"]["optimizer"]["lr"] *= 2
    path.write_text(json.dumps(edited))
    with pytest.raises(UserError, match=r"spec\.json does not describe"):
        study.read_spec(run_id)


def test_a_result_of_another_run_is_refused(study, resolved):
    spec = stage_of("lr_sweep").runs(resolved, {}, {})[0]
    study.write_spec(spec)
    path = study.run_dir(spec.run_id) / "result.json"
    write_checksummed(path, {"identity": "0" * 64, "outcome": "completed", "val_loss": 0.1})
    with pytest.raises(UserError, match=r"result\.json was not written by this run"):
        study.results([spec])
    # one whose name is the same
    alike = spec.identity_sha256[:10] + "0" * 54
    write_checksummed(path, {"run_id": spec.run_id, "identity": alike, "outcome": "completed"})
    assert study.result(spec.run_id)
    with pytest.raises(OfAnotherRun, match=r"result\.json was not written by this run"):
        study.results([spec])


def test_the_working_folder_itself_is_a_study_by_its_own_name(own_copy, monkeypatch):
    _, study = own_copy
    monkeypatch.chdir(study.root)
    assert find(".", "nowhere").name == study.name
    monkeypatch.chdir(study.runs)
    assert find("..", "nowhere").name == study.name
