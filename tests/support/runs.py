"""Runs of the tests of training."""

from dataclasses import replace
from pathlib import Path

from ebc_lab.config.choices import changed
from ebc_lab.workloads.corpus import locate


def resolved(run):
    """The run on the text as it is now."""
    return replace(run, data=replace(run.data, sha256=locate(run.data).sha256))


def ebc(run, **budget):
    return changed(run, {"stabilizer": {"name": "ebc"}, "budget": budget})


def plain(run):
    return changed(run, {"stabilizer": {"name": "none"}})


def made(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path
