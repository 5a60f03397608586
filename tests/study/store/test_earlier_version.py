"""What this version does with studies of earlier ones, as CHANGELOG.md tells.

made_by_0_2.bundle is that version's `ebc-lab export` of lr_sweep on a tiny model, its picture in few pixels.
"""

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from support.called import answered, called, refused

import ebc_lab
from ebc_lab.config.identity import NUMERICS_VERSION
from ebc_lab.records.json_files import read_json, write_checksummed
from ebc_lab.study.store import changes, manifest
from ebc_lab.study.store.bundle import unpack

EVIDENCE = Path(__file__).parents[3] / "docs/evidence"
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
    assert "made by ebc-lab 0.2.0 (numerics 4); this is " in again.stdout
    for _ in range(2):  # what the first call unpacked is not in the way of the second
        assert ANOTHER_VERSION in refused("report", "old.zip", "--output", "x", cwd=tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["old.zip"]


def test_a_study_of_other_numerics_is_trained_anew_beside_its_runs_or_by_what_began_it(
    own_copy, tiny, tmp_path
):
    _, study = own_copy
    header = study.header()
    header["environment"]["numerics_version"] = before = NUMERICS_VERSION - 1
    manifest.remove_entries(study.root, study.header_file.name)
    write_checksummed(study.header_file, header)
    own = [*tiny, "launcher=inline", f"output_dir={tmp_path}", "study.name=done"]
    said = refused("autopilot", *own, cwd=tmp_path)
    assert f"(numerics_version: {before} → {NUMERICS_VERSION}): choose another study.name" in said
    assert f"use what began it, ebc-lab {header['ebc_lab']} with torch {header['versions']['torch']}." in said
    shown = answered("status", str(study.root), cwd=tmp_path).stdout
    assert re.search(r"\nthis trains it anew, in another study:\n  .* study\.name=done_again( |\n)", shown)


def test_what_1_0_did_not_have_is_no_difference_to_a_study_of_this_version(tmp_path):
    """ours.zip is of 1.0, whose study.json has no ladder."""
    old, new = (unpack(EVIDENCE / "ours.zip", tmp_path / name) for name in ("old", "new"))
    header = read_json(new.header_file)
    assert "ladder" not in header["requested"]
    header["requested"] = changes.as_this_version_says(header["requested"])
    write_checksummed(new.header_file, header)
    found = json.loads(answered("diff", str(old.root), str(new.root), "--json", cwd=tmp_path).stdout)
    assert found["settings"] == {}
