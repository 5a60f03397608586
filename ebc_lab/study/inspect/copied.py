"""Runs that a study will not train, because another one in the same folder has finished them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ebc_lab.config.dicts import to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import Config
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec

from ..stages.stage import ResultsOf
from ..store.neighbours import Neighbour, finished_elsewhere, neighbours_of
from ..store.study import Study, StudyHeader, studies_in


@dataclass
class WithNeighbours:
    """The results that a study has, and those that it would copy: `copied` has the latter by run id."""

    study: Study
    own: ResultsOf
    copied: dict[str, RunResult] = field(default_factory=dict)
    looked_for: set[str] = field(default_factory=set)
    neighbours: list[Neighbour] | None = None  # looked for once

    def __call__(self, specs: list[RunSpec]) -> dict[str, RunResult]:
        there = self.own(specs)
        new = [s for s in specs if s.run_id not in there and s.run_id not in self.looked_for]
        for spec in new:
            self.looked_for.add(spec.run_id)
        by_id = {s.run_id: s for s in new}
        if new and self.neighbours is None:
            self.neighbours = neighbours_of(self.study)
        for run_id, neighbour in finished_elsewhere(self.study, new, self.neighbours or ()).items():
            self.copied |= neighbour.results([by_id[run_id]])
        return {s.run_id: self.copied[s.run_id] for s in specs if s.run_id in self.copied} | there


def with_corpus_of_neighbours(config: Config, study: Study) -> Config:
    """Return the configuration with the checksums of text and tokenizer that a neighbour which asked for the
    same ones has, where they are open: without them a run has no name."""
    for other in studies_in(study.root.parent):
        if config.data.sha256 and (config.tokens.name == "characters" or config.tokens.sha256):
            break
        with suppress(UserError, OSError, LookupError):
            config = _adopted(config, other.header(checked=False))
    return config


def _adopted(config: Config, header: StudyHeader) -> Config:
    requested: Mapping[str, Any] = header["requested"]
    for key in ("data", "tokens"):
        part = getattr(config, key)
        if not part.sha256 and requested.get(key) == to_dict(part):
            sha256 = header["config"][key]["sha256"]
            config = replace(config, **{key: replace(part, sha256=sha256)})
    return config
