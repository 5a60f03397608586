"""`ebc-lab worker` joins a running study from another machine, and any of them may be killed."""

import contextlib
import functools
import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.called import CLI, called, refused
from support.drivers import held_at_first, until_true, without_timing

from ebc_lab.config.errors import UserError
from ebc_lab.study.launch import join
from ebc_lab.study.launch.session import GUEST, Session, code_to_match, sessions_in
from ebc_lab.study.store import attempts
from ebc_lab.study.store.study import Study
from ebc_lab.study.store.verify import verify

DEADLINE_S = 180.0
until = functools.partial(until_true, within_s=DEADLINE_S)
OTHER = ["unshare", "--uts", "sh", "-c", 'hostname other && exec "$@"', "sh"] if os.geteuid() == 0 else []


def command(tiny, out: Path) -> list[str]:
    launcher = ["launcher=local", "launcher.slots=1", "launcher.checkpoint_every_s=0", "launcher.join=true"]
    study = ["study.stages=[lr_sweep]", f"output_dir={out}", "study.name=j"]
    return [*CLI, "autopilot", *tiny, *launcher, *study]


def guests(study: Study) -> dict[str, dict]:
    """The workers that have joined the study's driver, by name."""
    notes = {w: note for s in sessions_in(study) for w, note in s.notes().items()}
    return {w: note for w, note in notes.items() if w.startswith(GUEST) and note["run_id"]}


@contextlib.contextmanager
def started(*words: str, env=None):
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.thorough
def test_workers_that_join_share_the_runs_and_may_be_killed_like_the_driver(tiny, finished, tmp_path):
    """A driver, a worker of another host that is killed with a run in its hands, a second one that outlives
    the driver and joins the next: the bytes of an undisturbed study, and no run trained by two at once."""
    study = Study(tmp_path / "j")
    held = {**os.environ, "PYTHONPATH": held_at_first(tmp_path)}
    worker = [*OTHER, *CLI, "worker", str(study.root), "--wait", "60"]
    with started(*command(tiny, tmp_path), env=held) as driver, started(*worker, env=held) as first:
        canary = until(lambda: [r for r in study.run_ids() if study.progress(r)])[0]
        until(lambda: study.sessions.is_dir())
        (study.run_dir(canary) / "go").touch()
        [note] = until(lambda: guests(study)).values()
        taken = note["run_id"]
        status = called("status", str(study.root), "--json", cwd=tmp_path)
        assert note["host"] in status.stdout
        os.kill(note["pid"], signal.SIGKILL)
        until(lambda: any(e["event"] == "lost" for e in attempts.log(study.run_dir(taken))))
        first.wait(timeout=DEADLINE_S)
        driver.kill()
        driver.wait()
    with started(*worker) as second, started(*command(tiny, tmp_path)) as driver:
        assert driver.wait(timeout=DEADLINE_S) == 0, driver.stderr.read()
        assert second.wait(timeout=DEADLINE_S) == 0
        assert "is finished" in second.stderr.read()
    assert verify(study)["ok"]
    name = "summary_lr_sweep.csv"
    assert without_timing(study.root / name) == without_timing(finished[1].study.root / name)
    events = {run: attempts.log(study.run_dir(run)) for run in study.run_ids()}
    ends = {run: [e["event"] for e in log].count("end") for run, log in events.items()}
    assert set(ends.values()) == {1}
    hosts = {e["host"] for log in events.values() for e in log if e["event"] == "begin"}
    assert len(hosts) == (2 if OTHER else 1)
    assert sum(e["event"] == "begin" for e in events[taken]) >= 2


def test_a_worker_is_refused_in_a_sentence(finished, tmp_path):
    study = finished[1].study
    assert "launcher.join=true" in refused("worker", str(study.root), cwd=tmp_path)
    assert "there is no study" in refused("worker", "none", "--output-dir", str(tmp_path), cwd=tmp_path)


def test_a_worker_goes_from_driver_to_driver_and_says_why_it_ends(tmp_path, monkeypatch):
    study = Study(tmp_path / "s")
    study.prepare()
    finished, worked, codes = [], [], []
    monkeypatch.setattr(join, "_finished", lambda study: bool(finished))
    monkeypatch.setattr(join, "sessions_in", lambda study: codes[:1])
    monkeypatch.setattr(join, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda s: None))

    def work(session, say):
        worked.append(session)
        return codes.pop(0)

    monkeypatch.setattr(join, "_work", work)
    for drivers, over, code, told in [
        ([0, 0], [], 0, ["nobody runs study s any more"]),
        ([0], [True], 0, ["study s is finished"]),
        ([0, 75, 0], [True], 75, []),
    ]:
        said: list[str] = []
        finished[:], codes[:], worked[:] = over, drivers, []
        assert join.join(study.root, 0.0, said.append) == code
        assert said == told
        assert worked == drivers[: 1 + drivers.index(code) if code else None]
    codes[:] = []
    study.header_file.write_text("{}")
    with pytest.raises(UserError, match="nobody runs study s so that workers can join"):
        join.join(study.root, 0.0, print)  # even where it is finished: this one has not worked for it


def test_a_worker_of_other_code_than_the_drivers_is_refused(tmp_path):
    study = Study(tmp_path / "s")
    study.prepare()
    here = code_to_match()
    known = {name: version for name, version in here.items() if version is not None}
    about = {"bound": True, "idle_s": None, "checkpoint_every_s": 1.0, "beat_s": 1.0, "processes_per_run": 1}
    code = {**here, "torch": "1.0", "git": None}  # not known there, so it says nothing
    session = Session.begin(study, "local", shared=True, several_gpus=False, code=code, **about)
    said = rf"other code than is installed here \(torch 1\.0 there, {known['torch']} here\): install the same"
    with pytest.raises(UserError, match=said.replace("+", r"\+")):
        join._work(session, print)
