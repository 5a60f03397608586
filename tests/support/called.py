"""The command line, called in this process: the same exit code and text as from a shell, without a new
interpreter."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

from ebc_lab.cli import main

CAUGHT = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
)  # what `main` takes over for as long as the process lives
CLI = [sys.executable, "-c", "from ebc_lab.cli import main; main()"]  # in a process of its own
SMALL_RUN = [  # of some steps a second
    *("scale=smoke", "model.blocks=1", "model.width=16", "model.context=16", "batch_size=10"),
    *("budget.probe_sequences=2", "device=cpu"),
]
SMALLEST = [  # a study's run
    *("scale=smoke", "data=path", "model.blocks=1", "model.width=8", "model.context=8", "batch_size=4"),
    *("budget.probe_sequences=1", "eval_windows=2", "device=cpu"),
]


def called(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`ebc-lab ARGUMENTS…` in folder `cwd`."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in CAUGHT}
    code = 0
    try:
        with (
            contextlib.chdir(cwd),
            mock.patch.dict(os.environ, env),
            mock.patch.object(sys, "argv", ["ebc-lab", *arguments]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def answered(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`called`, which must succeed."""
    done = called(*arguments, cwd=cwd, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def refused(*arguments: str, cwd: Path, **env: str) -> str:
    """The one sentence of an exit with code 2, which has written nothing."""
    before = sorted(cwd.rglob("*"))
    done = called(*arguments, cwd=cwd, **env)
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert sorted(cwd.rglob("*")) == before
    return line
