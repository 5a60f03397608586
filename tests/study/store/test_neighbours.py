"""A run that another study of the same output folder has finished is not trained again."""

import os
import re
import shutil
from dataclasses import replace

import pytest
from support.drivers import TABLES, without_timing

from ebc_lab.records.json_files import read_checksummed, write_checksummed
from ebc_lab.records.locks import run_lock
from ebc_lab.report.conclude import concluding
from ebc_lab.study.autopilot import autopilot
from ebc_lab.study.stages.stage import planned_runs
from ebc_lab.study.store import attempts
from ebc_lab.study.store.bundle import export, unpack
from ebc_lab.study.store.neighbours import finished_elsewhere, take
from ebc_lab.study.store.study import study_of
from ebc_lab.study.store.verify import verify


@pytest.fixture
def second(own_copy):
    """(configuration, study) of one with the same runs beside the finished study."""
    config, _ = own_copy
    config = replace(config, study=replace(config.study, name="second"))
    return config, study_of(config)


@pytest.fixture
def first_runs(resolved):
    return planned_runs("lr_sweep", resolved, {}, lambda specs: {})[0]


def test_a_second_study_takes_the_runs_of_the_first_and_is_whole_without_it(
    finished, own_copy, second, undrawn, tmp_path
):
    _, first = own_copy
    config, study = second
    said = []
    outcome = autopilot(config, concluding(say=said.append))
    assert outcome.trained == 0
    told = [text for text in said if "taken from" in text]
    assert len(told) == 2  # once for the source, and how many they were in all
    assert told[0] == "lr_sweep: runs are taken from done, where they are finished"
    assert re.fullmatch(r"runs taken from other studies, and not trained: \d+ from done", told[1])
    shutil.rmtree(first.root)
    for table in TABLES:
        assert without_timing(study.root / table) == without_timing(finished[1].study.root / table)
    assert verify(study)["ok"]
    export(study, tmp_path / "second.zip")
    ended = {d.name: attempts.log(d)[-1]["event"] for d in study.runs.iterdir()}
    timed = {name for name in ended if name.startswith("overhead_")}
    assert {ended[name] for name in timed} == {"end"}  # measured anew
    assert {ended[name] for name in set(ended) - timed} == {"taken"}


@pytest.mark.parametrize("what", ["steps", "no steps", "result", "manifest", "no streams"])
def test_nothing_is_taken_from_a_run_that_is_not_as_recorded(own_copy, second, first_runs, what):
    _, first = own_copy
    spec = first_runs[0]
    files = first.run_files(spec.run_id)
    assert spec.run_id in finished_elsewhere(second[1], first_runs)
    assert finished_elsewhere(first, first_runs) == {}  # it is no neighbour of its own
    result = read_checksummed(files.result, "")
    if what == "result":  # with a checksum that holds
        write_checksummed(files.result, {**result, "val_loss": 0.1})
    elif what == "no streams":  # and nothing recorded
        first.manifest_file.unlink()
        write_checksummed(files.result, {k: v for k, v in result.items() if k != "streams"})
    elif what == "no steps":  # as in a brief bundle, but they are recorded
        files.steps.unlink()
    elif what == "manifest":
        first.manifest_file.write_text("{}")
    else:
        files.steps.write_bytes(files.steps.read_bytes()[:-2])
    there = finished_elsewhere(second[1], first_runs)
    assert spec.run_id not in there
    assert bool(there) == (what != "manifest")
    if "steps" in what:  # also where they change while they are copied
        assert not take(second[1], spec, first)
        assert not second[1].has_result(spec.run_id)


def test_a_study_that_came_as_a_brief_bundle_is_a_neighbour_too(own_copy, second, first_runs, tmp_path):
    _, first = own_copy
    export(first, tmp_path / "brief.zip", brief=True)
    shutil.rmtree(first.root)
    unpack(tmp_path / "brief.zip", first.root)
    assert set(finished_elsewhere(second[1], first_runs)) == {spec.run_id for spec in first_runs}
    assert take(second[1], first_runs[0], first)
    assert second[1].has_result(first_runs[0].run_id)
    files = second[1].run_files(first_runs[0].run_id)
    assert not files.steps.exists()
    assert attempts.history(files.directory).software == (attempts.software(attempts.code_here()),)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_neighbour_that_nobody_may_look_at_stops_no_study(own_copy, second, first_runs):
    _, first = own_copy
    private = first.root.parent / "private"
    private.mkdir(mode=0o700)
    path = first.root.parent
    for folder in (path, *path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        assert finished_elsewhere(second[1], first_runs)
    finally:
        os.seteuid(0)


def test_a_run_that_a_process_is_on_is_left_to_it(own_copy, second, first_runs):
    _, first = own_copy
    _, study = second
    study.write_spec(first_runs[0])
    with run_lock(study.run_dir(first_runs[0].run_id)):
        assert not take(study, first_runs[0], first)
    assert take(study, first_runs[0], first)
    assert not take(study, first_runs[0], first)


def test_a_failure_is_not_taken(own_copy, second, first_runs):
    _, first = own_copy
    path = first.run_files(first_runs[0].run_id).result
    first.manifest_file.unlink()
    write_checksummed(path, {**read_checksummed(path, ""), "outcome": "failed"})
    assert set(finished_elsewhere(second[1], first_runs)) == {s.run_id for s in first_runs[1:]}
