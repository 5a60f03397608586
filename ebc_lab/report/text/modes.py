"""The table of a study that compares modes of determinism: how many different weights each ended with."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from ebc_lab.records.columns import MODE_MEANINGS
from ebc_lab.records.decisions import Decision, ModesTrack
from ebc_lab.study.stages.circumstances import NOTHING_SHOWN, STAGE, shows_nothing
from ebc_lab.study.stages.stage import candidates_of

from . import words
from .arms import Results
from .table import Cell, Column, Table, filled

COLUMNS = (
    Column("Determinism", "name", short="determinism", head=True),
    Column("Runs", "figure", words.brief, "runs"),
    Column("Completed", "figure", words.brief, "completed"),
    Column("Diverged", "figure", words.brief, "diverged"),
    Column("Distinct weights", "figure", words.brief, "distinct checksums"),
    Column(
        "Largest difference of the loss",
        "figure",
        lambda x: f"{x:.1e}" if x else "0",
        "largest difference of the loss",
    ),
    Column("Steps/s, median", "figure", words.brief, "steps/s", optional=True),
)


def figures(decision: Decision, track: str, results: Results | None) -> list[dict[str, Any]]:
    """Return one mapping a mode, of the columns in MODE_MEANINGS. Without `results` nothing is known of
    time."""
    rows = []
    for mode, counts in decision["tracks"][track]["modes"].items():
        ids = [c["run_id"] for c in candidates_of(track, decision) if c["role"] == mode]
        runs = [(results or {}).get(run_id, {}) for run_id in ids]
        rates = [r["steps"] / r["train_s"] for r in runs if r.get("train_s")]
        rate = statistics.median(rates) if rates else None
        rows.append({"track": track, "mode": mode, **counts, "steps_per_s": rate})
    return rows


def modes(name: str, decision: Decision, track: str, results: Results | None = None) -> Table:
    """Return runs, distinct checksums, spread of the validation loss and steps/s of each mode."""
    rows = []
    for figure in figures(decision, track, results):
        values = [figure[key] for key in MODE_MEANINGS if key != "track"]
        shown = [Cell(words.NOTHING) if value is None else value for value in values]
        rows.append(filled(COLUMNS, shown, chosen=same_bits(figure)))
    note = (
        "distinct sha256 of the weights; difference of the validation loss between any two runs of a mode, "
    )
    note += "in nats per token; steps/s as the runs took them, several at a time"
    if empty := shows_nothing(decision["tracks"][track]["modes"]):
        note += f"; {NOTHING_SHOWN}: {empty}"
    return Table(name, "The same run under each mode", COLUMNS, rows, note)


def same_bits(mode: Mapping[str, Any]) -> bool:
    """Tell whether all runs of a mode completed, with the same weights."""
    return bool(mode["checksums"] == 1 and mode["completed"] == mode["runs"] > 1)


def answer(track: ModesTrack) -> dict[str, str]:
    """Return what the comparison found, in a word and a sentence."""
    same = [mode for mode, counts in track["modes"].items() if same_bits(counts)]
    word = f"The same bits under {' and '.join(same)}." if same else "Under no mode the same bits."
    empty = shows_nothing(track["modes"])
    return {"word": f"{NOTHING_SHOWN.capitalize()}." if empty else word, "text": f"{STAGE.headline(track)}."}
