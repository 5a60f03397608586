"""TensorBoard's event files, as torch, Lightning, Keras and Hugging Face write them.

Every scalar is read: TensorBoard's own EventAccumulator keeps 10,000 of a name, and drops what a run that was
resumed logged twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from ebc_lab.config.errors import UserError, count

from ..asked import Asked
from .reader import Source, about_places, by_step, files_below, needed, source_of_runs

EVENTS = r".*\.tfevents\..*"
SPLITS = {"train", "validation", "valid", "val", "test", "eval"}  # folders within a run's: Keras
SESSION = "_hparams_/session_start_info"


TITLE = "TensorBoard's event files"


def claims(path: Path) -> bool:
    return any(files_below(path, EVENTS))


def read(path: Path, asked: Asked) -> Source:
    """Return a row a step; a run is a folder, its files one after the other."""
    folders: dict[Path, list[Path]] = {}
    for file in files_below(path, EVENTS):
        folders.setdefault(file.parent, []).append(file)
    runs: dict[Path, dict[str, Any]] = {}
    points: list[tuple[Path, str, float, float, float]] = []
    notes = []
    for folder, files in folders.items():
        split = f"{folder.name}/" if folder.name.lower() in SPLITS and folder != path else ""
        run = folder.parent if split else folder
        values, settings, damaged = _folder(files, path)
        notes += damaged
        if settings and folder.parent in folders:  # torch's add_hparams: a folder for these alone
            runs.setdefault(folder.parent, {}).update(settings)
            continue
        runs.setdefault(run, {}).update(settings)
        points += [(run, split + name, step, value, time) for name, step, value, time in values]
    if not points:
        raise UserError(f"the event files in {path} hold no scalar: pictures and texts cannot be judged.")
    order = {run: number for number, run in enumerate(runs)}
    table = pd.DataFrame(points, columns=["run", "name", "step", "value", "time"])
    table["run"] = table["run"].map(order)
    began = pd.to_datetime(table.groupby("run").time.min(), unit="s")
    started = began.reindex(range(len(runs))).to_list()
    about = about_places(list(runs), path, [{"started": when} for when in started], list(runs.values()))
    what = f"{count(len(runs), 'run')} of TensorBoard"
    roles = {"run": "run", "seed": "seed", "step": "step", "started": "started"}
    curves = by_step(table)
    return source_of_runs(about, list(runs.values()), curves, what, roles, notes)


Values = list[tuple[str, float, float, float]]


def _folder(files: list[Path], path: Path) -> tuple[Values, dict[str, Any], list[str]]:
    """Return (name, step, value, time) of the scalars of a folder, its hyperparameters, and what is torn."""
    try:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        raise needed("tensorboard", "tensorboard", path) from None
    values: Values = []
    settings: dict[str, Any] = {}
    scalars: set[str] = set()  # tags whose first event says so: later ones do not repeat it
    notes = []
    for file in files:
        with _gaps() as messages:
            for event in LegacyEventFileLoader(str(file)).Load():
                for value in event.summary.value:
                    plugin = value.metadata.plugin_data
                    if plugin.plugin_name == "scalars":
                        scalars.add(value.tag)
                    if value.HasField("simple_value"):
                        number = value.simple_value
                    elif value.tag in scalars and value.HasField("tensor"):
                        shape = [dim.size for dim in value.tensor.tensor_shape.dim]
                        if any(size != 1 for size in shape):  # before memory for as many is asked for
                            raise ValueError(f"{value.tag} is a scalar of shape {shape}")
                        number = float(make_ndarray(value.tensor))
                    else:
                        if value.tag == SESSION:
                            settings |= _settings(plugin.content)
                        continue
                    values.append((value.tag, event.step, number, event.wall_time))
        if messages:
            notes.append(f"{file.name} is damaged or cut off: what stands before that was read.")
    return values, settings, notes


def _settings(content: bytes) -> Mapping[str, Any]:
    """Return the hyperparameters that a session began with."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    started = HParamsPluginData.FromString(content).session_start_info
    return {
        name: getattr(value, str(value.WhichOneof("kind"))) for name, value in sorted(started.hparams.items())
    }


@contextmanager
def _gaps() -> Iterator[list[str]]:
    """Around the reading of a file: hear where TensorBoard gives up, which it says to debuggers only."""
    messages: list[str] = []
    logger = logging.getLogger("tensorboard")
    level, propagate, handler = logger.level, logger.propagate, logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        messages[:] = [words for words in messages if words.startswith("Truncated")]
