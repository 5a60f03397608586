"""What 1.0 reads of a study that 0.2.0 made and exported, as CHANGELOG.md tells.

made_by_0_2.bundle is that version's `ebc-lab export` of lr_sweep on a tiny model, its picture in few pixels.
"""

import shutil
import zipfile
from pathlib import Path

import pytest
from support.called import answered, called, refused

import ebc_lab

MADE_BY_0_2 = Path(__file__).with_name("made_by_0_2.bundle")
ANOTHER_VERSION = "lr_sweep: it was recorded by another version of ebc-lab"


@pytest.fixture
def bundle(tmp_path):
    return Path(shutil.copy(MADE_BY_0_2, tmp_path / "old.zip"))


def test_every_byte_is_as_it_was_recorded_and_is_exported_as_it_was(bundle, tmp_path):
    assert answered("verify", "old.zip", cwd=tmp_path).stdout.startswith("old: 38 file(s) as recorded")
    shutil.unpack_archive(bundle, tmp_path / "old")
    answered("verify", "./old", cwd=tmp_path)
    answered("export", "./old", "--output", "again.zip", cwd=tmp_path)
    with zipfile.ZipFile(bundle) as old, zipfile.ZipFile(tmp_path / "again.zip") as again:
        assert {name: again.read(name) for name in again.namelist()} == {
            n: old.read(n) for n in old.namelist()
        }
    answered("export", "./old", "--output", "brief.zip", "--brief", cwd=tmp_path)
    answered("verify", "brief.zip", cwd=tmp_path)


def test_its_runs_are_tables(bundle):
    study = ebc_lab.load(bundle)
    assert (study.header["ebc_lab"], study.header["environment"]["numerics_version"]) == ("0.2.0", 4)
    runs = study.runs()
    assert runs.outcome.tolist() == ["completed"] * 5
    assert runs.val_loss.between(2, 5).all()
    assert len(study.steps()) == 5 * study.config["lr_sweep"]["steps"]
    assert study.evals().val_loss.notna().all()


def test_its_decision_is_told_as_another_versions_and_can_be_made_again(bundle, tmp_path):
    study = ebc_lab.load(bundle)
    assert study.state == "finished"
    assert study.answer == "lr_sweep cannot be used: it was recorded by another version of ebc-lab"
    [problem] = study.problems
    assert problem.startswith("lr_sweep in ")
    assert "(it was recorded by another version of ebc-lab)" in problem
    told = answered("status", "old.zip", cwd=tmp_path).stdout
    assert "lr_sweep is stale: it was recorded by another version of ebc-lab" in told
    assert ANOTHER_VERSION in refused("why", "old.zip", cwd=tmp_path)
    assert ANOTHER_VERSION in refused("diff", "old.zip", "old.zip", cwd=tmp_path)
    again = called("why", "old.zip", "--replay", cwd=tmp_path)
    assert again.returncode == 4
    assert "form: 3 → 4" in again.stdout
    for _ in range(2):  # what the first call unpacked is not in the way of the second
        assert ANOTHER_VERSION in refused("report", "old.zip", "--output", "x", cwd=tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["old.zip"]
