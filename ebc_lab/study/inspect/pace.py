"""The time that runs will take, learned from finished runs: seconds of wall time per unit of `RunSpec.cost`.

Runs that shared a machine took longer than they would have alone. The coming runs will share it as well.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebc_lab.config.dicts import run_part, to_dict
from ebc_lab.config.errors import UserError, blamed
from ebc_lab.config.machine import hardware
from ebc_lab.config.schema import Config
from ebc_lab.records.figures import FINISHED, RunResult
from ebc_lab.records.spec import RunSpec, cost_of

from ..store.index import Index
from ..store.study import Record, Study, studies_in

ENOUGH = 2  # finished runs of a kind that give it a pace of its own
SIBLINGS = 3  # most other studies to learn from, newest first
LOOKED_AT = 20  # most other studies to read in search of these
# settings that affect the time of a step
SHAPE = ("model", "batch_size", "threads_per_run", "compile", "device", "dtype", "param_dtype")

Kind = tuple[str, str]  # optimizer, stabilizer
Timed = tuple[Kind, float | None, float]  # kind, seconds and cost of a finished run


@dataclass(frozen=True)
class Pace:
    """Seconds of wall time per unit of a run's cost: overall, and by (optimizer, stabilizer) pair where
    enough runs were timed."""

    overall: float
    by_kind: Mapping[Kind, float]
    source: str  # the runs that it was learned from, in words

    def seconds(self, spec: RunSpec) -> float:
        """Return the seconds of wall time that a run is expected to take."""
        kind = (spec.run.optimizer.name, spec.run.stabilizer.name)
        return self.by_kind.get(kind, self.overall) * spec.cost


def learned(records: Iterable[Record], source: str = "this study") -> Pace | None:
    """Return the pace of the finished training runs among `records`; None if no training run has finished."""
    briefs = [record.brief for record in records if record.brief.kind == "train"]
    finished = [(run, (run.optimizer, run.stabilizer)) for run in briefs if run.outcome in FINISHED]
    return _pace(
        [(kind, run.wall_s, cost_of(run.stopped_at, run.tokens, *kind)) for run, kind in finished], source
    )


def observed(specs: Iterable[RunSpec], results: Mapping[str, RunResult]) -> Pace | None:
    """Return the pace of the finished runs among `specs`; None if there are none. `results`: by run id."""
    timed: list[Timed] = []
    for spec in specs:
        result = results.get(spec.run_id)
        if result and result["outcome"] in FINISHED:
            share = result["steps"] / spec.run.steps  # of the planned cost; less if a run diverged
            kind = (spec.run.optimizer.name, spec.run.stabilizer.name)
            timed.append((kind, result.get("wall_s"), spec.cost * share))
    return _pace(timed, "this study")


def _pace(runs: Iterable[Timed], source: str) -> Pace | None:
    """Return the pace of the runs whose time and cost are known; None if there are no such runs."""
    timed = [(kind, seconds, cost) for kind, seconds, cost in runs if seconds and cost]
    if not timed:
        return None
    counts = Counter(kind for kind, _, _ in timed)
    by_kind = {
        kind: _seconds_per_cost([run for run in timed if run[0] == kind])
        for kind, count in counts.items()
        if count >= ENOUGH
    }
    return Pace(_seconds_per_cost(timed), by_kind, f"{len(timed)} finished run(s) of {source}")


def _seconds_per_cost(timed: Sequence[tuple[Kind, float, float]]) -> float:
    return sum(seconds for _, seconds, _ in timed) / sum(cost for _, _, cost in timed)


def learned_from_siblings(config: Config, study: Study) -> Pace | None:
    """Return the pace of the newest other studies in the same folder that ran on this machine with the same
    `SHAPE` settings; None if there are no such studies."""
    measured: list[Record] = []
    names = []
    host = hardware()["host"]
    shape = _shape(to_dict(run_part(config)))
    others = (other for other in studies_in(study.root.parent) if other.root != study.root)
    for other in itertools.islice(others, LOOKED_AT):
        try:
            with blamed(other.name, "it is left out"):
                header = other.header()
                same = header["hardware"]["host"] == host and _shape(header["config"]) == shape
                records = Index(other).records if same else []
                if learned(records) is not None:
                    measured += records
                    names.append(other.name)
        except (UserError, OSError):
            continue  # a damaged study that nobody asked about
        if len(names) == SIBLINGS:
            break
    return learned(measured, f"{', '.join(names)}, of the same shape on this machine")


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: config[k] for k in SHAPE}
