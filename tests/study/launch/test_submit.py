"""What Slurm is asked for, on a machine without it: submitit's executor is made up here, test_slurm.py has a
real one."""

import contextlib
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import submitit

from ebc_lab.bench.speeds import Choice
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import Config, LauncherConfig
from ebc_lab.records.json_files import write_json
from ebc_lab.study.launch import queue, submit
from ebc_lab.study.launch.queue import Job, QueueUnavailable
from ebc_lab.study.launch.submit import choice_on_node, submit_jobs
from ebc_lab.study.store.study import Cancelled, Study

PLAIN = {  # what is asked for two runs of one process, each of one thread, by default
    "job_name": "ebc-x",
    "time": 240,
    "signal_delay_s": 120,
    "nodes": 1,
    "ntasks_per_node": 1,
    "cpus_per_task": 1,
    "stderr_to_stdout": True,
    "array_parallelism": 2,
    "additional_parameters": {"requeue": True},
    "wckey": None,
}


@pytest.fixture
def executor(monkeypatch):
    """Submitit's, which asks nobody: `asked`, the options; `env`, the environment of sbatch; `jobs`."""

    class Executor(SimpleNamespace):
        asked, jobs, env = {}, [], {}

        def __init__(self, folder, max_num_timeout):
            made.append((folder, max_num_timeout))

        def update_parameters(self, **asked):
            type(self).asked = asked

        @contextlib.contextmanager
        def batch(self):
            type(self).env = dict(os.environ)
            yield

        def submit(self, job):
            self.jobs.append(job)
            return SimpleNamespace(job_id="7", paths=SimpleNamespace(stdout="7.out"))

    made = []
    Executor.made = made
    monkeypatch.setattr(submitit, "SlurmExecutor", Executor)
    return Executor


def asking(**launcher):
    return Config(device="cpu", threads_per_run=1, launcher=LauncherConfig(name="slurm", **launcher))


@pytest.mark.parametrize(
    ("launcher", "device", "avoid", "changed"),
    [
        ({}, "cpu", (), {}),
        (
            {"partition": "main", "account": "me", "qos": "high", "constraint": "a100", "timeout_min": 30},
            "cpu",
            ("n1", "n2"),
            {"partition": "main", "account": "me", "qos": "high", "constraint": "a100", "time": 30}
            | {"exclude": "n1,n2"},
        ),
        ({"mem_gb": 1.5, "cpus_per_task": 6}, "cpu", (), {"mem": "1536M", "cpus_per_task": 6}),
        ({"processes_per_run": 3}, "cuda", (), {"cpus_per_task": 3, "gpus_per_node": 3}),
        ({"gpus_per_node": 0}, "cuda", (), {}),
        ({"gpus_per_node": 2}, "cpu", (), {"gpus_per_node": 2}),
        (
            {"processes_per_run": 4, "nodes_per_run": 2, "srun_args": ["--mpi=none"]},
            "cuda",
            (),
            {"nodes": 2, "cpus_per_task": 2, "gpus_per_node": 2}
            | {"srun_args": ["--kill-on-bad-exit=1", "--mpi=none"]},
        ),
        (
            {"sbatch": {"gpus-per-task": 1, "mail-user": "me"}, "setup": ["module load x"]},
            "cuda",
            (),
            {"additional_parameters": {"requeue": True, "gpus_per_task": 1, "mail_user": "me"}}
            | {"setup": ["module load x"]},
        ),
        (
            {"sbatch": {"requeue": False}},
            "cpu",
            (),
            {"additional_parameters": {"requeue": False}},
        ),
    ],
)
def test_sbatch_is_asked_for_what_the_launcher_says(executor, launcher, device, avoid, changed, tmp_path):
    config = replace(asking(**launcher), device=device)
    submit_jobs(config, tmp_path, "ebc-x", ["first", "second"], avoid=avoid)
    defaults = {"time": config.launcher.timeout_min, "signal_delay_s": config.launcher.signal_delay_s}
    assert executor.asked == PLAIN | defaults | changed
    assert executor.jobs == ["first", "second"]
    assert executor.made[0][0] == tmp_path


