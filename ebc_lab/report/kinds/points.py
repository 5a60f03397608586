"""Points: the settings that each arm was tuned to."""

from __future__ import annotations

from ebc_lab.study.stages.suite import short_name

from ..text.arms import point_in_words
from ..text.table import Column, Table, filled, loss_column
from ..text.words import brief, fixed
from .kind import Evidence, Kind

COLUMNS = (
    Column("Arm", "name", short="arm", head=True),
    Column("Best point", "prose", short="best point"),
    loss_column("Validation loss", "val loss"),
    loss_column("Its worst seed", "worst seed"),
    Column("Margin", "figure", fixed, "margin"),
    Column("Runs", "figure", brief, "runs"),
    Column("Edge of its grid", "prose", short="edge of its grid"),
)
NOTE = (
    "validation loss in nats per token, mean of the tuning seeds and its worst one, by which a point is "
    "chosen; margin: to the second best point by its worst seed, in nats"
)
OF_FINALISTS = (
    "validation loss in nats per token, mean of all tuning seeds and its worst one; the best points by their "
    "worst seed were trained on further seeds, and the lowest mean won; margin: to the second lowest, in nats"
)


class Points(Kind):
    shows = "points"
    concludes = False

    def tables(self, found: Evidence) -> list[Table]:
        """Return the best point of each arm."""
        rows, note = [], NOTE
        for track in found.tracks.values():
            for name, arm in track["arms"].items():
                note = OF_FINALISTS if "finalists" in arm else note
                edges = ", ".join(f"{short_name(k).replace('_', ' ')}: {e}" for k, e in arm["edges"].items())
                sigmas = arm["margin_sigma"]
                margin = None if sigmas is None else sigmas * track["sigma"]
                worst = arm.get("worst_loss")
                values = (name, point_in_words(arm), arm["val_loss"], worst, margin, arm["runs"], edges)
                rows.append(filled(COLUMNS, values))
        return [Table(f"{found.decision['stage']}-tuned", "Each arm’s best point", COLUMNS, rows, note)]


KIND = Points()
