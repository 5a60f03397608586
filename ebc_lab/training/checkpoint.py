"""checkpoint.pt: everything the next step depends on that the run's settings do not determine."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ebc_lab.config.errors import UserError
from ebc_lab.ebc import StabilizedOptimizer
from ebc_lab.records.files import opened, write_atomic
from ebc_lab.records.streams import Mark

from .turns import Say

ARCHIVE = b"PK"  # how torch.save begins


@dataclass
class Reached:
    """How far a run has come. Its clocks include earlier attempts, up to their last checkpoint."""

    step: int = 0
    skips: int = 0  # the last steps that were skipped, in a row
    train_s: float = 0.0  # seconds of training, without evaluations
    wall_s: float = 0.0


def save(
    path: Path,
    identity: str,
    reached: Reached,
    marks: Mapping[str, Mark],
    model: nn.Module,
    optimizer: StabilizedOptimizer,
) -> None:
    """Write the checkpoint of the run called `identity`, whose streams are at `marks`, with a checksum."""
    on_gpu = next(model.parameters()).is_cuda
    state = {
        "identity": identity,
        **asdict(reached),
        "streams": {name: tuple(mark) for name, mark in marks.items()},
        "probe_s": optimizer.prober.seconds,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if on_gpu else None,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write_atomic(path, _first_line(content) + content)


def _first_line(content: bytes) -> bytes:
    return f"ebc-lab checkpoint, sha256 {hashlib.sha256(content).hexdigest()}\n".encode()


def read(path: Path, identity: str, say: Say) -> dict[str, Any] | None:
    """What `save` wrote, if it is there. Nothing in it is executed; one without a checksum is not read.

    Raises UserError when it is damaged, was edited, or is another run's.
    """
    try:
        with opened(path) as f:
            whole = f.read()
    except FileNotFoundError:
        return None
    if whole.startswith(ARCHIVE):
        say("an earlier version wrote its checkpoint, without a checksum: it starts from its first step")
        return None
    line, newline, content = whole.partition(b"\n")
    again = "delete it, and the run starts from its first step"
    if line + newline != _first_line(content):
        raise UserError(f"{path} is damaged or was edited (its checksum does not match): {again}.")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        foreign = state["identity"] != identity
    except Exception as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): {again}.") from None
    if foreign:
        raise UserError(f"{path} belongs to another run: {again}.")
    return dict(state)


def marks_of(state: Mapping[str, Any]) -> dict[str, Mark]:
    """How far the streams had come."""
    return {name: Mark(*mark) for name, mark in state["streams"].items()}


def restore(state: Mapping[str, Any], model: nn.Module, optimizer: StabilizedOptimizer) -> Reached:
    """Put what `read` returned into the model, the optimizer and the random generators."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    optimizer.prober.seconds = state["probe_s"]
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"])
    return Reached(state["step"], state["skips"], state["train_s"], state["wall_s"])
