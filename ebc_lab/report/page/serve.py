"""`ebc-lab watch`: the page of a study while it runs, served to this machine alone, made of the study's files
as they are.

Reading only: two addresses, the page and a short word on whether it has changed; nothing is looked up in the
file system by what a request says. The page is rebuilt only when a file that it is made from has changed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ebc_lab.config.errors import UserError
from ebc_lab.study.inspect import status as status_module
from ebc_lab.study.store.study import Study, recorded_config

from . import evidence, html

ADDRESS = "127.0.0.1"
QUEUE_S = 15  # a Slurm queue changes without any file of the study changing: it is asked again so often


class LivePage:
    """The page and its version. Many requests at a time make it once."""

    def __init__(self, study: Study):
        self.study = study
        self.lock = threading.Lock()
        self.seen: str | None = None
        self.content, self.version = b"", ""

    def now(self) -> tuple[bytes, str]:
        """Return (the page, what its bytes hash to)."""
        with self.lock:
            seen = self._fingerprint()
            if seen != self.seen:
                self.content = self._made().encode()
                self.version, self.seen = hashlib.sha256(self.content).hexdigest()[:16], seen
            return self.content, self.version

    def _made(self) -> str:
        try:
            with self.study.blame_files():
                live = status_module.status(self.study)
                return html.render(self.study.root, evidence.gather(self.study, lenient=True), live)
        except UserError as error:
            return html.message(f"Study {self.study.name} cannot be shown", str(error))
        except OSError as error:  # a file that vanishes
            what = f"{type(error).__name__}: {error}"
            text = f"Its files cannot be read as those of a study ({what}): see `ebc-lab verify`."
            return html.message(f"Study {self.study.name} cannot be shown", text)

    def _fingerprint(self) -> str:
        """Return a hash of names, sizes and times of the page's files, and of whether the study is held."""
        facts: list[Any] = [f"{p.relative_to(self.study.root)} {at}" for p, at in self._stamps()]
        try:
            facts.append(self.study.holder() is not None)
        except UserError as error:
            facts.append(str(error))
        with suppress(UserError, OSError):
            if recorded_config(self.study.header(checked=False)).launcher.name == "slurm":
                facts.append(int(time.monotonic() / QUEUE_S))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _stamps(self) -> Iterator[tuple[Path, str]]:
        study = self.study
        paths = [study.header_file, study.decisions_file, study.figures_file, study.acceptance_file]
        paths += [study.driver_file, *(p for kind in html.KINDS for p in sorted(study.root.glob(f"*{kind}")))]
        for run in study.all_runs():
            paths += [run.spec, run.result, run.progress]
        for path in paths:
            try:
                status = path.stat()
            except OSError:
                continue
            yield path, f"{status.st_mtime_ns} {status.st_size} {status.st_ino}"


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD for the page and for its state, to this machine only."""

    server: Server
    server_version = "ebc-lab"
    sys_version = ""
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        # another name that points here would be DNS rebinding
        if self.headers.get("Host") not in self.server.allowed:
            refusal = b"this server answers to 127.0.0.1 only\n"
            return self._send(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", refusal)
        path = self.path.partition("?")[0]
        if path == "/":
            return self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.shown.now()[0])
        if path == "/state":
            state = json.dumps({"version": self.server.shown.now()[1]})
            return self._send(HTTPStatus.OK, "application/json", state.encode())
        return self._send(HTTPStatus.NOT_FOUND, "text/plain", b"the page is at /\n")

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Any other method ends up here, and is not allowed."""
        if code == HTTPStatus.NOT_IMPLEMENTED:
            code = HTTPStatus.METHOD_NOT_ALLOWED
            message = "read only: GET and HEAD"
        self.close_connection = True
        self._send(HTTPStatus(code), "text/plain", f"{message or HTTPStatus(code).phrase}\n".encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Serves one study's page, on this machine only."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, shown: LivePage, port: int):
        super().__init__((ADDRESS, port), Handler)
        self.shown = shown
        self.allowed = {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}
        if self.server_port == 80:
            self.allowed |= {ADDRESS, "localhost"}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader who disconnects half-way is no error."""


def server(study: Study, port: int = 0) -> Server:
    """Return a server of the study's page, bound but not yet answering.

    Raises UserError: no study, or the port cannot be used.
    """
    study.must_exist()
    if not 0 <= port <= 65535:
        raise UserError(
            f"--port {port} is no port: give one from 1 to 65535, or leave it out for a free one."
        )
    try:
        return Server(LivePage(study), port)
    except OSError as error:
        what = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise UserError(f"port {port} {what}: give another --port, or leave it out for a free one.") from None


def address_of(made: ThreadingHTTPServer) -> str:
    return f"http://{ADDRESS}:{made.server_port}/"
