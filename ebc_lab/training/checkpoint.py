"""checkpoint.pt: everything the next step depends on that the run's settings do not determine."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

import torch

from ebc_lab.config.dicts import misfit
from ebc_lab.config.errors import UserError
from ebc_lab.ebc.probe import Prober
from ebc_lab.records.files import opened, write_atomic
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.streams import Mark
from ebc_lab.records.weights import ARCHIVE, About, seal, unseal

from .ends import Say
from .process import OwnRandomness

AGAIN = "delete it, and the run starts from its first step"


class Part(Protocol):
    """Something with a state that the next step depends on."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


class Plain(TypedDict):
    """What of a checkpoint no part loads."""

    streams: dict[str, Mark]
    step: int
    skips: int
    train_s: float
    wall_s: float
    probe_s: float


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
    parts: Mapping[str, Part],
    prober: Prober,
    random: OwnRandomness,
    about: About,
) -> None:
    """Write the checkpoint of the run called `identity`, whose streams are at `marks`, with a checksum.

    `parts`: name -> what has a state; the model and the optimizer are among them. `about`: what the weights
    are of.
    """
    state = {
        "identity": identity,
        **asdict(reached),
        "streams": {name: tuple(mark) for name, mark in marks.items()},
        "probe_s": prober.seconds,
        **{name: part.state_dict() for name, part in parts.items()},
        **random.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, seal("checkpoint", about, buffer.getvalue()))


class Saved:
    """A checkpoint that was read: what `torch.save` wrote. That alone travels to another process."""

    def __init__(self, archive: bytes) -> None:
        self.archive = archive

    def __getstate__(self) -> dict[str, bytes]:
        return {"archive": self.archive}

    @functools.cached_property
    def state(self) -> dict[str, Any]:
        """What `save` wrote. Nothing in it is executed."""
        return dict(torch.load(io.BytesIO(self.archive), map_location="cpu", weights_only=True))


def read(files: RunFiles, identity: str, say: Say) -> Saved | None:
    """Return what `save` wrote, if it is there. One that is damaged, by its checksum, is set aside, and one
    without a checksum is not read; `say` is told.

    Raises UserError when it is another run's or program's, OSError where the disk fails.
    """
    path = files.checkpoint
    try:
        with opened(path) as f:
            whole = f.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    if whole.startswith(ARCHIVE):
        say("an earlier version wrote its checkpoint, without a checksum: it starts from its first step")
        return None
    try:
        saved = Saved(unseal(whole, ["checkpoint"])[1])
    except ValueError as error:
        kept = _set_aside(files)
        say(f"its checkpoint is damaged ({error}), and is now {kept}: it starts from its first step")
        return None
    try:
        foreign = saved.state["identity"] != identity
        wrong = misfit({name: saved.state[name] for name in Plain.__annotations__}, Plain)
    except Exception as error:
        raise UserError(f"{path} is none of ours ({type(error).__name__}): {AGAIN}.") from None
    if foreign:
        raise UserError(f"{path} belongs to another run: {AGAIN}.")
    if wrong:
        raise UserError(f"{path} is damaged ({wrong}): {AGAIN}.")
    return saved


def _set_aside(files: RunFiles) -> str:
    """Rename a checkpoint to what no run reads. -> its name"""
    number = next(n for n in itertools.count(1) if not files.damaged(n).exists())
    files.checkpoint.rename(files.damaged(number))
    return files.damaged(number).name


def marks_of(state: Mapping[str, Any] | None) -> dict[str, Mark]:
    """Return how far the streams had come; nothing without a checkpoint."""
    return {name: Mark(*mark) for name, mark in state["streams"].items()} if state else {}


def restore(
    path: Path, state: Mapping[str, Any], parts: Mapping[str, Part], prober: Prober, random: OwnRandomness
) -> Reached:
    """Put what `read` returned of `path` into what `save` was given.

    Raises UserError where a part's state is damaged, or another model's.
    """
    for name, part in {**parts, "random numbers": random}.items():
        try:
            part.load_state_dict(state if part is random else state.get(name, {}))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a part makes of a state that is none
            why = " ".join(str(error).split())[:300].rstrip(".")
            raise UserError(f"{path} is damaged (its {name}: {why}): {AGAIN}.") from None
    prober.seconds = state["probe_s"]
    return Reached(state["step"], state["skips"], state["train_s"], state["wall_s"])
