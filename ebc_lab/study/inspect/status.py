"""How far a study is, from its files alone."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ebc_lab.config.errors import UserError, visible
from ebc_lab.config.identity import digest, study_environment
from ebc_lab.records.figures import FINISHED
from ebc_lab.records.json_files import read_json
from ebc_lab.records.locks import is_locked
from ebc_lab.records.paths import SpecRecord

from ..guards import cause_class
from ..launch import queue as queue_module
from ..launch.pool import slots
from ..launch.session import sessions_in
from ..so_far import SoFar, open_stage, outlook, so_far
from ..stages.stage import stage_of
from ..store import manifest
from ..store.counts import TRAINING, counted
from ..store.index import Index
from ..store.reuse import remaining_work
from ..store.snapshot import Snapshot, read
from ..store.study import RETRIED, Brief, Study, recorded_config
from . import pace
from .forecast import forecast, training_runs
from .reproduce import continuing, run_again
from .slots import SlotUse, timeline


def status(study: Study) -> dict[str, Any]:
    """Return how far a study is. Raises UserError where there is none, or its study.json cannot be read.

    `state` is `running` (a process holds it), `finished`, `finished_with_failures`, `stale` (decided, but a
    decision no longer follows from the files), `interrupted` (begun, nobody holds it) or `empty` (nothing
    trained yet). `problems` names damaged files. A stage is `decided`, `stale`, `open` or `waiting`;
    `would_train` counts the runs that the same command would train again for a stale one, None where that
    depends on an earlier stage.
    """
    study.must_exist()
    runs = Index(study)
    key = _key_at_rest(study, runs)
    if key and (known := runs.recall("status", key)):
        answer: dict[str, Any] = json.loads(known)
        return answer
    snapshot = read(study, strict=False, runs=runs)
    with study.blame_files():
        answer = _status(snapshot)
    open_runs = (study.run_files(r.run_id) for r in runs.records if not r.brief.outcome)
    if key and not any(is_locked(run.lock) for run in open_runs):  # no process trains one of them
        runs.remember("status", json.dumps(answer), key)
    return answer


def _key_at_rest(study: Study, runs: Index) -> str:
    """Return a key of all that the status of a study depends on beside its runs; empty where that cannot be
    said, since a process holds it or it has Slurm jobs."""
    if not runs.state or study.holder() is not None or study.launcher_file.exists():
        return ""
    try:
        made_of = [f for f in (study.header_file, study.decisions_file) if f.exists()]
        files = [manifest.sha256_of(file) for file in made_of]
        environment = study_environment(recorded_config(study.header(), checked=False))
    except (OSError, UserError):
        return ""
    about = [environment, study.noted_command(), str(study.root), os.getcwd()]
    return digest([*files, *about])


def _status(snapshot: Snapshot) -> dict[str, Any]:
    study = snapshot.study
    config = snapshot.config
    records = snapshot.records
    holder = study.holder()
    queue, unavailable = _queue(study, config.launcher.queue_every_s)
    runs = [run_status(study, r.brief) for r in records if r.brief.kind]
    failures = failures_of(study, [r for r in runs if r["outcome"] and r["outcome"] not in FINISHED])
    because = snapshot.stale_decisions()
    if holder is not None:
        state = "running"
    elif because:
        state = "stale"
    elif snapshot.finished:
        state = "finished_with_failures" if failures else "finished"
    else:
        state = "interrupted" if runs else "empty"
    early = None
    eta = 0.0 if state.startswith("finished") else None
    if eta is None and state != "stale":  # of a stale study it depends on what is decided again
        known, eta = _ahead(snapshot, holder, runs)
        early = _early(snapshot, known)
    in_progress = [r for r in runs if r["outcome"] is None and r["progress"]]
    retried = state == "finished_with_failures" and any(f["outcome"] in RETRIED for f in failures)
    to_go_on = (retried or state in ("interrupted", "empty", "stale")) and study.resumable
    return {
        "study": study.name,
        "root": visible(str(study.place)),
        "state": state,
        "holder": holder,
        "scale": config.scale,
        "corpus": snapshot.header["corpus"],
        "stages": _stages(snapshot, because, runs),
        "runs": counted(snapshot.sorts_of_runs().values()),
        "running": in_progress if holder is not None or queue else [],
        "queue": queue,
        "joined": joined(study),
        "eta_s": eta,
        "so_far": early,
        "slots": slots_used(snapshot),
        "failures": failures,
        "continue": continuing(study, snapshot.header) if to_go_on else None,
        "problems": [*snapshot.problems, *unavailable],
    }


def slots_used(snapshot: Snapshot) -> SlotUse | None:
    """Return how busy the study's slots were; None where no attempt has ended."""
    busy = timeline(snapshot.records)
    return busy.use if busy else None


def known_so_far(snapshot: Snapshot) -> dict[str, Any] | None:
    """Return what is known of the stage that is open: its name, a `line` about it, and how many of its `runs`
    have ended; None where all stages are decided, or a decision cannot be used."""
    if snapshot.finished or snapshot.faults:
        return None
    known, _ = _ahead(snapshot, snapshot.study.holder(), [])
    return _early(snapshot, known)


def _early(snapshot: Snapshot, known: SoFar | None) -> dict[str, Any] | None:
    """Return `known_so_far`; its line takes the latest evaluations of the runs in progress into account."""
    if known is None:
        return None
    flying = []
    for brief in (record.brief for record in snapshot.records):
        if brief.kind and brief.outcome is None and brief.stage == known.stage:
            now = run_status(snapshot.study, brief)
            flying += [{**now, **now["progress"]}] if now["progress"] else []
    return {"stage": known.stage, "line": known.line(flying), "ended": known.ended, "runs": known.runs}


