"""What a driver makes of the queue's answers; the queue itself is made up here, test_slurm.py has a real
one.
"""

import subprocess
from dataclasses import replace

import pytest
from support.called import refused

from ebc_lab.config.errors import UserError
from ebc_lab.study.launch import queue, slurm
from ebc_lab.study.launch.queue import Job, QueueUnavailable
from ebc_lab.study.launch.slurm import SlurmPool
from ebc_lab.study.launch.submit import REFUSALS
from ebc_lab.study.store.study import Study


@pytest.fixture
def config(resolved):
    return replace(resolved, launcher=replace(resolved.launcher, name="slurm", slots=2, queue_every_s=0))


@pytest.fixture
def study(tmp_path):
    study = Study(tmp_path / "s")
    study.prepare()
    return study


@pytest.fixture
def pool(config, study, monkeypatch):
    """A pool of two running jobs, whose queue is `pool.answer`, and what it says."""
    pool = SlurmPool(config, study, 2, lambda text: pool.said.append(text))
    pool.said, pool.answer = [], {"7_0": Job("RUNNING", "None"), "7_1": Job("RUNNING", "None")}
    pool.jobs, pool.accepted = dict(pool.answer), True
    pool.submitted_here = set(pool.answer)
    monkeypatch.setattr(queue, "cached_jobs", lambda session, every_s: pool.answer)
    return pool


def test_a_job_that_is_ending_may_come_back_and_counts_until_it_has_been_ending_for_long(pool, monkeypatch):
    pool.answer["7_0"] = Job("COMPLETING", "None")
    pool._deaths()
    assert set(pool.jobs) == {"7_0", "7_1"}
    pool.answer["7_0"] = Job("PENDING", "BeginTime")
    pool._deaths()
    assert pool.jobs["7_0"].state == "PENDING"
    assert pool.said[-1] == "1 job(s) running, 1 waiting (BeginTime)"
    pool.answer["7_0"] = Job("COMPLETING", "None")
    monkeypatch.setattr(queue, "GONE_S", 0.0)
    assert [d.worker for d in pool._deaths()] == ["7_0"]
    assert set(pool.jobs) == {"7_1"}
    assert pool.slots == 2, "nobody cancelled it"


def test_jobs_of_a_submission_that_was_cut_off_are_found_by_their_name(pool):
    pool.answer["8"] = Job("PENDING", "Priority")
    pool._deaths()
    assert set(pool.jobs) == {"7_0", "7_1", "8"}
    assert "8" not in pool.submitted_here


def test_a_replacement_that_is_refused_is_tried_again_while_the_others_work(pool, monkeypatch):
    def refuse(*_, **__):
        raise UserError("Slurm does not accept the job (error: socket timed out).")

    monkeypatch.setattr(slurm, "submit_jobs", refuse)
    del pool.jobs["7_0"]
    for _ in range(REFUSALS - 1):
        pool.submit_at = 0.0
        pool._start_workers(2)
    assert "socket timed out" in pool.said[-1]
    pool.submit_at = 0.0
    with pytest.raises(UserError, match="socket timed out"):
        pool._start_workers(2)


def test_jobs_that_run_other_code_are_ended_and_not_adopted(pool, config, study, monkeypatch):
    ended = []
    monkeypatch.setattr(queue, "jobs_named", lambda name: dict(pool.answer))
    monkeypatch.setattr(queue, "stop_jobs", lambda session: (ended.append(session.root), (2, []))[1])
    adopted = SlurmPool(config, study, 2, lambda text: None)
    assert set(adopted.jobs) == {"7_0", "7_1"}
    assert adopted.session.root == pool.session.root
    slower = replace(config, launcher=replace(config.launcher, heartbeat_s=17))
    fresh = SlurmPool(slower, study, 2, lambda text: None)
    assert fresh.jobs == {}
    assert ended == [pool.session.root]
    assert queue.session_of(study).root == fresh.session.root


def test_jobs_whose_session_is_out_of_reach_are_named(pool, study):
    (pool.session.root / "session.json").unlink()
    with pytest.raises(UserError, match=r"named ebc-s-\S+, were started on .*XDG_STATE_HOME"):
        queue.session_of(study)


def test_a_slurm_that_is_not_there_or_fails_without_a_word_is_silent(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(QueueUnavailable, match="`squeue` not found"):
        queue.jobs_named("x")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", ""))
    with pytest.raises(QueueUnavailable, match="fails without a message"):
        queue.jobs_named("x")


def test_without_slurm_a_study_is_refused_before_anything_is_written(tmp_path, own_copy):
    """A program that is missing is named; what stands already stays as it was."""
    _, study = own_copy
    there = _times(tmp_path)
    asked = ("scale=smoke", "device=cpu", "launcher=slurm", f"output_dir={study.root.parent}")
    for command in (("autopilot",), ("stage", "lr_sweep"), ("autopilot", "-m", "study.stages=[lr_sweep]")):
        for name in ("new", study.name):
            said = refused(*command, *asked, f"study.name={name}", cwd=tmp_path, PATH="")
            assert said == "error: `srun` not found; use launcher=local, or run this on a login node."
    for program in queue.PROGRAMS:
        (tmp_path / program).write_text(
            "#!/bin/sh\necho 'slurm_load_jobs error: no controller' >&2\nexit 1\n"
        )
        (tmp_path / program).chmod(0o755)
    said = refused("autopilot", *asked, "study.name=new", cwd=tmp_path, PATH=str(tmp_path))
    assert "Slurm does not answer here (slurm_load_jobs error: no controller); use launcher=local" in said
    assert {path: time for path, time in _times(tmp_path).items() if path.name not in queue.PROGRAMS} == there


def _times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


ROWS = "7|0|RUNNING|None\n7|1|PENDING|Priority|x\n8|N/A|COMPLETED|None\n"
JOBS = {"7_0": Job("RUNNING", "None"), "7_1": Job("PENDING", "Priority|x"), "8": Job("COMPLETED", "None")}
NOTICES = [
    "squeue: Warning: the accounting database is slow\n",
    "squeue: error: Unable to find plugin select/cons_res\n",
    "\n*** Downtime on 2026|11|28: see | the | site ***\n\n",
    "2026|11|28|downtime\n",
    "slurm_load_jobs error: socket timed out, trying again\n",
]


@pytest.mark.parametrize("notice", NOTICES)
def test_notices_around_an_answer_of_squeue_are_no_jobs(notice):
    assert queue.parse_squeue(ROWS + notice) == JOBS
    assert queue.parse_squeue(notice + ROWS.replace("\n", " \r\n")) == JOBS
    assert queue.parse_squeue(notice) == {}


def test_an_answer_of_squeue_that_is_an_error_does_not_mean_that_there_are_no_jobs(tmp_path, monkeypatch):
    squeue = tmp_path / "squeue"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for code, stream in ((0, 1), (0, 2), (1, 1), (1, 2)):
        squeue.write_text(
            "#!/bin/sh\nprintf 'NOTICE: d\\351connexion\\n' >&2\n"
            f"echo 'slurm_load_jobs error: Unable to contact slurm controller' >&{stream}\n"
            f"echo 'see the site' >&2\nexit {code}\n"
        )
        squeue.chmod(0o755)
        with pytest.raises(QueueUnavailable, match=r"^slurm_load_jobs error: Unable to contact"):
            queue.jobs_named("x")
