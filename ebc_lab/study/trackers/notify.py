"""`notify=COMMAND`: run a program of the user's when a study has ended or stalled.

The command is split into words as a shell would split it, but runs without a shell, so nothing in a study's
name or in an error's text is ever read as a command. The command gets the facts in environment variables and
the message on standard input. Whatever the command does, the study goes on.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ebc_lab.config.errors import visible

PATIENCE_S = 30.0  # time for the command before it is killed
FINISHED, FAILED, STALLED = "finished", "failed", "stalled"


class Notifier:
    """A runner of the user's command for one study. Only the command's first failure is reported to `say`."""

    def __init__(self, command: str, root: Path, say: Callable[[str], None]):
        self.words = shlex.split(command)
        self.root = root
        self.say = say
        self.warned = False
        self.running: list[threading.Thread] = []

    def tell(self, event: str, message: str, *, wait: bool = True) -> None:
        """Run the command. With `wait`, first wait for earlier commands, then run this one to its end;
        otherwise run it in the background."""
        if wait:
            for thread in self.running:
                thread.join()
            self._run(event, message)
        else:
            self.running.append(threading.Thread(target=self._run, args=(event, message), daemon=True))
            self.running[-1].start()

    def _run(self, event: str, message: str) -> None:
        if not self.words:
            return None
        message = visible(" ".join(message.split()))
        facts = {"EBC_LAB_STUDY": self.root.name, "EBC_LAB_FOLDER": str(self.root.resolve())}
        facts |= {"EBC_LAB_EVENT": event, "EBC_LAB_MESSAGE": message}
        program, *arguments = self.words
        with tempfile.TemporaryFile() as text, tempfile.TemporaryFile() as output:
            text.write(f"{self.root.name} {event}: {message}\n".encode())
            text.seek(0)
            try:
                process = subprocess.Popen(
                    [os.path.expanduser(program), *arguments],
                    env={**os.environ, **facts},
                    stdin=text,
                    stdout=output,  # not a pipe, which its surviving children could hold open
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for the driver
                )
            except OSError as error:
                return self._warn(f"{program} cannot be started ({error.strerror})")
            try:
                code = process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                return self._warn(f"it takes longer than {PATIENCE_S:g} s, and was ended")
            finally:
                if process.poll() is None:  # kill it and everything that it started
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            output.seek(0)
            printed = output.read(10_000).decode(errors="replace").strip().splitlines()
        if code:
            last = f": {visible(printed[-1])}" if printed else ""
            self._warn(f"it ended with exit code {code}{last}")

    def _warn(self, what: str) -> None:
        if not self.warned:
            self.warned = True
            self.say(f"warning: notify: {what}; the study is as it would be without it")
