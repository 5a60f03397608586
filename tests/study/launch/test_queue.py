"""What a driver makes of the queue's answers; the queue itself is made up here, test_slurm.py has a real
one.
"""

import subprocess
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from support.called import refused

from ebc_lab.config.errors import UserError
from ebc_lab.study.launch import queue, slurm
from ebc_lab.study.launch.pool import Death, WorkersFailed
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


def test_as_many_jobs_are_submitted_as_are_missing_and_say_so(pool, monkeypatch):
    asked = []

    def submit(config, folder, name, jobs, avoid):
        asked.append((folder, name, len(jobs), avoid))
        return [SimpleNamespace(job_id=f"9_{number}") for number in range(len(jobs))]

    monkeypatch.setattr(slurm, "submit_jobs", submit)
    pool.avoided = {"n2": "x", "n1": "x"}
    for slots, wanted in ((1, 9), (2, 9), (3, 2), (4, 9)):
        pool.slots = slots
        pool._start_workers(wanted)
    folder, name = pool.session.root / "submitit", queue.job_name(pool.session)
    assert asked == [(folder, name, 2, ["n1", "n2"])]
    assert pool.said == ["submitted 2 Slurm job(s): 9_0, 9_1"]
    pool.jobs["9_1"] = Job("PENDING", "Priority")
    assert pool._running_workers() == ["7_0", "7_1", "9_0"], "the queue has not shown the first yet"
    assert pool.submitted_here == {"7_0", "7_1", "9_0", "9_1"}


def test_a_submission_that_is_refused_waits_and_before_any_was_accepted_stops_the_study(pool, monkeypatch):
    monkeypatch.setattr(slurm, "submit_jobs", Mock(side_effect=UserError("no such partition.")))
    pool.config = replace(pool.config, launcher=replace(pool.config.launcher, queue_every_s=1e6))
    pool.jobs.clear()
    for _ in range(REFUSALS):
        pool._start_workers(2)
    assert slurm.submit_jobs.call_count == 1
    assert pool.said == ["no such partition. Trying again."]
    pool.submit_at, pool.accepted = 0.0, False
    with pytest.raises(UserError, match="no such partition"):
        pool._start_workers(2)


ENDED = [  # the state of a job that is over, what else is known of it, and the cause and the kind of its end
    ("COMPLETED", {}, "its job was COMPLETED", True),
    ("FAILED", {"code": 3}, "its job was FAILED, it ended with exit code 3", False),
    ("NODE_FAIL", {"log": False}, "its job was NODE_FAIL; it wrote no log: is the state folder {}?", False),
    ("CANCELLED", {}, "its job was CANCELLED", False),
    ("TIMEOUT", {"here": False}, "its job was TIMEOUT", False),
]


@pytest.mark.parametrize(("state", "about", "cause", "clean"), ENDED)
def test_how_a_job_ended_is_told_in_slurms_word_and_its_workers(pool, state, about, cause, clean):
    log = pool.session.root / "submitit" / "7_0_0_log.out"
    log.parent.mkdir()
    if about.get("log", True):
        log.touch()
    if "code" in about:
        pool.session.note("exit", "7_0", code=about["code"])
    if not about.get("here", True):
        pool.submitted_here.remove("7_0")
    pool.answer["7_0"] = Job(state, "None")
    [death] = pool._deaths()
    cause = cause.format("shared with the nodes")
    assert death == Death("7_0", cause, log, clean=clean, counts=about.get("here", True))
    assert pool._deaths() == []
    assert pool.said[-1] == "1 job(s) running, 0 waiting"


def test_jobs_that_somebody_cancels_are_not_replaced_and_with_the_last_the_study_stops(pool, monkeypatch):
    monkeypatch.setattr(slurm, "submit_jobs", Mock())
    pool.killed["7_0"] = "no sign of life"
    left = [("7_0", 2, []), ("7_1", 1, [1]), ("7_2", 0, [0]), ("7_3", -1, [0])]
    for key, slots, shown in left:
        pool.said.clear()
        pool.jobs = {key: Job("RUNNING", "None")}
        pool.answer = {key: Job("CANCELLED", "None")}
        assert [death.worker for death in pool._deaths()] == [key]
        assert pool.slots == slots
        told = f"job {key} was cancelled by somebody; {{}} job(s) share what is left"
        assert [line for line in pool.said if "cancelled" in line] == [told.format(n) for n in shown]
    with pytest.raises(WorkersFailed, match=r"^all its jobs were cancelled by somebody: the same command"):
        pool._start_workers(2)
    assert not slurm.submit_jobs.called


def test_a_queue_that_does_not_answer_is_said_once_and_asked_again(pool, monkeypatch):
    def fail(session, every_s):
        raise QueueUnavailable("timed out")

    with monkeypatch.context() as patch:
        patch.setattr(queue, "cached_jobs", fail)
        assert pool._deaths() == pool._deaths() == []
    assert pool.said == ["the queue does not answer (timed out); trying again"]
    pool._deaths()
    assert pool.said[1:] == ["2 job(s) running, 0 waiting"]
    pool.answer["7_1"] = Job("PENDING", "Priority")
    pool.answer["7_2"] = Job("PENDING", "None")
    pool._deaths()
    assert pool.said[2:] == ["1 job(s) running, 2 waiting (Priority)"]
    pool.config = replace(pool.config, launcher=replace(pool.config.launcher, queue_every_s=1e6))
    monkeypatch.setattr(queue, "cached_jobs", fail)
    assert pool._deaths() == []
    assert len(pool.said) == 3, "asked again although it was asked just now"


