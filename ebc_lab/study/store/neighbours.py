"""What a study takes from its neighbours, the other studies in its output folder: finished runs and answers.

A run's name holds the hash of everything that can change the run's numbers, so two runs of the same name are
the same run. Such a run is copied instead of trained again. It is not linked, so no study needs the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ebc_lab.config.dicts import to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest
from ebc_lab.config.parts.target import TargetConfig
from ebc_lab.config.schema import Config
from ebc_lab.config.study_checks import stage_seeds
from ebc_lab.records.decisions import Candidate, Decision
from ebc_lab.records.figures import FINISHED, RunResult
from ebc_lab.records.files import read_regular, write_atomic
from ebc_lab.records.json_files import write_checksummed
from ebc_lab.records.locks import run_lock
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.spec import RunSpec
from ebc_lab.records.streams import MOST_BYTES

from . import attempts, manifest
from .study import EarlierAnswer, Study, studies_in

Neighbour = tuple[Study, frozenset[str]]  # another study in the folder, and the ids of its planned runs


def neighbours_of(study: Study) -> list[Neighbour]:
    """Return the other studies in a study's output folder, newest first."""
    found = []
    for neighbour in studies_in(study.root.parent):
        if neighbour.name != study.name:
            with suppress(OSError):  # it may be somebody else's
                found.append((neighbour, frozenset(neighbour.run_ids())))
    return found


def finished_elsewhere(
    study: Study, specs: Sequence[RunSpec], neighbours: Sequence[Neighbour] | None = None
) -> dict[str, Study]:
    """Return, by run id, the neighbour from which to copy each run: one that has finished the run, and still
    has the run's files as recorded. Timing runs are left out, since they depend on the machine and the time
    of day. `neighbours`: the result of `neighbours_of`, if the caller already has it."""
    elsewhere: dict[str, Study] = {}
    left = {s.run_id: s for s in specs if s.kind == "train"}
    if neighbours is None:
        neighbours = neighbours_of(study) if left else []
    for neighbour, runs in neighbours:
        with suppress(OSError, UserError):  # nothing is taken from a study whose manifest cannot be trusted
            there = [left[r] for r in left.keys() & runs if neighbour.has_result(r)]
            recorded = manifest.entries(neighbour.root) if there else {}
            for spec in there:
                if _is_sound(neighbour, spec, recorded):
                    elsewhere[spec.run_id] = neighbour
                    del left[spec.run_id]
    return {s.run_id: elsewhere[s.run_id] for s in specs if s.run_id in elsewhere}


def _is_sound(study: Study, spec: RunSpec, recorded: Mapping[str, str]) -> bool:
    """Return whether a run has finished, and its files match the checksums in its result and manifest."""
    files = study.run_files(spec.run_id)
    with suppress(UserError, OSError, LookupError):
        result = study.results([spec])[spec.run_id]
        if result["outcome"] not in FINISHED:
            return False
        if not (_is_brief(study, files, recorded) or _streams_match(files, result)):
            return False
        names = {str(path.relative_to(study.root)): path for path in (files.result, *_copied(files, result))}
        known = names.keys() & recorded.keys()
        return all(manifest.sha256_of(names[name]) == recorded[name] for name in known)
    return False


def _is_brief(study: Study, files: RunFiles, recorded: Mapping[str, str]) -> bool:
    """Return whether a run came from a brief bundle: its result is recorded, but it has no step log."""
    result, steps = (str(path.relative_to(study.root)) for path in (files.result, files.steps))
    return not files.steps.exists() and result in recorded and steps not in recorded


def _streams_match(files: RunFiles, result: RunResult) -> bool:
    """Return whether the run's streams and kept models match the checksums in the run's result."""
    recorded = result.get("streams", {})
    return {path.name: manifest.sha256_of(path) for path in _evidence(files, result)} == recorded


def _evidence(files: RunFiles, result: RunResult) -> list[Path]:
    models = (files.packed, files.model, files.weights)
    return [files.steps, files.evals, *(path for path in models if path.name in result.get("streams", {}))]


def _copied(files: RunFiles, result: RunResult) -> list[Path]:
    return [*_evidence(files, result), files.log, files.attempts]


def take(study: Study, spec: RunSpec, neighbour: Study) -> bool:
    """Copy a finished run from a neighbour and return whether this succeeded. It fails if another process
    holds the run, if the run has a result, or if the neighbour's files are damaged or change meanwhile. The
    result is copied last: after a kill there is none, so the next command copies or trains the run."""
    study.write_spec(spec)
    files = study.run_files(spec.run_id)
    with run_lock(files.directory) as mine:
        if not mine or files.result.exists():
            return False
        try:
            result = neighbour.results([spec])[spec.run_id]
            theirs = neighbour.run_files(spec.run_id)
            recorded = {} if theirs.steps.exists() else manifest.entries(neighbour.root)
            brief = _is_brief(neighbour, theirs, recorded)
            to, paths = ([of.attempts] if brief else _copied(of, result) for of in (files, theirs))
            read = [read_regular(path, MOST_BYTES) if path.exists() else b"" for path in paths]
        except (UserError, OSError, LookupError):
            return False
        for path, content in zip(to, read, strict=True):
            write_atomic(path, content)
        if not (brief or _streams_match(files, result)):  # the neighbour's files changed during the copy
            return False
        attempts.note(files.directory, "taken", study=neighbour.name)
        write_checksummed(files.result, result)
        files.checkpoint.unlink(missing_ok=True)
        files.progress.unlink(missing_ok=True)
    return True


