"""How long runs take, learned from finished ones: seconds of wall time per unit of `RunSpec.cost`.

Runs that shared a machine took longer than each alone would have; so will the runs that follow.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebc_lab.config.dicts import run_part, to_dict
from ebc_lab.config.errors import UserError, blamed
from ebc_lab.config.machine import hardware
from ebc_lab.config.schema import Config
from ebc_lab.records.figures import FINISHED, RunResult
from ebc_lab.records.spec import RunSpec, cost_of

from ..store import index
from ..store.study import Record, Study, studies_in

ENOUGH = 2  # finished runs from which on a kind of run has a pace of its own
SIBLINGS = 3  # other studies that are learned from at most, the newest first
LOOKED_AT = 20  # and that are looked at for that
# settings that a step's time depends on
SHAPE = ("model", "batch_size", "threads_per_run", "compile", "device", "dtype", "param_dtype")


@dataclass(frozen=True)
class Pace:
    """Seconds per unit of cost, overall and by (optimizer, stabilizer). `source`: what it was learned from,
    in words."""

    overall: float
    of_kind: Mapping[tuple[str, str], float]
    source: str

    def seconds(self, spec: RunSpec) -> float:
        """Seconds that a run will take from its first step to its result."""
        kind = (spec.run.optimizer.name, spec.run.stabilizer.name)
        return self.of_kind.get(kind, self.overall) * spec.cost


def learned(records: Iterable[Record], source: str = "this study") -> Pace | None:
    """Return the pace of the finished training runs; None where there is none."""
    timed: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for brief in (record.brief for record in records):
        if brief.kind != "train" or brief.outcome not in FINISHED:
            continue
        kind = (brief.optimizer, brief.stabilizer)
        cost = cost_of(brief.ended, brief.tokens, *kind)
        if cost and brief.wall_s:
            timed.setdefault(kind, []).append((brief.wall_s, cost))
    return _of(timed, source)


def observed(specs: Iterable[RunSpec], results: Mapping[str, RunResult]) -> Pace | None:
    """Return `learned` of these runs' results by run id."""
    timed: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for spec in specs:
        result = results.get(spec.run_id)
        if result and result["outcome"] in FINISHED and result.get("wall_s"):
            kind = (spec.run.optimizer.name, spec.run.stabilizer.name)
            share = result["steps"] / spec.run.steps  # of the cost: one that diverged took fewer
            if cost := spec.cost * share:
                timed.setdefault(kind, []).append((result["wall_s"], cost))
    return _of(timed, "this study")


def _of(timed: Mapping[tuple[str, str], Sequence[tuple[float, float]]], source: str) -> Pace | None:
    """Return a pace from pairs of seconds and cost by kind of run."""
    if not timed:
        return None
    every = [pair for pairs in timed.values() for pair in pairs]
    return Pace(
        _ratio(every),
        {kind: _ratio(pairs) for kind, pairs in timed.items() if len(pairs) >= ENOUGH},
        f"{len(every)} finished run(s) of {source}",
    )


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(s for s, _ in pairs) / sum(c for _, c in pairs)


def of_siblings(config: Config, study: Study) -> Pace | None:
    """Return the pace of the newest other studies in the same folder that had the same shape on the same
    machine."""
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
                records = index.look(other).records if same else []
                known = learned(records) is not None
        except (UserError, OSError):
            continue  # a damaged study, which is not the one asked about, is left out
        if known:
            measured += records
            names.append(other.name)
        if len(names) == SIBLINGS:
            break
    return learned(measured, f"{', '.join(names)}, of the same shape on this machine")


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: config[k] for k in SHAPE}
