"""The list of studies: newest first, each in a line, and none is too damaged to be listed."""

import json
import os
import shutil
import zipfile

import pytest
from support.recorded import EVIDENCE
from support.seen import assert_as_recorded

from ebc_lab import load
from ebc_lab.results.catalogue import catalogue
from ebc_lab.study.inspect.status import status
from ebc_lab.study.store.bundle import export
from ebc_lab.study.store.study import Study


@pytest.fixture
def folder(finished, tmp_path):
    """done, done.zip and brief.zip, begun without a decision, planned without a run, damaged ones, and other
    things."""
    source = finished[1].study
    for name in ("done", "begun"):
        shutil.copytree(source.root, tmp_path / name)
    export(source, tmp_path / "done.zip")
    export(source, tmp_path / "brief.zip", brief=True)
    (tmp_path / "begun" / "auto_decisions.json").unlink()
    (tmp_path / "planned").mkdir()
    shutil.copy(source.root / "study.json", tmp_path / "planned")
    for name, content in (("cut", '{"config": {'), ("edited", '{"config": {}, "checksum": "0"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.json").write_text(content)
    (tmp_path / "odd.zip").write_bytes(b"PK\x05\x06" + bytes(18))
    whole = bytearray((tmp_path / "done.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "done.zip") as archive:
        header = archive.getinfo("study.json").header_offset
    whole[header + 60 : header + 80] = bytes(20)  # of what is packed there
    (tmp_path / "torn.zip").write_bytes(whole)
    (tmp_path / "a folder").mkdir()
    (tmp_path / "notes.txt").write_text("nothing")
    return tmp_path


def test_every_study_is_told_and_damage_is_not_raised(folder):
    found = {one["place"].rpartition("/")[2]: one for one in catalogue(folder)}
    assert {name: one["state"] for name, one in found.items()} == {
        "done": "finished",
        "done.zip": "finished",
        "brief.zip": "finished",
        "begun": "interrupted",
        "planned": "empty",
        "cut": "damaged",
        "edited": "damaged",
        "odd.zip": "damaged",
        "torn.zip": "damaged",
    }
    done, packed = found["done"], found["done.zip"]
    counts = status(Study(folder / "done"))["runs"]
    in_status = counts["training"] + counts["unused"]
    assert [one["runs"] for one in (done, packed, found["brief.zip"])] == [in_status] * 3
    assert status(Study(folder / "planned"))["state"] == "empty"
    assert done["headline"] == packed["headline"].strip()
    assert "undecided" in done["headline"]
    assert (done["bundle"], packed["bundle"]) == (False, True)
    assert done["bytes"] > packed["bytes"] > 0
    assert "edited after it was written" in found["edited"]["headline"]
    assert all(found[name]["headline"] for name in ("cut", "odd.zip", "torn.zip"))
    json.dumps(list(found.values()), allow_nan=False)


def test_recorded_studies_have_their_answers_as_headlines(tmp_path):
    for name in ("cautious", "default", "rate_fit"):
        shutil.copy(EVIDENCE / f"{name}.zip", tmp_path)
    unpacked = load(tmp_path / "default.zip")  # as long as it is there
    shutil.copytree(unpacked.root, tmp_path / "edited")
    decisions = json.loads((tmp_path / "edited" / "auto_decisions.json").read_text())
    decisions["finals"]["rule"] = "another"
    (tmp_path / "edited" / "auto_decisions.json").write_text(json.dumps(decisions))
    told = {one["place"].rpartition("/")[2]: one for one in catalogue(tmp_path)}
    keys = ("state", "stages", "scale", "runs", "headline")
    lines = [f"{name}: {' | '.join(str(told[name][key]) for key in keys)}" for name in sorted(told)]
    assert_as_recorded("catalogue", "\n".join(lines))


def test_the_newest_is_first(folder):
    for age, name in enumerate(("planned", "begun", "done")):
        for file in ("study.json", "auto_decisions.json"):
            if (folder / name / file).exists():  # of which the later one is shown as its age
                os.utime(folder / name / file, (2e9 - age, 2e9 - age))
    assert [one["name"] for one in catalogue(folder)][:3] == ["planned", "begun", "done"]
    os.utime(folder / "done" / "auto_decisions.json", (2e9 + 9, 2e9 + 9))
    assert [one["name"] for one in catalogue(folder)][:3] == ["done", "planned", "begun"]


def test_a_folder_without_studies_is_an_empty_list(tmp_path):
    assert catalogue(tmp_path) == []
    assert catalogue(tmp_path / "none") == []
