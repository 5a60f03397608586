import json
from dataclasses import replace

import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.records.json_files import read_checksummed, with_checksum, write_checksummed
from ebc_lab.study.autopilot import Listener, autopilot
from ebc_lab.study.inspect.compare import compare
from ebc_lab.study.store.study import Study


@pytest.fixture
def pair(finished, own_copy):
    """The finished study, and a copy of it to be changed."""
    return finished[1].study, own_copy[1]


def test_what_differs_is_named_and_timing_is_not(pair):
    a, b = pair
    alike = compare(a, b)
    assert alike["runs"]["counts"][0]["training"] == alike["runs"]["common"] == alike["runs"]["equal"] > 0
    assert (alike["settings"], alike["machine"], alike["same_corpus"]) == ({}, {}, True)
    assert not any(line["flipped"] for line in alike["verdict"])
    assert {"lr", "natural_kl"} <= set(alike["decisions"]["lr_sweep"]["adam_none"])
    first, second = [r.run_id for r in b.records() if "_n25_s0-" in r.run_id][:2]
    path = b.run_dir(first) / "result.json"
    result = read_checksummed(path, "")
    write_checksummed(path, {**result, "test_loss": result["test_loss"] + 1, "wall_s": 9.0})
    other = b.run_dir(second) / "result.json"
    write_checksummed(other, {**read_checksummed(other, ""), "wall_s": 9.0, "curve": []})
    decisions = b.decisions()
    finals = decisions["finals"]["tracks"]["adam_none"]
    line = finals["verdict"][0]
    line["verdict"] = "fail" if line["verdict"] != "fail" else "pass"
    name = finals["roles"]["baseline"]
    finals["arms"][name]["test_loss"] += 0.5
    decisions["finals"] = with_checksum(decisions["finals"], "decision_sha256")
    (b.root / "auto_decisions.json").write_text(json.dumps(decisions))
    header = b.header()
    header["hardware"]["cpu"] = "another one"
    write_checksummed(b.root / "study.json", header)
    found = compare(a, b)
    assert list(found["runs"]["different"]) == [first]
    assert set(found["runs"]["different"][first]) == {"test_loss"}
    assert found["runs"]["equal"] == found["runs"]["common"] - 1
    assert [x["name"] for x in found["verdict"] if x["flipped"]] == [line["name"]]
    assert found["arms"][name]["difference"] == pytest.approx(0.5)
    assert found["machine"] == {"cpu": [a.header()["hardware"]["cpu"], "another one"]}


@pytest.mark.thorough
def test_studies_of_other_settings_share_the_runs_that_are_the_same(finished, tmp_path):
    config, outcome, _ = finished
    sweep = replace(config.lr_sweep, grids={**config.lr_sweep.grids, "adam": [2e-2, 4e-2]})
    other = replace(config, output_dir=str(tmp_path), lr_sweep=sweep)
    autopilot(other, Listener(), stages=["lr_sweep"])
    found = compare(outcome.study, Study(tmp_path / config.study.name))
    assert list(found["settings"]) == ["lr_sweep.grids.adam"]
    assert found["settings"]["lr_sweep.grids.adam"] == [[1e-2, 2e-2, 4e-2], [2e-2, 4e-2]]
    assert found["runs"]["equal"] == found["runs"]["common"] == found["runs"]["counts"][1]["training"]
    assert found["decided"] == [config.study.stages, ["lr_sweep"]]
    assert list(found["decisions"]) == ["lr_sweep"]
    assert [line["verdict"][1] for line in found["verdict"]] == [None] * 7
    assert found["arms"] == {}


def test_an_edited_file_of_either_is_refused(pair):
    path = next(pair[1].runs.glob("*_n25_*")) / "result.json"
    path.write_text(path.read_text().replace('"steps": 25', '"steps": 26'))
    for either in (pair, reversed(pair)):
        with pytest.raises(UserError, match=str(path)):
            compare(*either)


def test_an_arm_that_one_study_has_is_one_line_and_equal_names_are_told_by_their_place(pair):
    a, b = pair
    header = b.header()
    arms = dict(header["requested"]["ablation"]["arms"])
    arms["hot"] = {"about": "at twice the rate", "lr_scale": 2.0, "settings": {"optimizer": {"lr": 1.0}}}
    header["requested"]["ablation"] = {**header["requested"]["ablation"], "arms": arms}
    write_checksummed(b.root / "study.json", header)
    found = compare(a, b)
    assert found["settings"] == {"arm hot": [None, "at twice the rate"]}
    assert found["studies"] == ["/".join(root.parts[-2:]) for root in (a.root, b.root)]
    assert found["answers"][0] == found["answers"][1] != []
