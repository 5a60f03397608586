"""Runs that a study will not train, because another one in the same folder has finished them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

from ebc_lab.config.dicts import to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import Config
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec

from ..stages.stage import ResultsOf
from ..store.neighbours import Neighbour, finished_elsewhere, neighbours_of
from ..store.study import Study, studies_in


@dataclass
class WithNeighbours:
    """What a study has, and what it would copy from other studies; called with specs, it returns the results
    of both by run id."""

    study: Study
    own: ResultsOf
    copied: dict[str, RunResult] = field(default_factory=dict)  # by run id
    looked_for: set[str] = field(default_factory=set)  # ids of the runs that neighbours were asked for

    @cached_property
    def neighbours(self) -> list[Neighbour]:
        return neighbours_of(self.study)

    def __call__(self, specs: list[RunSpec]) -> dict[str, RunResult]:
        there = self.own(specs)
        new = {s.run_id: s for s in specs if s.run_id not in there and s.run_id not in self.looked_for}
        self.looked_for |= new.keys()
        found = finished_elsewhere(self.study, [*new.values()], self.neighbours) if new else {}
        for run_id, neighbour in found.items():
            self.copied |= neighbour.results([new[run_id]])
        return {s.run_id: self.copied[s.run_id] for s in specs if s.run_id in self.copied} | there


def with_corpus_of_neighbours(config: Config, study: Study) -> Config:
    """Return the configuration with the checksums of text and tokenizer, where they are open, of a neighbour
    that asked for the same text and tokens: without them a run has no name."""
    for other in studies_in(study.root.parent):
        if config.data.sha256 and (config.tokens.name == "characters" or config.tokens.sha256):
            break
        with suppress(UserError, OSError, LookupError):
            header = other.header(checked=False)
            found = {}
            for key in ("data", "tokens"):
                part = getattr(config, key)
                if not part.sha256 and header["requested"].get(key) == to_dict(part):
                    found[key] = replace(part, sha256=header["config"][key]["sha256"])
            config = replace(config, **found)
    return config
