"""Steps that a run logged more than once: it was resumed, or two runs have one name."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from ebc_lab.config.errors import UserError, count, listed

from .joint import Floats, Places
from .record import Caution


def repeated_steps(
    run: Places, step: Floats, loss: Floats, names: Sequence[str], unit: str
) -> tuple[Places | None, list[Caution]]:
    """Return the rows to keep, sorted by run and step, and what there is to say. None: all, which are sorted.

    `run`: each row's run, as a number into `names`; all three in the order in which they were logged. Of rows
    with the same run and step the last one is kept: a resumed run logs steps again.

    Raises UserError: most steps were logged several times with different values, so a column is missing that
    tells runs apart.
    """
    if _ascending(run, step):
        return None, []
    rows = np.argsort(run, kind="stable")
    number, at = run[rows], step[rows]
    back = np.flatnonzero((number[1:] == number[:-1]) & (at[1:] < at[:-1]))
    shuffled = len(back) > max(len(rows) / 4, 3)  # rows in no order of logging: sorted by something else
    resumed = None if shuffled else _resumed(number[back], at[back], at[back + 1], names, unit)
    if len(back):
        rows = rows[np.lexsort((at, number))]
        number, at = run[rows], step[rows]
    again = (number[1:] == number[:-1]) & (at[1:] == at[:-1])
    same = loss[rows[1:]] == loss[rows[:-1]]
    kept = rows[np.append(~again, True)]
    differs = np.flatnonzero(again & ~same)
    if len(differs) > len(kept) / 2:
        raise UserError(
            f"{len(differs):,} of {len(rows):,} rows repeat a {unit} of the same run with another value "
            f"(the first: {names[number[differs[0]]]}, {unit} {at[differs[0]]:g}): name the column that "
            "tells runs apart (--run COLUMN or --seed COLUMN), or leave out the rows of the runs that "
            "were begun again."
        )
    known = set(resumed["runs"]) if resumed else set()
    twice = [
        _twice("step_twice", number[differs], names, unit, known),
        _twice("row_twice", number[1:][again & same], names, unit, known),
    ]
    return kept, [caution for caution in (resumed, *twice) if caution]


def _resumed(run: Places, before: Floats, after: Floats, names: Sequence[str], unit: str) -> Caution | None:
    """`before`, `after`: the steps between which each of these runs went back."""
    if not len(run):
        return None
    meant = [names[i] for i in dict.fromkeys(run.tolist())]
    places = (f"{names[i]} from {unit} {a:g} to {b:g}" for i, a, b in zip(run, before, after, strict=True))
    sentence = (
        f"{count(len(meant), 'run')} went back, as a resumed run does ({listed(places)}): of a {unit} "
        "that was logged again the last value is taken; see that the resumed part had the same data "
        "and settings."
    )
    return Caution(kind="resumed", sentence=sentence, runs=meant)


def _twice(kind: str, run: Places, names: Sequence[str], unit: str, known: Collection[str]) -> Caution | None:
    """`run`: the runs of the rows that were left out. `known`: runs that need not be named."""
    meant = [names[i] for i in dict.fromkeys(run.tolist()) if names[i] not in known]
    if not meant:
        return None
    what = "with the same value, which is counted once"
    if kind == "step_twice":
        what = (
            "with different values, of which the last is taken: see that neither two splits nor two "
            "runs were logged under one name"
        )
    sentence = f"{count(len(meant), 'run')} logged a {unit} more than once ({listed(meant)}), {what}."
    return Caution(kind=kind, sentence=sentence, runs=meant)


def _ascending(run: Places, step: Floats) -> bool:
    """Return whether rows are sorted by run and, within a run, by step, and no step is there twice."""
    return bool(((run[1:] > run[:-1]) | ((run[1:] == run[:-1]) & (step[1:] > step[:-1]))).all())
