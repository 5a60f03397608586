"""`ebc-lab worker`: join a running study as a worker, from any machine that sees the study's folder.

With `launcher.join`, a driver keeps its session in the study's folder. A worker that joins behaves like one
that the driver started: it takes runs from the same list, claims each by its lock, and ends when the driver's
lock is free. It also holds a lock under its own name, which shows the driver that it is alive.
"""

from __future__ import annotations

import os
import secrets
import signal
import time
from contextlib import suppress
from pathlib import Path

from ebc_lab.config.checks import require_gpu
from ebc_lab.config.errors import UserError
from ebc_lab.config.study_checks import lacking_for

from ..store.study import Study, recorded_config
from .local import start_worker
from .pool import Say
from .session import GUEST, Session, code_to_match, sessions_in


def join(place: Path, wait_s: float, say: Say) -> int:
    """Work on a study until the study is finished or has had no driver for `wait_s` seconds. `place`: the
    study's folder, or the folder of its session. Returns 0, or the exit code of a worker that failed. Raises
    UserError if no driver appears within `wait_s` seconds, and whenever `_work` does."""
    inside = (place / "session.json").exists()
    study = Study(place.resolve().parent.parent if inside else place)
    joined = False
    since = time.monotonic()
    while True:
        if sessions := sessions_in(study):
            code = _work(sessions[0], say)
            joined = True
            since = time.monotonic()
            if code:
                return code
        elif joined and _finished(study):
            say(f"study {study.name} is finished")
            return 0
        elif time.monotonic() - since >= wait_s:
            if joined:
                say(f"nobody runs study {study.name} any more")
                return 0
            if not study.exists():
                remedy = "begin it with launcher.join=true, or --wait for it"
                raise UserError(f"there is no study at {study.root}: {remedy}.")
            raise UserError(
                f"nobody runs study {study.name} so that workers can join: its command, with "
                "launcher.join=true, lets workers join; --wait SECONDS waits for it."
            )
        time.sleep(0.5)


def _finished(study: Study) -> bool:
    """Return whether the last stage is decided and no driver is running; False if the study is unreadable."""
    with suppress(UserError):
        last = recorded_config(study.header()).study.stages[-1]
        return study.holder() is None and last in study.decisions()
    return False


def _work(session: Session, say: Say) -> int:
    """Run a worker of this session until the worker ends, and return the worker's exit code. Raises UserError
    if this machine lacks what the study needs, or if the code installed here differs from the driver's."""
    about = session.about()
    here = code_to_match()
    known = {k: v for k, v in about["code"].items() if None not in (v, here.get(k))}
    if other := [f"{k} {theirs} there, {here[k]} here" for k, theirs in known.items() if theirs != here[k]]:
        what = "; ".join(other)
        raise UserError(f"the study is run by other code than is installed here ({what}): install the same.")
    if about.get("device") == "cuda":
        require_gpu()
    study = Study(session.root.resolve().parent.parent)
    for sentence in lacking_for(recorded_config(study.header(), checked=False), study=True):
        raise UserError(sentence)
    name = f"{GUEST}{os.uname().nodename[:40]}-{os.getpid()}-{secrets.token_hex(3)}"
    say(f"joining {study.root} as {name}")
    worker = start_worker(session, name, about.get("env", {}), [f"{session.root.name}/{name}"])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: worker.send_signal(number))
    code = worker.wait()
    if session.root.exists():
        session.note("exit", name, code=code)
        if code == 0:
            session.forget(name)
        else:
            say(f"the worker ended with exit code {code}: read {session.log_path(name)}")
    return code
