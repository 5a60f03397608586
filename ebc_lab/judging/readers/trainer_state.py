"""`trainer_state.json` of Hugging Face's Trainer.

`training_args.bin` beside it is a pickle, which could execute anything, and is left alone: settings are those
of the state itself, and of the model card (README.md) where there is one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ebc_lab.config.errors import UserError, count

from ..asked import Asked
from .reader import Source, about_places, files_below, flat, number, of_run, source_of_runs

STATE = r"trainer_state\.json"
OF_STATE = ("train_batch_size", "num_train_epochs", "trial_params")
CARD = re.compile(r"^- (learning_rate|\w+_batch_size|seed|optimizer|lr_scheduler_\w+): (.+)$", re.MULTILINE)
OF_SPEED = ("_per_second", "_runtime", "_flos")


TITLE = "trainer_state.json of Hugging Face"


def claims(path: Path) -> bool:
    return any(files_below(path, STATE))


def read(path: Path, asked: Asked) -> Source:
    """Return a row a logging. A run is a folder; of its checkpoints, which repeat it, the last counts. A
    checkpoint whose log is not the beginning of the last one's is of another run."""
    states: dict[Path, dict[str, Any]] = {}
    copies = 0
    for run, found in _by_run(path).items():
        ends = _ends(found)
        copies += len(found) - len(ends)
        states |= ends if len(ends) > 1 else dict.fromkeys([run], *ends.values())
    if not states:
        raise UserError(f"{path} holds no trainer_state.json.")
    runs = list(states.values())
    rows = [row for n, state in enumerate(runs) for row in of_run(n, _rows(state))]
    settings = [_settings(run, state) for run, state in states.items()]
    planned = [{"max_steps": state.get("max_steps")} for state in runs]
    notes = []
    if copies:
        notes.append(f"{copies} older copies of the same runs in checkpoint folders were left out.")
    if hidden := sum(row.get("loss") == math.inf for row in rows):
        notes.append(
            f"{hidden} training losses of 0 beside a gradient that is not finite count as not finite: "
            "the Trainer leaves NaN out of its means (logging_nan_inf_filter), and logs 0 if nothing "
            "is left."
        )
    what = f"{count(len(runs), 'run')} of Hugging Face's Trainer"
    curves = pd.DataFrame(rows) if rows else pd.DataFrame({"run": []})
    roles = {"run": "run", "seed": "seed", "step": "step", "planned": "max_steps"}
    about = about_places(list(states), path, planned, settings)
    return source_of_runs(about, settings, curves, what, roles, notes)


def _by_run(path: Path) -> dict[Path, dict[Path, dict[str, Any]]]:
    """Return the folder of each run -> a folder with a state, its own or a checkpoint's -> that state."""
    by_run: dict[Path, dict[Path, dict[str, Any]]] = {}
    for file in files_below(path, STATE):
        folder = file.parent
        of_checkpoint = folder.name.startswith("checkpoint-") and folder.name[11:].isdigit()
        run = folder.parent if of_checkpoint and file != path else folder
        by_run.setdefault(run, {})[folder] = _state(file)
    return by_run


def _ends(states: Mapping[Path, dict[str, Any]]) -> dict[Path, dict[str, Any]]:
    """Return the states whose log no longer one continues: several where runs followed each other in one
    folder without its being emptied. Of equal ones the folder's own counts, before a checkpoint's."""
    ends: dict[Path, dict[str, Any]] = {}
    for folder in sorted(states, key=lambda folder: (-states[folder]["global_step"], len(folder.parts))):
        log = states[folder]["log_history"]
        as_text = json.dumps(log)  # in which NaN is NaN
        if not any(json.dumps(end["log_history"][: len(log)]) == as_text for end in ends.values()):
            ends[folder] = states[folder]
    return ends


def _state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text("utf-8"))
        log = state["log_history"]
        listed = isinstance(log, list) and all(isinstance(entry, dict) for entry in log)
        if listed and isinstance(state["global_step"], int):
            return dict(state)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{file} is no whole state of a Trainer (log_history, global_step): leave it out.")


def _rows(state: Mapping[str, Any]) -> list[dict[str, float]]:
    """Return the numbers of the log, a row an entry; figures of speed are left out."""
    rows = []
    for entry in state["log_history"]:
        numbers = {name: logged for name, value in entry.items() if (logged := number(value)) is not None}
        if numbers.get("loss") == 0.0 and numbers.get("grad_norm") == math.inf:  # the mean of no finite loss
            numbers["loss"] = math.inf
        rows.append({name: logged for name, logged in numbers.items() if not name.endswith(OF_SPEED)})
    return rows


def _settings(run: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of a run's settings without unpickling anything."""
    settings = flat({name: state[name] for name in OF_STATE if state.get(name) is not None})
    card = run / "README.md"
    if card.is_file():
        for name, value in CARD.findall(card.read_text("utf-8", "replace")):
            settings[name] = _value(value)
    return settings


def _value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