def test_a_worker_that_slurm_does_not_end_is_ended_at_the_next_look(pool, monkeypatch):
    asked = []

    def scancel(*command):
        asked.append(command)
        if len(asked) == 1:
            raise QueueUnavailable("timed out")

    monkeypatch.setattr(queue, "run_slurm", scancel)
    pool.config = replace(pool.config, launcher=replace(pool.config.launcher, heartbeat_s=0, start_s=0))
    for _ in range(4):
        pool.watched = 0.0
        pool._watch_workers({"7_0": {"host": "n1"}}, [])
    killed = "worker {}: no sign of life since it was started, for 0 s; it is killed"
    assert asked == [("scancel", "7_0"), ("scancel", "7_1"), ("scancel", "7_0")]
    said = [line for line in pool.said if "running" not in line]
    assert said == [
        *(killed.format("7_0"), "scancel 7_0: timed out", killed.format("7_1"), killed.format("7_0"))
    ]
    assert pool._place("7_0", {"host": "n1"}) == "n1"


CANCEL = "`ebc-lab cancel s`"


def test_a_driver_that_leaves_its_jobs_says_how_they_go_on_and_one_that_ends_them_what_is_left(
    pool, study, monkeypatch
):
    pool.leave()
    assert pool.said == [
        f"2 Slurm job(s) continue without this driver: the same command adopts them, {CANCEL} ends them"
    ]
    pool.said.clear()
    pool.jobs.clear()
    pool.leave()
    assert pool.said == []
    ends = Mock(side_effect=[QueueUnavailable("timed out"), (2, ["7_0", "7_1"]), (2, [])])
    monkeypatch.setattr(queue, "stop_jobs", ends)
    for _ in range(2):
        pool.close()
        assert study.launcher_file.exists(), "by which the jobs are found"
    assert pool.said == [
        f"the queue does not answer (timed out): {CANCEL} ends what may still be running",
        f"Slurm still shows 7_0, 7_1, though cancelled: {CANCEL} checks again",
    ]
    pool.close()
    assert not study.launcher_file.exists()
    assert len(pool.said) == 2


SOFTLY, HARDLY = ("--state=PENDING",), ()


@pytest.mark.parametrize(
    ("ending", "gone_s", "state", "told", "left", "waited_s"),
    [  # the queue shows the jobs, in this state, for so long after they were told to stop
        (True, 0, "COMPLETED", [], None, 0),
        (False, 3, "RUNNING", [SOFTLY], [], 4),
        (False, 21, "RUNNING", [SOFTLY], [], 22),
        (False, 23, "PENDING", [SOFTLY, HARDLY], [], 24),
        (False, 301, "RUNNING", [SOFTLY, HARDLY], [], 302),
        (False, 999, "RUNNING", [SOFTLY, HARDLY], ["7_0", "7_1"], 302),
        (False, 41, "COMPLETING", [SOFTLY, HARDLY], [], 42),
        (False, 999, "COMPLETING", [SOFTLY, HARDLY], ["7_0", "7_1"], 42),
        (False, 999, "COMPLETING RUNNING", [SOFTLY, HARDLY], ["7_0", "7_1"], 302),
    ],
)
def test_jobs_are_told_to_stop_then_cancelled_and_not_waited_for_without_end(
    pool, monkeypatch, ending, gone_s, state, told, left, waited_s
):
    clock, cancelled = [1000.0], []

    def jobs_named(name):
        states = (state.split() * 2)[:2]
        shown = {f"7_{n}": Job(s, "None") for n, s in zip((1, 0), states, strict=True)}
        gone = {key: Job("COMPLETED", "None") for key in shown}
        return {**(gone if clock[0] - 1000 >= gone_s else shown), "6": Job("COMPLETED", "None")}

    def sleep(seconds):
        clock[0] += seconds

    monkeypatch.setattr(queue, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    monkeypatch.setattr(queue, "jobs_named", jobs_named)
    monkeypatch.setattr(queue, "scancel", lambda name, *options: cancelled.append((name, options)))
    found = queue.stop_jobs(pool.session)
    assert found == ((0, []) if left is None else (2, left))
    assert cancelled == [(queue.job_name(pool.session), options) for options in told]
    assert clock[0] - 1000 == waited_s
    assert pool.session.tasks() == {"runs": [], "barred": {}, "stop": True}


def test_jobs_that_run_other_code_are_ended_and_not_adopted(pool, config, study, monkeypatch):
    ended = []
    monkeypatch.setattr(queue, "jobs_named", lambda name: dict(pool.answer))
    monkeypatch.setattr(queue, "stop_jobs", lambda session: (ended.append(session.root), (2, []))[1])
    pool.session.note("worker", "7_1", host="n1")
    pool.session.note("worker", "6_0", host="n1")  # its job is over
    said = []
    adopted = SlurmPool(config, study, 2, said.append)
    assert said == ["adopted 2 Slurm job(s) of an earlier call: 7_0, 7_1"]
    assert set(adopted.session.notes()) == {"7_1"}
    assert adopted.submitted_here == set(), "none that ends without a run counts as a failed start"
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
