"""`ebc-lab worker`: a worker that joins a running study from another machine that sees its folder.

The driver of a study with `launcher.join` keeps its session in the study's folder. A worker that joins is one
like the driver's own: it takes runs from the same list, claims each by its lock, and ends when the driver's
lock is free. It holds a lock under its own name, by which the driver sees that it is there.
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
from .session import GUEST, Session, code_here, sessions_in

LOOK_S = 0.5  # between two looks for a session


def join(place: Path, wait_s: float, say: Say) -> int:
    """Work on a study until it is finished, or nobody has driven it for `wait_s` seconds, and return the exit
    code: 0, or the worker's where that failed. `place`: the study's folder, or that of its session.

    Raises UserError where nobody drives it, or with other code than is installed here.
    """
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
        time.sleep(LOOK_S)


def _finished(study: Study) -> bool:
    """Return whether nobody drives the study and its last stage is decided; False where it cannot be read."""
    with suppress(UserError):
        last = recorded_config(study.header()).study.stages[-1]
        return study.holder() is None and last in study.decisions()
    return False


def _work(session: Session, say: Say) -> int:
    """Be one of the session's workers until that ends, and return its exit code. Raises UserError where this
    machine cannot do the study's work, or would give other numbers."""
    about = session.about()
    here = code_here()
    known = {k: v for k, v in about["code"].items() if None not in (v, here.get(k))}
    if other := [f"{k} {there} there, {here[k]} here" for k, there in known.items() if there != here[k]]:
        what = "; ".join(other)
        raise UserError(f"the study is run by other code than is installed here ({what}): install the same.")
    if about.get("device") == "cuda":
        require_gpu()
    study = Study(session.root.resolve().parent.parent)
    for sentence in lacking_for(recorded_config(study.header(), checked=False), study=True):
        raise UserError(sentence)
    name = f"{GUEST}{os.uname().nodename[:40]}-{os.getpid()}-{secrets.token_hex(3)}"
    say(f"joining {study.root} as {name}")
    lock = f"{session.root.name}/{name}"  # by which the driver sees that it is there
    worker = start_worker(session, name, about.get("env", {}), [lock])
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
