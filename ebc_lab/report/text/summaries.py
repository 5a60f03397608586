"""The CSV tables of a study: stable columns, one row per run, or per arm of a suite.

Units and meanings are data, in `records.columns`; `ebc-lab columns` prints them.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebc_lab.records.columns import COLUMNS
from ebc_lab.records.figures import RunResult
from ebc_lab.records.files import write_atomic
from ebc_lab.records.spec import setting_columns

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that a spreadsheet computes

if TYPE_CHECKING:
    import pandas as pd

    from ebc_lab.records.spec import RunSpec


def summary(specs: Sequence[RunSpec], results: Mapping[str, RunResult]) -> pd.DataFrame:
    """Return one row per run, in the order of the plan; empty where a run has no such figure."""
    import pandas as pd

    timed = [s for s in specs if s.kind == "overhead"]
    measured = {s.track: results.get(s.run_id, RunResult()).get("overhead_pct") for s in timed}
    rows: dict[str, dict[str, Any]] = {}
    for spec in specs:
        if spec.kind != "train" or spec.run_id in rows:
            continue
        result = results.get(spec.run_id, RunResult())
        ebc = spec.run.stabilizer.name == "ebc"
        rows[spec.run_id] = {
            **{k: result.get(k) for k in COLUMNS},
            **setting_columns(spec.run),
            "arm": spec.arm,
            "lr_scale": spec.shown_lr_scale,
            "overhead_pct": measured.get(spec.track) if ebc else None,
            "run_id": spec.run_id,
            "track": spec.track,
            "stage": spec.stage,
            "role": spec.role,
        }
    return pd.DataFrame(list(rows.values()), columns=list(COLUMNS))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> None:
    """Write rows as a table of these columns. Columns that no row has are left out."""
    import pandas as pd

    made = list(rows)
    there = {key for row in made for key in row}
    write(path, pd.DataFrame(made, columns=[key for key in columns if key in there]))


def _quoted(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def write(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV, figures with nine significant digits; what looks like a formula is quoted."""
    texts = table.select_dtypes(exclude="number")
    table = table.assign(**texts.map(_quoted))
    buffer = io.StringIO()
    table.to_csv(buffer, index=False, float_format="%.9g", lineterminator="\n")
    write_atomic(path, buffer.getvalue())