# -- earlier answers -----------------------------------------------------------------------------------------


def earlier_answers(
    study: Study, config: Config, specs: Sequence[RunSpec], known: Iterable[EarlierAnswer]
) -> list[EarlierAnswer]:
    """Return the earlier answers to the question that `specs` are to answer, oldest first: the `known`
    answers, those that the neighbours gave, and those listed in the study.json of neighbours that share seeds
    with the study.

    A neighbour asks the same question if two of the arms that it judges have the same settings, apart from
    seeds, as two arms of the study. If arms are to reach a target, one such arm is enough. If a neighbour has
    the same seed plan as the study, its answer is the study's own answer and not an earlier one.
    """
    mine: dict[str, set[int]] = {}
    for spec in (s for s in specs if s.kind == "train" and s.run.seed not in stage_seeds(config)):
        mine.setdefault(_without_seed(spec.identity), set()).add(spec.run.seed)
    plan = seed_plan(to_dict(config))
    found = {tuple(answer["seeds"]): answer for answer in known}
    for neighbour in reversed(studies_in(study.root.parent)):
        if neighbour.name == study.name:
            continue
        with suppress(UserError, OSError, LookupError):
            header = neighbour.header()
            theirs = _judged(neighbour, judged_candidates(config, neighbour.decisions()))
            common = {arm: seeds for arm, seeds in theirs.items() if arm in mine}
            if len(common) < (2 if TargetConfig.from_run(config).name == "none" else 1):
                continue
            seeds = sorted(set().union(*common.values()))
            shared = Counter(seed for arm, theirs_of in common.items() for seed in theirs_of & mine[arm])
            again = sorted(seed for seed, arms in shared.items() if arms > 1 or len(common) == 1)
            answers: list[EarlierAnswer] = [*header.get("earlier", [])] if again else []
            if seed_plan(header["config"]) != plan:  # else it is this very answer
                answers.append(EarlierAnswer(study=neighbour.name, seeds=seeds, shared=again))
            for answer in answers:
                of_mine = sorted(set(answer["seeds"]) & set().union(*mine.values()))
                found.setdefault(tuple(answer["seeds"]), {**answer, "shared": again and of_mine})
    return list(found.values())


def seed_plan(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the seed plan in a study's recorded settings: the seeds of the first look at the results, the
    largest number of seeds allowed, and the number of seeds that each further look adds."""
    finals = config["finals"] if "finals" in config["study"]["stages"] else {}
    most = finals.get("max_seeds", 0)
    return sorted(config["seeds"]), most, most and finals.get("seeds_per_look")


def judged_candidates(config: Config, decisions: Mapping[str, Decision]) -> list[Candidate]:
    """Return the runs that the decisions of judging stages compare. Runs on tuning seeds are left out."""
    judging = [d for stage, d in decisions.items() if getattr(config, stage).judges]
    return [c for d in judging for c in d["candidates"] if c["seed"] not in stage_seeds(config)]


def _judged(study: Study, candidates: Iterable[Candidate]) -> dict[str, set[int]]:
    """Return arm (digest of its runs' identity without the seed) -> the seeds on which it was judged."""
    arms: dict[tuple[Any, ...], str] = {}
    found: dict[str, set[int]] = {}
    for one in candidates:
        shown = tuple(one.get(key) for key in ("role", "arm", "lr", "lr_scale", "delta_star"))
        if shown not in arms:  # one spec is read for all seeds
            arms[shown] = _without_seed(study.spec(one["run_id"])["identity"])
        found.setdefault(arms[shown], set()).add(one["seed"])
    return found


def _without_seed(identity: Mapping[str, Any]) -> str:
    return digest({key: value for key, value in identity.items() if key != "seed"})


def seeds_taken(study: Study, config: Config) -> set[int]:
    """Return the seeds that are already used: the tuning seeds, and the seeds of the study and of its
    neighbours. A study that cannot be read is skipped."""
    taken = {*config.seeds, *stage_seeds(config)}
    for other in (study, *studies_in(study.root.parent)):
        with suppress(UserError, OSError, LookupError):
            taken.update(other.header(checked=False)["config"]["seeds"])
            taken.update(c["seed"] for d in other.decisions().values() for c in d["candidates"])
    return taken