def _stages(
    snapshot: Snapshot, because: Mapping[str, str], runs: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the study's stages: state, runs by outcome, headlines. `because`: stage -> why its decision is
    stale."""
    decisions = snapshot.decisions
    work = remaining_work(snapshot.config, snapshot.reusable_results()) if because else []
    would_train = {w.stage: w.missing for w in work}
    stages = []
    sorts = snapshot.sorts_of_runs()
    for stage in snapshot.config.study.stages:
        trained = [r for r in runs if r["stage"] == stage and sorts[r["run_id"]] == TRAINING]
        outcomes = Counter(r["outcome"] or "open" for r in trained)
        if stage in because:
            state = "stale"
        elif stage in decisions:
            state = "decided"
        else:
            state = "open" if outcomes else "waiting"
        readable = stage in decisions and stage not in snapshot.faults  # others may lack anything
        stages.append(
            {
                "stage": stage,
                "state": state,
                "runs": outcomes.total(),
                "outcomes": dict(outcomes),
                "decided": stage_of(stage).headlines(decisions[stage]) if readable else [],
                "stale_because": because.get(stage),
                "would_train": would_train[stage] if stage in because else None,
            }
        )
    return stages


def run_status(study: Study, run: Brief) -> dict[str, Any]:
    """Return what a planned run is, and how it ended or how far it is: its `progress` and latest evaluation,
    None before its first step."""
    progress = None if run.outcome else study.progress(run.run_id)
    if progress is not None:
        at_step, loss = study.last_evaluation(run.run_id) or (None, None)
        progress |= {"at_step": at_step, "val_loss": loss}
    return {
        "run_id": run.run_id,
        "stage": run.stage,
        "arm": run.arm,
        "seed": run.seed,
        "steps": run.steps,
        "outcome": run.outcome,
        "cause": run.cause,
        "wall_s": run.wall_s,
        "progress": progress,
    }


def failures_of(
    study: Study, failed: list[dict[str, Any]], *, portable: bool = False
) -> list[dict[str, Any]]:
    """Return failed runs grouped by cause, each group with the command that trains its first run again: None
    for a measurement, and for a run that was lost. `portable`: as it is typed in the folder that holds the
    study."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for r in failed:
        groups.setdefault(cause_class(r["run_id"], r["outcome"], r["cause"]), []).append(r)
    failures = []
    for alike in groups.values():
        run_id, outcome = alike[0]["run_id"], alike[0]["outcome"]
        files = study.run_files(run_id)
        command = None
        if outcome not in RETRIED:  # a lost run did nothing wrong: the study's own command trains it again
            kind = read_json(files.spec, SpecRecord)["kind"]
            command = run_again(study, run_id, portable=portable) if kind == "train" else None
        failures.append(
            {
                "outcome": outcome,
                "cause": alike[0]["cause"] or "",
                "runs": [r["run_id"] for r in alike],
                "log": str(files.log),
                "command": command,
            }
        )
    return failures


def _queue(study: Study, every_s: float) -> tuple[dict[str, int], list[str]]:
    """Return how many of the study's Slurm jobs are in each state, and what went wrong in asking for them.
    Slurm is asked no more often than the launcher would ask."""
    try:
        session = queue_module.session_of(study)
        known = queue_module.cached_jobs(session, every_s) if session else {}
    except (UserError, queue_module.QueueUnavailable) as error:
        return {}, [str(error)]
    return dict(Counter(job.state for job in known.values() if job.live)), []


def joined(study: Study) -> list[dict[str, Any]]:
    """Return the workers that have joined a running study from other machines: `worker`, `host`,
    `run_ids`."""
    workers = []
    for session in sessions_in(study):
        notes = session.notes()
        for worker in sorted(session.guests(notes)):
            run_ids = [run_id] if (run_id := notes[worker].get("run_id")) else []
            workers.append({"worker": worker, "host": notes[worker].get("host"), "run_ids": run_ids})
    return workers


def _ahead(
    snapshot: Snapshot, holder: Mapping[str, Any] | None, runs: Sequence[Mapping[str, Any]]
) -> tuple[SoFar | None, float | None]:
    """Return what is known of the stage that is open, and the seconds left for the runs that are expected, at
    the pace of the finished ones; None before one has finished.

    The process that runs the study has left both; without one they are worked out anew, which takes
    milliseconds for each run. `runs`: as `run_status` has them.
    """
    config = snapshot.config
    left_behind = outlook(snapshot.study, holder)
    if left_behind and left_behind[0].stage == open_stage(config, snapshot.decisions):
        return left_behind
    results = snapshot.reusable_results()
    expected = forecast(config, ("expected",), results)["expected"]
    known = so_far(config, snapshot.decisions, results, training_runs(expected))
    rate = pace.learned(snapshot.records)
    if rate is None:
        return known, None
    training = [s for specs in expected.values() for s in specs if s.kind == "train"]
    done = results(training)
    shares = {r["run_id"]: r["progress"].get("step", 0) / r["steps"] for r in runs if r["progress"]}
    left = sum(rate.seconds(s) * (1 - shares.get(s.run_id, 0.0)) for s in training if s.run_id not in done)
    return known, float(left / slots(config))
