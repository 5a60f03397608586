"""A model behind HTTP, for this machine alone: POST /generate, /energy and /embed, GET /health.

Bodies and answers are JSON; what is wrong with a request is one sentence in `error`. The model answers one
request at a time. Needs Starlette and uvicorn: pip install 'ebc-lab[serve]'.
"""

from __future__ import annotations

import asyncio
import errno
import json
import math
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route
except ImportError as missing:
    raise ImportError(
        f"serving a model needs Starlette and uvicorn ({missing}): pip install 'ebc-lab[serve]'"
    ) from None

from ..generate import Sampling
from ..model import EnergyModel
from .writer import TokenizerLike, Writer, Writing

ADDRESS = "127.0.0.1"
MOST_BYTES = 1 << 20  # of a body
MOST_DISCARDED = 256 << 20  # of one that is too large: read to its end, so that its sender hears why
LEAVING_S = 5  # for requests in progress when the server ends

Answer = Callable[[Writer, Mapping[str, Any]], dict[str, Any]]
KINDS = {str: "a text", int: "a whole number", float: "a number"}
TEXT = {"text": str}
WRITING = {name: type(value) for name, value in asdict(Writing()).items()}
BAD, TOO_LARGE = 400, 413


def app_of(
    model: EnergyModel,
    tokenizer: TokenizerLike,
    *,
    context: int,
    sampling: Sampling | None = None,
    refused: tuple[type[Exception], ...] = (),
) -> Starlette:
    """Build the application. `refused`: what a tokenizer raises beside ValueError for text it cannot take."""
    writer = Writer(model, tokenizer, context, sampling or Sampling())
    one_at_a_time = asyncio.Lock()

    async def health(request: Request) -> JSONResponse:
        settings = model.settings
        sizes = {"vocabulary": settings.vocabulary, "n": settings.n, "context": context}
        splats = 0 if model.store is None else len(model.store)
        return JSONResponse({"status": "ok", **sizes, "splats": splats})

    def post(path: str, answer: Answer, needed: str, fields: Mapping[str, type]) -> Route:
        async def endpoint(request: Request) -> JSONResponse:
            request_fields = checked(await _body(request), needed, fields)
            async with one_at_a_time:
                return JSONResponse(await run_in_threadpool(answer, writer, request_fields))

        return Route(path, endpoint, methods=["POST"])

    async def is_bad(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": str(error)}, BAD)

    return Starlette(
        routes=[
            Route("/health", health),
            post("/generate", _generate, "prompt", {"prompt": str} | WRITING),
            post("/energy", _energy, "text", TEXT),
            post("/embed", _embed, "text", TEXT),
        ],
        # another name that points here would be DNS rebinding
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[ADDRESS, "localhost"])],
        exception_handlers={HTTPException: _failed, **dict.fromkeys((ValueError, *refused), is_bad)},
    )


async def _failed(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _body(request: Request) -> bytes:
    """Read a request's body. HTTPException where it is too large, without keeping it."""
    parts = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= MOST_BYTES:
            parts.append(part)
        elif size > MOST_DISCARDED:
            break
    if size > MOST_BYTES:
        raise HTTPException(TOO_LARGE, f"a request may have {MOST_BYTES} bytes: send less text at a time")
    return b"".join(parts)


def checked(body: bytes, needed: str, fields: Mapping[str, type]) -> dict[str, Any]:
    """Read the fields of a JSON object, of the kinds they must have. Raises ValueError."""
    try:
        request_fields = json.loads(body)
    except (ValueError, RecursionError):
        request_fields = None
    if not isinstance(request_fields, dict):
        raise ValueError(f'the body must be a JSON object, as {{"{needed}": "…"}}')
    for name, value in request_fields.items():
        if name not in fields:
            raise ValueError(f"{name[:60]!r} is unknown: a request may have {', '.join(fields)}")
        kind = fields[name]
        numbers = (int, float) if kind is float else kind
        if isinstance(value, bool) or not isinstance(value, numbers):
            raise ValueError(f"{name} must be {KINDS[kind]}")
    if needed not in request_fields:
        raise ValueError(f"the body lacks {needed}, which must be a text")
    return request_fields


def _generate(writer: Writer, request_fields: Mapping[str, Any]) -> dict[str, Any]:
    writing = Writing(**{name: value for name, value in request_fields.items() if name != "prompt"})
    return {"text": writer.continued(request_fields["prompt"], writing), **asdict(writing)}


def _energy(writer: Writer, request_fields: Mapping[str, Any]) -> dict[str, Any]:
    energies, splats = writer.energies(request_fields["text"])
    nats = energies.tolist()
    if not all(map(math.isfinite, nats)):
        raise ValueError("the energy of this text is not finite: train the model again")
    of_splats = None if splats is None else splats.tolist()
    return {"tokens": len(nats), "mean": sum(nats) / len(nats), "energy": nats, "splats": of_splats}


def _embed(writer: Writer, request_fields: Mapping[str, Any]) -> dict[str, Any]:
    states, _ = writer.states(request_fields["text"])
    return {"tokens": len(states), "n": states.shape[1], "states": states.tolist()}


# -- running it ----------------------------------------------------------------------------------------------


def listening(port: int = 0) -> socket.socket:
    """Open a socket of this machine that waits for connections; port 0: a free one. Raises ValueError where
    the port is none, or taken."""
    if not 0 <= port <= 65535:
        raise ValueError(f"{port} is no port: give one from 1 to 65535, or 0 for a free one")
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((ADDRESS, port))
        made.listen()
    except OSError as error:
        made.close()
        what = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise ValueError(f"port {port} {what}: give another, or 0 for a free one") from None
    return made


def address_of(made: socket.socket) -> str:
    host, port = made.getsockname()
    return f"http://{host}:{port}"


def server_of(app: Starlette) -> uvicorn.Server:
    """Make a server whose `run(sockets=[…])` answers until it is told to end (`should_exit`, Ctrl-C)."""
    config = uvicorn.Config(
        app, lifespan="off", log_level="warning", access_log=False, timeout_graceful_shutdown=LEAVING_S
    )
    return uvicorn.Server(config)