def test_what_an_enclosing_job_left_is_kept_from_sbatch_and_is_there_afterwards(
    executor, monkeypatch, tmp_path
):
    for name in ("SLURM_JOB_ID", "SLURM_CONF", "PMI_RANK"):
        monkeypatch.setenv(name, "there")
    submit_jobs(asking(), tmp_path, "x", [print])
    assert "SLURM_JOB_ID" not in executor.env
    assert executor.env["SLURM_CONF"] == "there"
    assert {os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_CONF", "PMI_RANK")} == {"there"}


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ("sbatch: a notice\nsbatch: error: no such partition\nmore", "sbatch: error: no such partition"),
        ("first\nlast", "last"),
        ("", "sbatch fails without a message"),
    ],
)
def test_what_sbatch_refuses_is_said_in_its_words(executor, monkeypatch, tmp_path, message, why):
    def refuse(self, job):
        raise submitit.core.utils.FailedJobError(message)

    monkeypatch.setattr(executor, "submit", refuse)
    monkeypatch.setenv("SLURM_JOB_ID", "there")
    with pytest.raises(UserError) as refused:
        submit_jobs(asking(), tmp_path, "x", [print])
    assert (
        str(refused.value)
        == f"Slurm does not accept the job ({why}): see launcher.partition, launcher.sbatch …"
    )
    assert os.environ["SLURM_JOB_ID"] == "there"


# -- the job that measures speeds on a node ------------------------------------------------------------------


@pytest.fixture
def study(tmp_path, monkeypatch, executor):
    """A study whose speeds a job measures; `cancelled` are the names of the jobs that were."""
    made = Study(tmp_path / "s")
    made.prepare()
    cancelled = []
    monkeypatch.setattr(queue, "scancel", cancelled.append)
    monkeypatch.setattr(submit, "POLL_S", 0.0)
    monkeypatch.setattr(submit, "state_dir", lambda study, kind: tmp_path)
    yield made
    [name] = cancelled
    assert name == executor.asked["job_name"]
    assert name.startswith("ebc-s-speeds-")


CHOICE = Choice("float32", 2, "off", {"dtype": "measured"}, (2, 1, "float32", 10.0))
ON_NODES = {"processes_per_run": 4, "nodes_per_run": 2, "queue_every_s": 0.0}


def test_speeds_are_those_that_a_job_of_one_node_found(study, executor, monkeypatch):
    asked = []

    def answer(name):
        """Slurm knows the job; it has measured when it is asked again."""
        asked.append(name)
        if len(asked) == 2:
            [job] = executor.jobs
            settings, found = job.args
            assert json.loads(settings)["threads_per_run"] == 1
            write_json(found, CHOICE.__dict__)
        return {"7": Job("RUNNING", "None")}

    monkeypatch.setattr(queue, "jobs_named", answer)
    choice = choice_on_node(asking(**ON_NODES), study)
    assert (choice.dtype, choice.threads_per_run, choice.compile) == ("float32", 2, "off")
    assert (executor.asked["nodes"], executor.asked["cpus_per_task"]) == (1, 2)  # as on each node of a run
    assert asked == [executor.asked["job_name"]] * 2


@pytest.mark.parametrize(
    ("queued", "gone_s", "said"),
    [
        (
            {"7": Job("FAILED", "x")},
            60.0,
            "measuring the speeds on a node failed (FAILED): read 7.out, or give dtype=….",
        ),
        ({}, -1.0, "measuring the speeds on a node failed (gone): read 7.out, or give dtype=…."),
        (
            QueueUnavailable("no answer"),
            60.0,
            "the Slurm queue cannot be asked (no answer): fix that, or give dtype=….",
        ),
    ],
)
def test_a_job_that_measured_nothing_is_a_sentence(study, monkeypatch, queued, gone_s, said):
    def answer(name):
        if isinstance(queued, Exception):
            raise queued
        return queued

    monkeypatch.setattr(queue, "jobs_named", answer)
    monkeypatch.setattr(queue, "GONE_S", gone_s)
    with pytest.raises(UserError) as refused:
        choice_on_node(asking(queue_every_s=-1.0), study)
    assert str(refused.value) == said


def test_a_study_that_is_cancelled_waits_for_no_speeds(study):
    study.cancel_mark.touch()
    with pytest.raises(Cancelled, match="study s was cancelled"):
        choice_on_node(asking(), study)
