"""Modes of determinism compared: how many different weights each ended with."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ebc_lab.records.columns import MODE_MEANINGS
from ebc_lab.records.decisions import ModesTrack
from ebc_lab.study.stages.circumstances import NOTHING_SHOWN, STAGE, shows_nothing
from ebc_lab.study.stages.stage import candidates_of

from ..text.table import Cell, Column, Table, filled
from ..text.words import NOTHING, brief, plural
from .kind import Answer, Evidence, Kind, Tile

COLUMNS = (
    Column("Determinism", "name", short="determinism", head=True),
    Column("Runs", "figure", brief, "runs"),
    Column("Completed", "figure", brief, "completed"),
    Column("Diverged", "figure", brief, "diverged"),
    Column("Distinct weights", "figure", brief, "distinct checksums"),
    Column(
        "Largest difference of the loss",
        "figure",
        lambda x: f"{x:.1e}" if x else "0",
        "largest difference of the loss",
    ),
    Column(
        "Steps/s, median",
        "figure",
        brief,
        "steps/s",
        optional=True,
        notes={"": "steps/s as the runs took them, several at a time"},
    ),
)
NOTE = (
    "distinct sha256 of the weights; difference of the validation loss between any two runs of a mode, in "
    "nats per token"
)


class Modes(Kind):
    shows = "modes"
    file = "determinism.csv"
    columns = MODE_MEANINGS

    def seeds(self, found: Evidence) -> Sequence[int]:
        return sorted({c["seed"] for c in found.decision["candidates"]})

    def rows(self, found: Evidence) -> Iterator[dict[str, Any]]:
        """Yield a row for each mode; its steps/s are unknown without the runs' results."""
        for track, compared in found.tracks.items():
            for mode, counts in compared["modes"].items():
                chosen = [c for c in candidates_of(track, found.decision) if c["role"] == mode]
                runs = [found.results.get(c["run_id"], {}) for c in chosen]
                rates = [r["steps"] / r["train_s"] for r in runs if r.get("train_s")]
                rate = statistics.median(rates) if rates else None
                yield {"track": track, "mode": mode, **counts, "steps_per_s": rate}

    def tables(self, found: Evidence) -> list[Table]:
        """Return runs, distinct checksums, spread of the validation loss and steps/s of each mode."""
        made = []
        for track, compared in found.tracks.items():
            rows = []
            for figures in self.rows(found):
                if figures["track"] != track:
                    continue
                values = [figures[key] for key in MODE_MEANINGS if key != "track"]
                shown = [Cell(NOTHING) if value is None else value for value in values]
                rows.append(filled(COLUMNS, shown, chosen=same_bits(figures)))
            empty = shows_nothing(compared["modes"])
            note = f"{NOTE}; {NOTHING_SHOWN}: {empty}" if empty else NOTE
            made.append(Table(f"modes-{track}", "The same run under each mode", COLUMNS, rows, note))
        return made

    def answers(self, found: Evidence) -> list[Answer]:
        return [self._answer(name, track) for name, track in found.tracks.items()]

    def _answer(self, name: str, track: ModesTrack) -> Answer:
        """Return under which modes all runs ended with the same weights."""
        modes = track["modes"]
        same = [mode for mode, counts in modes.items() if same_bits(counts)]
        sentence = f"The same bits under {' and '.join(same)}." if same else "Under no mode the same bits."
        if shows_nothing(modes):
            sentence = f"{NOTHING_SHOWN.capitalize()}."
        most = max(modes, key=lambda mode: modes[mode]["checksums"])
        runs = f"in {plural(modes[most]['completed'], 'completed run')}"
        tiles = [
            Tile(
                "Modes with the same bits in every run", str(len(same)), f"of {len(modes)}", ", ".join(same)
            ),
            Tile(f"Different weights under {most}", str(modes[most]["checksums"]), "", runs),
        ]
        spread = {mode: c["loss_range"] for mode, c in modes.items() if c["loss_range"] is not None}
        if spread:
            wide = max(spread, key=lambda mode: spread[mode])
            what = "Largest difference of the loss"
            tiles.append(Tile(what, f"{spread[wide]:.1e}", "nats", f"under {wide}"))
        return Answer(name, "undecided", sentence, [f"{STAGE.headline(track)}."], tiles)


def same_bits(mode: Mapping[str, Any]) -> bool:
    """Return whether all runs of a mode completed, with the same weights."""
    return bool(mode["checksums"] == 1 and mode["completed"] == mode["runs"] > 1)


KIND = Modes()
