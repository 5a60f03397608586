"""Resolved runs by their settings alone, and what names them."""

from ebc_lab.config.choices import changed
from ebc_lab.config.identity import digest, identity
from ebc_lab.config.parts.data import DataConfig
from ebc_lab.config.schema import RunConfig


def run(*settings):
    made = RunConfig(
        dtype="float32", device="cpu", compile="off", threads_per_run=1, data=DataConfig(sha256="0" * 64)
    )
    for one in settings:
        made = changed(made, one)
    return made


def name_of(*settings):
    return digest(identity(run(*settings)))
