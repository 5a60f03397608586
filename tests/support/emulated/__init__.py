"""An emulated CUDA device for tests: `device` is it, `arms` what is tried on it, `trials` how."""

from __future__ import annotations

import os

from ebc_lab.config.machine import Gpu, Listing

VARIABLE = "EMULATED_CUDA"  # set by `make test-emulated`
_missing: list[str] = []


def wanted() -> bool:
    return bool(os.environ.get(VARIABLE))


def install_if_wanted() -> None:
    """Put the device under torch, which must not be imported yet."""
    if not wanted():
        return
    from support.emulated.build import NoCompiler

    try:
        from support.emulated import device
    except NoCompiler as error:
        _missing.append(str(error))
    else:
        device.install()


def listing() -> Listing:
    """Return what `ebc_lab.config.machine.first_listing` would: one GPU."""
    return Listing((Gpu(0, "emulated GPU", "GPU-emulated"),), "")


def why_not() -> str | None:
    """Say why tests of the device are skipped in this process; None where it is there."""
    if not wanted():
        return "the emulated CUDA device must be there before torch is: make test-emulated"
    return _missing[0] if _missing else None
