"""Files of `AXIOM_Trainer`: written whole or not at all, and loaded only if they are sound and fit."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .optimizer import AXIOM

HEADER = "AXIOM checkpoint 1, sha256 {}\n"


@contextmanager
def replaced(path: Path) -> Iterator[io.BufferedRandom]:
    """Open a file that takes the old one's place when it is complete: a crash leaves either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(name: str, folder: Path) -> None:
    """Raise OSError for a folder that cannot be created or written; creates nothing."""
    whole = folder.resolve()
    existing = next(p for p in (whole, *whole.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(
            f"{name}={str(folder)!r} cannot be written, {existing} is no folder that allows it: name another."
        )


# -- checkpoints ---------------------------------------------------------------------------------------------


def header(digest: str) -> bytes:
    """Return the first line of a checkpoint; what torch.save writes follows."""
    return HEADER.format(digest).encode()


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state behind its checksum, without a copy of it in memory. Raises OSError."""
    with replaced(path) as f:
        start = f.write(header("0" * 64))
        torch.save(state, f)
        f.seek(start)
        checksum = hashlib.file_digest(f, "sha256").hexdigest()
        f.seek(0)
        f.write(header(checksum))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote, on the CPU. ValueError for other content, OSError for no file."""
    other = f"{path} is damaged, or no checkpoint of AXIOM_Trainer"
    start = len(header("0" * 64))
    with open(path, "rb") as f:
        line = f.read(start)
        if line != header(hashlib.file_digest(f, "sha256").hexdigest()):
            raise ValueError(f"{other} (its checksum does not match): load another one.")
        f.seek(start)
        try:
            return dict(torch.load(f, map_location="cpu", weights_only=True))
        except Exception as error:
            raise ValueError(f"{other} ({type(error).__name__}): load another one.") from None


# -- whether a checkpoint fits -------------------------------------------------------------------------------


def check_weights(saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ValueError unless both have the same names, shapes and dtypes."""
    for name in [*expected, *saved]:
        if name not in saved or name not in expected:
            where = "it" if name in expected else "the model"
            raise ValueError(f"{where} has no {name}")
        kinds = [form(state[name]) for state in (saved, expected)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"its {name} is {kinds[0]}, not {kinds[1]}")


def form(x: Any) -> str:
    """Name shape and dtype of a tensor, and the layout of a sparse one; the type of anything else."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    return f"{tuple(x.shape)} {x.dtype}{'' if x.layout == torch.strided else f' {x.layout}'}"


def with_own_settings(saved: Mapping[str, Any], optimizer: AXIOM) -> dict[str, Any]:
    """Return a checkpoint's optimizer state with the settings of `optimizer`, which has one group.

    Raises ValueError unless `optimizer` can load it.
    """
    group = optimizer.state_dict()["param_groups"][0]
    (other,) = saved["param_groups"]
    if group["rank"] != other["rank"]:
        raise ValueError(f"its rank is {other['rank']}, not {group['rank']}")
    if group["param_names"] != other["param_names"]:
        raise ValueError("other parameters were trained")
    state = {**saved, "param_groups": [group]}
    named = zip(group["param_names"], optimizer.param_groups[0]["params"], strict=True)
    AXIOM(list(named), rank=group["rank"]).load_state_dict(state)
    return state


def check_random(states: Mapping[str, Any], device: torch.device) -> None:
    """Raise RuntimeError or TypeError for random states that torch does not take."""
    devices = {"rng": "cpu", "loader_rng": "cpu"}
    if device.type == "cuda":
        devices["cuda_rng"] = str(device)
    for name, place in devices.items():
        if states[name] is not None:
            torch.Generator(place).set_state(states[name])
