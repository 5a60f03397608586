"""A study of one's own: its files go with it, from any folder to any other."""

import json
import shlex
import sys

import pytest

from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.own.sources import PLACES, find
from ebc_lab.study.autopilot import Listener, autopilot
from ebc_lab.study.inspect.forecast import planned
from ebc_lab.study.inspect.reproduce import again, continuing
from ebc_lab.study.inspect.status import status
from ebc_lab.study.store import bundle, manifest
from ebc_lab.study.store.changes import requested
from ebc_lab.study.store.find import find as find_study
from ebc_lab.study.store.own import keep
from ebc_lab.study.store.study import Study
from ebc_lab.study.store.verify import verify

PART = """import torch
from carried_help import rate


class Carried(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr=lr, momentum=rate)
"""
SUITE = """
study: {stages: [lr_sweep, ablation]}
seeds: [0, 1]
lr_sweep:
  {optimizers: [adam], replicates: 2, control_shapes: [trapezoid], control_warmups: [0.2],
   control_scales: [1.0], control_extensions: 0, baseline_scales: [0.5]}
ablation:
  question: is it better?
  reference: adam
  steps: 15
  arms:
    adam: {about: Adam}
    mine: {about: mine, settings: {optimizer: {name: custom, target: './carried_opt.py:Carried'}}}
"""
TINY = ["lr_sweep.long_steps=15", "dtype=float32", "threads_per_run=1", "compile=off"]


@pytest.fixture(scope="module")
def own(tiny, tmp_path_factory, own_places):
    """A finished study of an own suite, begun in a folder of its own; and how it was asked for."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "carried_opt.py").write_text(PART)
    (folder / "carried_help.py").write_text("rate = 0.9\n")
    (folder / "carried.yaml").write_text(SUITE)
    usual = [o for o in tiny if not o.startswith(("calibrate", "finals"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PLACES, "")
        patch.setattr(sys, "path", [*sys.path])
        patch.chdir(folder)
        asked = [*usual, *TINY, "study=./carried.yaml", "launcher=inline", "output_dir=out"]
        config = compose(asked)
        autopilot(config, Listener())
        study = Study(folder / "out" / "carried")
        yield study, asked, folder


def test_a_suite_that_builds_on_another_of_ones_own_keeps_both(tmp_path, monkeypatch, own_places):
    monkeypatch.setenv(PLACES, "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(SUITE.replace("./carried_opt.py:Carried", "torch.optim:SGD"))
    (tmp_path / "more.yaml").write_text("defaults: [base]\nseeds: [4]\n")
    config = compose(["scale=smoke", "study=./more.yaml"], here=False)
    study = Study(tmp_path / "kept")
    kept = keep(study, config)
    assert (kept["suite"], [*kept["files"]]) == ("more.yaml", ["more.yaml", "base.yaml"])
    record = {"requested": requested(config), "config": to_dict(config), "own": kept}
    study.header_file.write_text(json.dumps(record))
    again = compose([f"from={study.header_file}"], here=False)
    assert again.own_files == {name: str(study.own / name) for name in kept["files"]}


@pytest.fixture
def elsewhere(own, tmp_path, monkeypatch):
    """The study's bundle, unpacked in an empty folder; of its own files only the copies are left."""
    study = own[0]
    bundle.export(study, tmp_path / "carried.zip")
    monkeypatch.setenv(PLACES, "")
    monkeypatch.chdir(tmp_path)
    return bundle.unpack(tmp_path / "carried.zip", tmp_path / "carried")


@pytest.mark.thorough
def test_its_files_are_copied_recorded_and_checked_and_runs_have_its_name(own):
    study = own[0]
    names = ["carried.yaml", "carried_help.py", "carried_opt.py"]
    assert sorted(path.name for path in study.own.iterdir()) == names
    header = study.header()
    assert (header["own"]["suite"], sorted(header["own"]["files"])) == ("carried.yaml", names)
    assert {f"own/{name}" for name in names} <= set(manifest.read(study.root)["files"])
    assert "own_files" not in header["requested"]
    assert str(study.root.parent.parent) not in json.dumps(header["config"]["ablation"])
    assert verify(study)["ok"]
    runs = study.run_ids()
    assert any(run_id.startswith("carried_none_baseline") for run_id in runs)
    assert not any("custom" in run_id for run_id in runs)
    assert status(study)["state"] == "finished"


@pytest.mark.thorough
def test_elsewhere_it_is_planned_from_its_copies_and_trained_again_with_the_same_result(own, elsewhere):
    words = shlex.split(again(elsewhere))[2:]
    config = compose([*words, "output_dir=."], here=False)
    assert config.ablation.arms["mine"].settings["optimizer"]["sha256"] == find("carried_opt:Carried").sha256
    found = planned(config)
    assert found["changed"] == []
    total = found["stages"]["total"]["expected"]
    assert total["done"] == total["runs"] > 0
    assert words[0] in continuing(elsewhere, elsewhere.header())
    second = autopilot(compose([*words, "launcher=inline", "output_dir=again"]), Listener()).study
    assert second.run_ids() == own[0].run_ids()
    assert {path.name for path in second.own.iterdir()} == {path.name for path in own[0].own.iterdir()}
    for run_id in second.run_ids():
        sums = [study.result(run_id).get("weights_checksum") for study in (own[0], second)]
        assert sums[0] == sums[1]


@pytest.mark.thorough
def test_an_edited_file_is_named_and_texts_may_be_edited_without_force(own, monkeypatch, undrawn):
    study, asked, folder = own
    monkeypatch.setenv(PLACES, "")
    monkeypatch.chdir(folder)
    help_ = folder / "carried_help.py"
    before = help_.read_text()
    help_.write_text("rate = 0.8\n")
    try:
        with pytest.raises(UserError, match=r"\(carried_help.py was edited since; .*own/\).*--force"):
            autopilot(compose(asked), Listener())
    finally:
        help_.write_text(before)
    suite = folder / "carried.yaml"
    before = suite.read_text()
    after = before.replace("is it better?", "is mine better?").replace("about: mine", "about: my own")
    suite.write_text(after)
    try:
        assert planned(compose(asked))["changed"] == []
        assert autopilot(compose(asked), Listener()).trained == 0
        assert "my own" in json.dumps(study.decisions())
        assert "is mine better?" in json.dumps(study.header()["config"])
        assert status(study)["state"] == "finished"
    finally:
        suite.write_text(before)
        autopilot(compose(asked), Listener())


def test_the_file_of_a_suite_is_no_study_and_its_name_is_said(own, monkeypatch):
    monkeypatch.chdir(own[2])
    with pytest.raises(UserError, match=r"carried.yaml is a suite's file, not a study: .* name, carried\."):
        find_study("./carried.yaml", "out")
    (own[2] / "scaled.yaml").write_text("study: {name: 'one_${scale}'}\n")
    for name in ("one_smoke", "one_mini", "other"):
        (own[2] / "out" / name).mkdir(parents=True)
        (own[2] / "out" / name / "study.json").touch()
    with pytest.raises(
        UserError, match=r"give the study's name, (one_smoke or one_mini|one_mini or one_smoke)\."
    ):
        find_study("scaled.yaml", "out")
