"""A study is mirrored while it runs, and goes on elsewhere as if its machine had never been lost."""

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.called import CLI, called
from support.drivers import held_at_first, sessions, until_true, without_timing
from support.nodes import kill, state_of
from support.s3 import BUCKET

from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.study.mirror.place import Place
from ebc_lab.study.mirror.pull import pull
from ebc_lab.study.mirror.upload import kept_elsewhere, refuse_unusable
from ebc_lab.study.store import attempts
from ebc_lab.study.store.study import Study
from ebc_lab.study.store.verify import verify

until = functools.partial(until_true, within_s=180.0)


def command(tiny, out: Path, *more: str) -> list[str]:
    """The first stage of a study, on two workers that write a checkpoint at every step."""
    launcher = ["launcher=local", "launcher.slots=2", "launcher.checkpoint_every_s=0"]
    mirror = [f"study.mirror=s3://{BUCKET}/lab", "study.mirror_every_s=0.1"]
    return ["autopilot", *tiny, "study.stages=[lr_sweep]", *launcher, *mirror, f"output_dir={out}", *more]


def lose_the_machine(driver: subprocess.Popen, study: Study) -> None:
    """Kill everything that runs a study, and its disk."""
    at_work = [note["pid"] for s in sessions(study, "local") for note in s.notes().values()]
    driver.kill()
    for pid in at_work:
        kill(pid)
    driver.wait()
    until(lambda: not any(map(state_of, at_work)))
    shutil.rmtree(study.root.parent)


def begins(study: Study, run_id: str) -> int:
    return [event["event"] for event in attempts.log(study.run_dir(run_id))].count("begin")


@pytest.mark.thorough
def test_a_study_whose_machine_is_lost_goes_on_from_its_mirror(tiny, finished, s3, tmp_path):
    env = {**os.environ, "PYTHONPATH": held_at_first(tmp_path)}
    here, there = tmp_path / "here", tmp_path / "there"
    study = Study(here / "lost")
    driver = subprocess.Popen(
        [*CLI, *command(tiny, here, "study.name=lost")], env=env, stdout=subprocess.DEVNULL
    )
    place = Place(f"s3://{BUCKET}/lab/lost")

    def mirrored(ending: str) -> list[str]:
        index = place.latest()
        return [path for path in (index.files if index else {}) if path.endswith(ending)]

    until(lambda: mirrored("checkpoint.pt"))  # the first run goes alone, and is held
    [first] = mirrored("checkpoint.pt")
    (study.root / first).with_name("go").touch()
    until(lambda: mirrored("result.json") and len(mirrored("checkpoint.pt")) == 2)
    lose_the_machine(driver, study)

    told = called("pull", f"s3://{BUCKET}/lab/lost", str(there), cwd=tmp_path)
    assert told.returncode == 0
    assert "\nthis continues the study:\n  ebc-lab autopilot " in told.stdout
    pulled = Study(there / "lost")
    done = {run for run in pulled.run_ids() if pulled.has_result(run)}
    begun = {run for run in pulled.run_ids() if pulled.run_files(run).checkpoint.exists()}
    assert (len(done), len(begun)) == (1, 2)
    on = called(*command(tiny, there, "study.name=lost"), cwd=tmp_path)
    assert on.returncode == 0, on.stdout + on.stderr
    assert all(begins(pulled, run) == 1 for run in done)  # not trained again
    assert all(begins(pulled, run) == 2 for run in begun)
    assert not any(attempts.restarts(pulled.run_dir(run)) for run in begun)  # but from their checkpoints
    assert verify(pulled)["ok"]
    ours, theirs = (s.root / "summary_lr_sweep.csv" for s in (pulled, finished[1].study))
    assert without_timing(ours) == without_timing(theirs)
    assert set(mirrored("")) == set(kept_elsewhere(pulled.root))


@pytest.mark.parametrize("address", ["folder"], indirect=True)
def test_a_mirror_out_of_reach_is_said_once_and_caught_up_with(mirrored, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route to host")

    def said(what: str) -> int:
        return sum(what in line for line in mirrored.said)

    with mirrored.running():
        until(lambda: "acceptance.json" in (Place(mirrored.address).latest().files or {}))
        with monkeypatch.context() as patch:
            patch.setattr(Place, "write", fail)
            (mirrored.study.root / "acceptance.md").write_text("later\n")
            until(lambda: said("cannot be written"))
        until(lambda: said("answers again"))
    assert said("cannot be written") == 1
    assert mirrored.said[-1].startswith("mirrored: ")
    (mirrored.study.root / "acceptance.md").write_text("still later\n")
    mirrored.said.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Place, "write", fail)
        mirrored.mirror()  # it was there before, so it does not stop the study
    assert "the same command mirrors them" in mirrored.said[-1]
    mirrored.mirror()
    pull(mirrored.address, tmp_path / "there")
    assert (tmp_path / "there" / "done" / "acceptance.md").read_text() == "still later\n"


@pytest.mark.parametrize("mirror", ["lab", "lab/done/copies", ""], ids=["the study", "in it", "around it"])
def test_a_mirror_is_neither_the_studys_folder_nor_in_or_around_it(mirror, tmp_path):
    config = compose(["scale=smoke", "study.name=done", f"study.mirror=file://{tmp_path}/{mirror}"])
    root = tmp_path / ("lab/done" if mirror else "done/done")
    with pytest.raises(UserError, match="is the study's own folder: choose another"):
        refuse_unusable(config, Study(root))
    assert not root.exists()
