"""The files through which a driver and its workers communicate, damaged."""

import json
import os
from unittest.mock import Mock

import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.study.launch import queue
from ebc_lab.study.launch.session import Session
from ebc_lab.study.store.study import Study

WRONG = [None, "x", [], {}, 3, {"a": None}, {"run_id": 3, "runs": None, "stop": "x", "code": "x", "at": []}]


@pytest.fixture
def session(tmp_path):
    return Session(tmp_path)


@pytest.mark.parametrize("value", WRONG)
def test_what_says_nothing_counts_as_absent(session, value, monkeypatch):
    for name in ("tasks", "worker-1", "exit-1", "queue"):
        (session.root / f"{name}.json").write_text(json.dumps(value))
    assert session.tasks() is None
    assert all(isinstance(note.get("run_id"), str | None) for note in session.notes().values())
    assert session.exit_cause("1") == ""
    monkeypatch.setattr(queue, "jobs_named", asked := Mock(return_value={}))
    monkeypatch.setattr(queue, "job_name", lambda session: "ebc-x")
    assert queue.cached_jobs(session, 1e9) == queue.cached_jobs(session, 1e9) == {}
    assert asked.call_count == 1  # within its time the answer counts for all who ask


ENDS = [(0, "it ended with exit code 0"), (3, "it ended with exit code 3")]
ENDS += [(-11, "killed by SIGSEGV"), (-99, "killed by signal 99")]


@pytest.mark.parametrize(("code", "cause"), ENDS)
def test_how_a_worker_ended_is_told_in_words(session, code, cause):
    session.note("exit", "1", code=code)
    assert session.exit_cause("1") == cause


def test_a_list_is_read_again_when_another_was_published_and_only_then(session):
    session.publish(["a", "b"])
    first = session.tasks()
    assert first["runs"] == ["a", "b"]
    assert session.tasks() is first
    session.publish(["b", "c"])
    assert session.tasks()["runs"] == ["b", "c"]
    (session.root / "tasks.json").unlink()
    assert session.tasks() is None


@pytest.mark.parametrize("value", WRONG)
def test_a_session_and_a_launcher_file_that_are_none_are_refused_with_a_remedy(session, value):
    (session.root / "session.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"session\.json is damaged .*: run the study's command again"):
        session.about()
    study = Study(session.root)
    study.launcher_file.write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"\.launcher\.json is damaged .*: once squeue shows none"):
        queue.session_of(study)


def test_a_pipe_in_place_of_a_note_does_not_stop_the_driver(session):
    os.mkfifo(session.root / "worker-1.json")
    os.mkfifo(session.root / "tasks.json")
    assert session.notes() == {}
    assert session.tasks() is None
