"""A module of this package in a process of its own, which measures on request.

It greets with a line of JSON once it has imported torch, and answers each line of JSON with another.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from typing import Any

from ebc_lab.config.errors import UserError


class ChildEnded(UserError):
    """The process ended without an answer; the message has the last line of its errors."""


class Child:
    """`python -m ebc_lab.bench.MODULE OPTIONS…`, which ends with the `with` block.

    Its temporary files and what it compiles are in a folder of its own, which is empty at first and goes.
    """

    def __init__(self, module: str, *options: str):
        self.module = module
        self.folder = tempfile.TemporaryDirectory(prefix="ebc-lab-bench-", ignore_cleanup_errors=True)
        folders = {"TMPDIR": self.folder.name, "TORCHINDUCTOR_CACHE_DIR": self.folder.name}
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"ebc_lab.bench.{module}", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, **folders},
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()
        self.folder.cleanup()

    def ask(self, request: Any) -> None:
        """Send a request, which the process answers when it has measured."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` says why
            print(json.dumps(request), file=self.process.stdin, flush=True)

    def answer(self, timeout_s: float | None = None) -> Any:
        """Return the next answer. Raise ChildEnded, or TimeoutError after `timeout_s` seconds."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout_s)[0]:
            raise TimeoutError
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or ["it left no message"])[-1]
        raise ChildEnded(f"{self.module} ended: {last}")
