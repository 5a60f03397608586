"""The kinds of result, one module each. Page, terminal, papers and CSV files walk what a kind returns, and
know none by name.

A new kind is a module with a `KIND` here, its line in `KINDS`, and a stage that `shows` it.
"""

from __future__ import annotations

from ebc_lab.records.decisions import Decision
from ebc_lab.study.stages.stage import stage_of

from . import candidates, finals, ladder, modes, points, profiles, suite, units
from .kind import Answer as Answer
from .kind import Evidence as Evidence
from .kind import Kind as Kind

KINDS: dict[str, Kind] = {
    module.KIND.shows: module.KIND
    for module in (finals, suite, ladder, modes, units, profiles, candidates, points)
}


def kind_of(decision: Decision) -> Kind:
    """Return the kind of result that a decision is."""
    return KINDS[stage_of(decision["stage"]).shows]
