"""A command of the user's hears how a study ends and that it stalls, and can do no harm to it."""

import os
import shlex
import subprocess
import time

import pytest
from support.called import CLI, called
from support.drivers import held_at_first
from support.runs import assert_over

from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.study.trackers import notify
from ebc_lab.study.trackers.notify import FAILED, FINISHED, STALLED, Notifier

FACTS = '"$EBC_LAB_EVENT|$EBC_LAB_STUDY|$EBC_LAB_MESSAGE|$EBC_LAB_FOLDER"'
PATIENCE_S = 120


@pytest.fixture
def script(tmp_path):
    """`script(text)`: a shell script of these lines, in a folder with a space in its name."""

    def write(text: str):
        folder = tmp_path / "my tools"
        folder.mkdir()
        path = folder / "tell"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    return write


def test_facts_are_its_environment_the_message_its_input_and_no_shell_reads_any(script, tmp_path):
    told, trap = tmp_path / "told", tmp_path / "trap"
    path = script(f'echo {FACTS} >> {told}; for word in "$@"; do echo "$word" >> {told}; done; cat >> {told}')
    said: list[str] = []
    message = f"'; touch {trap}; $(touch {trap}) `touch {trap}`\x1b[31m\n$HOME"
    command = f"{shlex.quote(str(path))} 'two words' ; touch {trap} $HOME"
    Notifier(command, tmp_path / "s", said.append).tell(FAILED, message)
    first, *words = told.read_text().splitlines()
    assert first.startswith("failed|s|'; touch")
    assert first.endswith(f"[31m $HOME|{tmp_path / 's'}")
    assert words[:5] == ["two words", ";", "touch", str(trap), "$HOME"]
    assert words[5].startswith("s failed: '; touch")
    assert len(words) == 6, "a line break in the message came through"
    assert not trap.exists()
    assert said == []


def test_one_that_fails_or_is_gone_is_warned_of_once(script, tmp_path):
    said: list[str] = []
    path = script("echo no route to host >&2; exit 3")
    failing = Notifier(shlex.quote(str(path)), tmp_path, said.append)
    for event in (STALLED, FINISHED):
        failing.tell(event, "x")
    path.unlink()
    Notifier(shlex.quote(str(path)), tmp_path, said.append).tell(FINISHED, "x")
    rest = "; the study is as it would be without it"
    assert said == [
        f"warning: notify: it ended with exit code 3: no route to host{rest}",
        f"warning: notify: {path} cannot be started (No such file or directory){rest}",
    ]


def test_one_that_hangs_is_ended_with_all_that_it_started(script, tmp_path, monkeypatch):
    monkeypatch.setattr(notify, "PATIENCE_S", 1.0)
    said: list[str] = []
    path = script(f"sleep 1000 & echo $! > {tmp_path}/pid; wait")
    Notifier(shlex.quote(str(path)), tmp_path, said.append).tell(FINISHED, "x")
    assert said == [
        "warning: notify: it takes longer than 1 s, and was ended; the study is as it would be without it"
    ]
    assert_over(tmp_path)


def test_a_study_tells_its_end_and_its_failure_and_keeps_the_command_to_itself(tiny, tmp_path, script):
    told = tmp_path / "told"
    path = script(f"echo {FACTS} >> {told}")
    settings = [*tiny, "launcher=inline", f"output_dir={tmp_path}", "study.name=s", f"notify=\"'{path}'\""]
    stopped = called("stage", "lr_sweep", *settings, "--max-runs", "1", cwd=tmp_path)
    assert stopped.returncode == 3, stopped.stderr
    done = called("stage", "lr_sweep", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "lr_sweep decided: Adam: baseline" in done.stdout
    mistaken = called("stage", "finals", *settings, cwd=tmp_path)
    assert mistaken.returncode == 2
    failed, finished = told.read_text().splitlines()
    assert failed.startswith("failed|s|the limit of this call is reached")
    assert finished.startswith("finished|s|Adam: baseline")
    assert finished.endswith(f"|{tmp_path / 's'}")
    for kept in (tmp_path / "s").glob("*.json"):
        assert "my tools" not in kept.read_text(), kept


@pytest.mark.thorough
def test_a_study_whose_runs_do_not_move_tells_so_once(tiny, tmp_path, script):
    told = tmp_path / "told"
    path = script(f"echo {FACTS} >> {told}")
    # a worker takes longer than a second to start
    hung = ["launcher.slots=1", "launcher.heartbeat_s=1", "launcher.start_s=1", "launcher.max_lost=9"]
    command = [*CLI, "stage", "lr_sweep", *tiny, *hung, f"output_dir={tmp_path}", "study.name=s"]
    held = {**os.environ, "PYTHONPATH": held_at_first(tmp_path)}
    with subprocess.Popen([*command, f"notify=\"'{path}'\""], stdout=subprocess.DEVNULL, env=held) as driver:
        deadline = time.monotonic() + PATIENCE_S
        while not told.exists() or not told.read_text().endswith("\n"):
            assert time.monotonic() < deadline
            with pytest.raises(subprocess.TimeoutExpired):
                driver.wait(timeout=0.1)
        driver.terminate()
    [line] = told.read_text().splitlines()[:1]
    assert line.startswith("stalled|s|lr_sweep: no run has moved for 1 s; ")


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("/no/such/program", "is no program on this machine"),
        ("sh -c 'x", "cannot be split into words"),
        (" ", "must name a program"),
    ],
)
def test_a_command_that_cannot_run_is_refused_before_anything_does(tiny, command, why):
    with pytest.raises(UserError, match=why):
        compose([*tiny, f'notify="{command}"'])


def test_a_single_run_has_no_use_for_it():
    with pytest.raises(UserError, match="notify is for a study"):
        compose(["scale=smoke", "device=cpu", "notify=true"], study=False)
