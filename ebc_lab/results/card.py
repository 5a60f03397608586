"""A study as a notebook shows it: its answer and its arms."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

LAST = ("finals", "ablation")  # whose arms are what a study was made for
SHOWN = ("arm", "lr", "lr_schedule", "warmup_steps", "seeds", "diverged", "val_loss", "test_loss", "test_sd")
MOST_ARMS = 30
MOST_PROBLEMS = 3


def html(name: str, about: str, answer: str, arms: pd.DataFrame, problems: Sequence[str]) -> str:
    """Return the card as HTML, with all texts escaped: the name, `about`, the answer, the arms of the last
    stage, and the first problems."""
    parts = [f"<h4>Study {escape(name)}</h4>", f"<p>{escape(about)}</p>"]
    parts += [f"<p><b>{escape(line)}</b></p>" for line in answer.splitlines()]
    parts.append(_table(last_arms(arms)))
    parts += [f"<p>damaged: {escape(what)}</p>" for what in problems[:MOST_PROBLEMS]]
    return f"<div>{''.join(parts)}</div>"


def last_arms(arms: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `arms` that belong to the finals or the suite or, without these, to the last stage
    that has begun; on each track the lowest test loss comes first."""
    stages = list(arms["stage"].dropna().unique())
    stage = next((s for s in stages if s in LAST), stages[-1] if stages else None)
    of_stage = arms[arms["stage"] == stage].sort_values(["track", "test_loss", "val_loss"])
    shown: pd.DataFrame = of_stage.loc[:, list(SHOWN)]
    return shown


def _table(arms: pd.DataFrame) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in arms.columns)
    rows = []
    for values in arms.head(MOST_ARMS).itertuples(index=False):
        rows.append("<tr>" + "".join(f"<td>{escape(_cell(value))}</td>" for value in values) + "</tr>")
    more = len(arms) - len(rows)
    note = f"<p>and {more} more, in arms()</p>" if more > 0 else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{note}"


def _cell(value: Any) -> str:
    import pandas as pd

    if pd.isna(value):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
