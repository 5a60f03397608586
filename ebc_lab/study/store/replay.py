"""A check that recorded decisions follow from the results on disk: each decision is made again and compared.

The check only reads, and needs neither the corpus nor torch. Runs get the names that they have under the
version of torch that the study recorded. Numbers may differ in their last digits, as those of another CPU or
version of scipy do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ebc_lab import __version__
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import NUMERICS_VERSION, recorded_environment
from ebc_lab.records.decisions import Decision
from ebc_lab.records.json_files import as_json, checksum_holds

from ..stages.rules import SEAL, Undecidable
from ..stages.runs import distinct
from ..stages.stage import planned_runs, stage_of
from ..stages.statistics import ROUNDING
from .reuse import runs_in_words
from .snapshot import Snapshot, read
from .study import Study

SHOWN = 60  # characters of a value that is itself a list or a mapping


def replay(study: Study, stage: str | None = None) -> dict[str, Any]:
    """Decide one stage again, or every decided stage, and compare with the record. Return `study`, `same`
    (whether all agree), `note`, which names another version that made the study, and `stages`: for each
    stage, `same`, `differences` (path, recorded, recomputed) and `problem`, the reason why it could not be
    decided again, or None. Raises UserError if there is no decision to repeat."""
    snapshot = read(study)
    stages = snapshot.config.study.stages
    recorded = snapshot.decisions
    asked = snapshot.decided(stage)
    made: dict[str, Decision] = {}
    findings: dict[str, Any] = {}
    broken: str | None = None  # why no later stage can be decided
    with study.blame_files(), recorded_environment(snapshot.header["environment"]):
        for name in stages[: stages.index(asked[-1]) + 1]:
            problem = broken or _decide_again(name, snapshot, made)
            if problem and not broken:
                broken = f"builds on {name}, which could not be decided again"
            if name in asked:
                differences = [] if problem else _differences(recorded[name], made[name])
                if [d["path"] for d in differences] == [SEAL] and checksum_holds(recorded[name], SEAL):
                    differences = []  # all that it seals is the same, up to rounding
                same = not (problem or differences)
                findings[name] = {"same": same, "differences": differences, "problem": problem}
    same = all(f["same"] for f in findings.values())
    made_by = _release(snapshot.header["ebc_lab"], snapshot.header["environment"]["numerics_version"])
    here = _release(__version__, NUMERICS_VERSION)
    note = (
        ""
        if made_by == here
        else f"made by {made_by}; this is {here}: CHANGELOG.md has what it decides otherwise"
    )
    return {"study": study.name, "same": same, "note": note, "stages": findings}


def _release(version: str, numerics: int) -> str:
    return f"ebc-lab {version} (numerics {numerics})"


def _decide_again(stage: str, snapshot: Snapshot, made: dict[str, Decision]) -> str | None:
    """Decide a stage and add the decision to `made`. Return the reason if that is not possible, or None."""
    config = snapshot.config
    try:
        specs, results = planned_runs(stage, config, made, snapshot.results_of)
        runs = distinct(specs)
        missing = [s.run_id for s in runs if s.run_id not in results]
        if missing:
            return runs_in_words(missing, len(runs), "missing")
        made[stage] = as_json(stage_of(stage).decide(config, specs, results, made))
    except (UserError, Undecidable) as error:
        return str(error)
    return None


def _differences(recorded: Any, made: Any, path: str = "") -> list[dict[str, Any]]:
    """Return `path`, `recorded` and `recomputed` for each value in which two decisions differ by more than
    rounding."""
    numbers = isinstance(recorded, float) and isinstance(made, float)
    if recorded == made or (numbers and math.isclose(recorded, made, rel_tol=ROUNDING, abs_tol=ROUNDING)):
        return []
    if isinstance(recorded, Mapping) and isinstance(made, Mapping):
        keys = dict.fromkeys([*recorded, *made])
        pairs = [(f"{path}.{k}" if path else str(k), recorded.get(k), made.get(k)) for k in keys]
    elif isinstance(recorded, list) and isinstance(made, list) and len(recorded) == len(made):
        pairs = [(f"{path}[{i}]", a, made[i]) for i, a in enumerate(recorded)]
    else:
        return [{"path": path, "recorded": recorded, "recomputed": made}]
    return [found for inside, a, b in pairs for found in _differences(a, b, inside)]


def replay_in_words(findings: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on each stage: `lr_sweep: the same`, the stage's problem, or a line per difference."""
    for stage, f in findings["stages"].items():
        if f["same"]:
            yield f"{stage}: the same"
        elif f["problem"]:
            yield f"{stage}: different: {f['problem']}"
        else:
            yield f"{stage}: different in {len(f['differences'])} place(s)"
            for d in f["differences"]:
                yield f"  {d['path']}: {_short(d['recorded'])} → {_short(d['recomputed'])}"
    if findings["note"] and not findings["same"]:
        yield findings["note"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if not isinstance(value, list | dict) or len(text) <= SHOWN else text[:SHOWN] + "…"
