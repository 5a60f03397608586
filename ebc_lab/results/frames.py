"""Tables as DataFrames with fixed columns, each with its type, unit and meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ebc_lab.records.columns import Meanings, described

if TYPE_CHECKING:
    import pandas as pd

WHOLE = {
    *("seed", "steps", "planned_steps", "warmup_steps", "guard_count", "skipped_steps", "seeds", "completed"),
    *("diverged", "comparisons", "seeds_needed", "rank", "shared_seeds", "step", "skipped", "measurements"),
    *("tokens", "audit_tokens"),
}
FLAGS = {"mine", "rival"}
CATEGORIES = {
    *("stage", "role", "track", "kind", "outcome", "optimizer", "projection", "stabilizer", "budget"),
    *("aggregate", "controller", "lr_schedule", "delta_schedule", "family", "judged", "alone", "verdict"),
    *("method", "group", "study"),
}
TEXTS = {"arm", "run_id", "cause", "problem", "reference", "name", "question", "figure"}


def kind_of(column: str) -> str:
    """Return the dtype of a column. Figures are float64, with NaN for what was not measured."""
    kinds = {"Int64": WHOLE, "boolean": FLAGS, "category": CATEGORIES, "string": TEXTS}
    return next((kind for kind, names in kinds.items() if column in names), "float64")


def frame(rows: Sequence[Mapping[str, Any]], meanings: Meanings) -> pd.DataFrame:
    """Return a table with a row for each mapping and the columns of `meanings`. Columns have their types even
    if there are no rows."""
    import pandas as pd

    columns = {}
    for name in meanings:
        kind = "string" if kind_of(name) == "category" else kind_of(name)  # a category later
        columns[name] = pd.Series([row.get(name) for row in rows], dtype=kind)
    return described(typed(pd.DataFrame(columns)), meanings)


def typed(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with the type that belongs to each of its columns."""
    return table.astype({name: kind_of(name) for name in table.columns})
