"""The CSV tables of a study: stable columns, one row per run, or per arm of a suite.

Units and meanings are data, in `records.columns`; `ebc-lab columns` prints them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebc_lab.records.columns import (
    ABLATION_MEANINGS,
    COLUMNS,
    DIFFERENCE_FIGURES,
    MODE_MEANINGS,
    PROFILE_MEANINGS,
    TUNED,
    UNIT_MEANINGS,
)
from ebc_lab.records.decisions import Decision
from ebc_lab.records.figures import RunResult
from ebc_lab.records.files import write_atomic
from ebc_lab.records.spec import setting_columns

from . import profiles, units
from .modes import figures

ABOUT_AN_ARM = ("about", "lr", "lr_scale", "delta_star", "lr_schedule", "warmup_steps", "delta_schedule")
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


def ablation(decision: Decision) -> pd.DataFrame:
    """Return one row per arm of a suite: its figures (means over completed seeds) and its paired difference
    in test loss. Columns that no arm has are left out."""
    import pandas as pd

    rows = []
    for track, suite in decision["tracks"].items():
        for label, arm in suite["arms"].items():
            d = arm["difference"] or {}
            tuned = {f"{TUNED}{k}": v for k, v in (arm["point"] or {}).items()}
            rows.append(
                {
                    "track": track,
                    "arm": label,
                    **{k: arm[k] for k in ABOUT_AN_ARM if k in arm},
                    **tuned,
                    "strength": arm["strength"],
                    "seeds": len(arm["runs"]),
                    "completed": arm["outcomes"].get("completed", 0),
                    "diverged": arm["outcomes"].get("diverged", 0),
                    **arm["figures"],
                    "versus": arm["versus"],
                    "pairs": d.get("seeds"),
                    "difference": d.get("mean"),
                    **{k: d.get(k) for k in DIFFERENCE_FIGURES},
                }
            )
    there = {key for row in rows for key in row}
    return pd.DataFrame(rows, columns=[key for key in ABLATION_MEANINGS if key in there])


def write_modes(path: Path, decision: Decision, results: Mapping[str, RunResult]) -> None:
    """Write the table of the modes of determinism that a study compares."""
    import pandas as pd

    rows = [row for track in decision["tracks"] for row in figures(decision, track, results)]
    _write(path, pd.DataFrame(rows, columns=list(MODE_MEANINGS)))


def write_units(path: Path, decision: Decision) -> None:
    """Write the table of the arms of a study that carries their constants, in each setting."""
    _write_tracks(path, decision, units.figures, UNIT_MEANINGS)


def write_profiles(path: Path, decision: Decision) -> None:
    """Write the table of the methods on each workload."""
    _write_tracks(path, decision, profiles.figures, PROFILE_MEANINGS)


def _write_tracks(
    path: Path,
    decision: Decision,
    figures: Callable[[Decision, str], Iterable[Mapping[str, Any]]],
    columns: Iterable[str],
) -> None:
    import pandas as pd

    rows = [row for track in decision["tracks"] for row in figures(decision, track)]
    _write(path, pd.DataFrame(rows, columns=list(columns)))


def write_ablation(path: Path, decision: Decision) -> None:
    """Write the table of a suite's arms."""
    _write(path, ablation(decision))


def write_summary(path: Path, specs: Sequence[RunSpec], results: Mapping[str, RunResult]) -> None:
    """Write the table of a stage's runs."""
    _write(path, summary(specs, results))


def _quoted(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _write(path: Path, table: pd.DataFrame) -> None:
    """Figures have nine significant digits; a text that a spreadsheet would take for a formula is quoted."""
    texts = table.select_dtypes(exclude="number")
    table = table.assign(**texts.map(_quoted))
    buffer = io.StringIO()
    table.to_csv(buffer, index=False, float_format="%.9g", lineterminator="\n")
    write_atomic(path, buffer.getvalue())
