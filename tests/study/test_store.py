import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebc_lab.config import UserError
from ebc_lab.study.stages import STAGES_OF
from ebc_lab.study.store import Study, claimed
from ebc_lab.telemetry import write_json

HOLD = """
import sys, time
from pathlib import Path
from ebc_lab.study.store import Study, claimed
kind, where = sys.argv[1:]
with (Study(Path(where)).held() if kind == "study" else claimed(Path(where))):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Another process that holds a study or a run until the test ends, or kills it."""
    started = []

    def start(kind: str, where: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, kind, str(where)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def study(tmp_path):
    study = Study(tmp_path / "s")
    study.prepare()
    return study


def test_a_held_study_names_its_holder_and_is_free_after_kill_9(study, hold):
    assert study.holder() is None
    other = hold("study", study.root)
    assert study.holder()["pid"] == other.pid
    with pytest.raises(UserError, match=rf"is being run by process {other.pid} on \S+ since 20\d\d"), study.held():
        pass
    other.kill()
    other.wait()
    assert study.holder() is None
    with study.held():
        assert study.holder()["pid"] == os.getpid()


def test_a_claimed_run_cannot_be_claimed_twice(tmp_path, hold):
    other = hold("run", tmp_path)
    with claimed(tmp_path) as mine:
        assert not mine
    other.kill()
    other.wait()
    with claimed(tmp_path) as mine:
        assert mine


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


def test_an_edited_spec_is_refused(finished):
    _, outcome, _ = finished
    run_id = next(p.name for p in outcome.study.runs.iterdir())
    path = outcome.study.run_dir(run_id) / "spec.json"
    original = path.read_text()
    edited = json.loads(original)
    edited["config"]["optimizer"]["lr"] *= 2
    try:
        path.write_text(json.dumps(edited))
        with pytest.raises(UserError, match=r"spec\.json does not describe"):
            outcome.study.read_spec(run_id)
    finally:
        path.write_text(original)


def test_a_result_of_another_run_is_refused(study, settled):
    spec = STAGES_OF["lr_sweep"].runs(settled, {}, {})[0]
    study.write_spec(spec)
    write_json(study.run_dir(spec.run_id) / "result.json", {"identity": "0" * 64, "outcome": "completed", "val_loss": 0.1})
    with pytest.raises(UserError, match=r"result\.json was not written by this run"):
        study.results([spec])


def test_forget_removes_only_the_outcomes_and_stages_it_is_told(study):
    for name, outcome, stage in (
        ("a", "lost", "finals"),
        ("b", "completed", "finals"),
        ("c", "failed", "finals"),
        ("d", "lost", "x"),
    ):
        study.run_dir(name).mkdir()
        write_json(study.run_dir(name) / "spec.json", {"stage": stage})
        write_json(study.run_dir(name) / "result.json", {"outcome": outcome})
    assert study.forget(["lost"], ["finals"]) == ["a"]
    assert study.result("d")
    assert study.result("b")
    assert study.result("c")
    assert study.result("a") is None


def test_the_manifest_covers_every_file_of_the_study(finished):
    import hashlib

    _, outcome, _ = finished
    root = outcome.study.root
    manifest = json.loads((root / "manifest.json").read_text())
    files = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")}
    assert set(manifest) == files - {"manifest.json"}
    assert all(hashlib.sha256((root / p).read_bytes()).hexdigest() == h for p, h in manifest.items())
