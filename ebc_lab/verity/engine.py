"""Which code computes: torch alone (`eager`), or one C file built by this machine's compiler (`c`).

Both give the same bits. `c` is for tensors on a CPU; without a compiler everything works, only slower.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch

from . import eager

ENGINES = ("auto", "eager", "c")
_chosen = "auto"


def use_engine(name: str) -> None:
    """Compute with "eager", with "c", or with the faster one that works here ("auto", as it begins).

    ValueError for another name, and where "c" is asked for and cannot be built, with the reason.
    """
    global _chosen
    if name not in ENGINES:
        raise ValueError(f"engine={name!r} is unknown; it takes {', '.join(ENGINES)}.")
    if name == "c":
        why = why_not_native()
        if why:
            raise ValueError(f"engine='c' does not work here: {why}")
    _chosen = name


@functools.cache
def why_not_native() -> str:
    """Why the C engine cannot be used; empty if it can. It is built at the first call."""
    from . import native

    try:
        native.load()
    except native.NativeUnavailable as error:
        return str(error)
    return ""


@functools.cache
def _native() -> ModuleType | None:
    """The C engine for "auto"; None, with one line of warning, where there is none."""
    why = why_not_native()
    if why:
        logging.getLogger(__name__).warning("verity computes with torch alone, which is slower: %s", why)
        return None
    from . import native

    return native


def engine_of(device: torch.device) -> ModuleType:
    """The module whose functions compute on this device."""
    if device.type != "cpu" or _chosen == "eager":
        return eager
    return _native() or eager


def engine_name(device: str | torch.device = "cpu") -> str:
    """What computes on this device: "eager" or "c"."""
    return "eager" if engine_of(torch.device(device)) is eager else "c"
