"""The progress of a study, read from its files alone."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ebc_lab.config.errors import UserError, visible
from ebc_lab.config.identity import digest, study_environment
from ebc_lab.records.figures import FINISHED
from ebc_lab.records.json_files import read_json
from ebc_lab.records.locks import is_locked
from ebc_lab.records.paths import SpecRecord

from ..guards import cause_class
from ..launch import queue as queue_module
from ..launch.session import sessions_in
from ..so_far import open_stage, outlook, so_far
from ..stages.stage import stage_of
from ..store import manifest
from ..store.counts import TRAINING, counted, upgraded
from ..store.index import Index
from ..store.reuse import environment_changes, remaining_work
from ..store.snapshot import Snapshot, read
from ..store.study import RETRIED, Brief, Study, recorded_config, run_again
from .forecast import expected_left
from .reproduce import continuing
from .slots import SlotUse, timeline


def status(study: Study) -> dict[str, Any]:
    """Return the status of a study. Raises UserError if the study does not exist or its study.json cannot be
    read.

    `state` is `running` (a process holds the study's lock), `finished`, `finished_with_failures`, `stale` (a
    recorded decision no longer follows from the files), `interrupted` (begun, but no process holds the lock)
    or `empty` (no runs yet). `problems` names damaged files. A stage is `decided`, `stale`, `open` or
    `waiting`. For a stale stage, `would_train` is the number of runs to train; None if it depends on an
    earlier stage.
    """
    study.must_exist()
    runs = Index(study)
    key = _key_at_rest(study, runs)
    if key and (known := runs.recall("status", key)):
        return cast(dict[str, Any], json.loads(known))
    snapshot = read(study, strict=False, runs=runs)
    with study.blame_files():
        answer = _status(snapshot)
    open_runs = (study.run_files(r.run_id) for r in runs.records if not r.brief.outcome)
    if key and not any(is_locked(run.lock) for run in open_runs):  # no process is training one of them
        runs.remember("status", key, json.dumps(answer))
    return answer


def _key_at_rest(study: Study, runs: Index) -> str:
    """Return a key made of everything that a study's status depends on. Return an empty key if the index has
    no `state`, if a file cannot be read, or if the status may change while the files do not: a process holds
    the study, or the study has Slurm jobs."""
    if not runs.state or study.holder() is not None or study.launcher_file.exists():
        return ""
    try:
        made_of = [f for f in (study.header_file, study.decisions_file) if f.exists()]
        files = [manifest.sha256_of(file) for file in made_of]
        environment = study_environment(recorded_config(study.header(), checked=False))
    except (OSError, UserError):
        return ""
    about = [environment, study.noted_command(), str(study.root), os.getcwd(), runs.state]
    return digest([*files, *about])


def _status(snapshot: Snapshot) -> dict[str, Any]:
    study = snapshot.study
    holder = study.holder()
    queue, unavailable = _queue(study, snapshot.config.launcher.queue_every_s)
    runs = _runs(snapshot)
    failed = [r for r in runs if r["outcome"] and r["outcome"] not in FINISHED]
    failures = failures_of(study, failed, study.called)
    because = snapshot.stale_decisions()
    if holder is not None:
        state = "running"
    elif because:
        state = "stale"
    elif snapshot.finished:
        state = "finished_with_failures" if failures else "finished"
    else:
        state = "interrupted" if runs else "empty"
    early, eta = None, 0.0 if state.startswith("finished") else None
    if eta is None and state != "stale":  # a stale study's depends on new decisions
        early, eta = _ahead(snapshot, holder, runs)
    retried = state == "finished_with_failures" and any(f["outcome"] in RETRIED for f in failures)
    trained = snapshot.trained_by()
    to_go_on = (retried or state in ("interrupted", "empty", "stale")) and study.resumable
    return {
        "study": study.name,
        "root": visible(str(study.place)),
        "state": state,
        "holder": holder,
        "scale": snapshot.config.scale,
        "corpus": snapshot.header["corpus"],
        "stages": _stages(snapshot, because, runs),
        "trained_by": {software: len(runs) for software, runs in trained.items()},
        "upgraded": upgraded(trained, study.called),
        "runs": counted(snapshot.sorts_of_runs().values()),
        "running": [r for r in runs if r["progress"]] if holder is not None or queue else [],
        "queue": queue,
        "joined": joined(study),
        "eta_s": eta,
        "so_far": early,
        "slots": slots_used(snapshot),
        "failures": failures,
        "continue": continuing(study, snapshot.header) if to_go_on else None,
        "anew": bool(environment_changes(snapshot.config, snapshot.header)),
        "problems": [*snapshot.problems, *unavailable],
    }


def slots_used(snapshot: Snapshot) -> SlotUse | None:
    """Return the use of the study's worker slots; None if no attempt has ended."""
    busy = timeline(snapshot.records)
    return busy.use if busy else None


def known_so_far(snapshot: Snapshot) -> dict[str, Any] | None:
    """Return the open `stage`, a `line` about its results so far, its number of `runs`, and how many of them
    have `ended`. Return None if all stages are decided, or a decision cannot be used."""
    if snapshot.finished or snapshot.faults:
        return None
    return _ahead(snapshot, snapshot.study.holder(), _runs(snapshot))[0]


def _stages(
    snapshot: Snapshot, because: Mapping[str, str], runs: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return an entry for each stage with its state, its runs by outcome and its headlines. `because`: stage
    -> why the stage's decision is stale."""
    decisions, sorts = snapshot.decisions, snapshot.sorts_of_runs()
    work = remaining_work(snapshot.config, snapshot.reusable_results()) if because else []
    would_train = {w.stage: w.missing for w in work}
    stages = []
    for stage in snapshot.config.study.stages:
        trained = [r for r in runs if r["stage"] == stage and sorts[r["run_id"]] == TRAINING]
        outcomes = Counter(r["outcome"] or "open" for r in trained)
        if stage in because:
            state = "stale"
        elif stage in decisions:
            state = "decided"
        else:
            state = "open" if outcomes else "waiting"
        readable = stage in decisions and stage not in snapshot.faults  # faulty ones may lack any key
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


def _runs(snapshot: Snapshot) -> list[dict[str, Any]]:
    return [run_status(snapshot.study, r.brief) for r in snapshot.records if r.brief.kind]


def run_status(study: Study, run: Brief) -> dict[str, Any]:
    """Return a planned run's main settings, its outcome, and its `progress` with the latest evaluation.
    `progress` is None if the run has ended or not begun."""
    progress = None if run.outcome else study.progress(run.run_id)
    if progress is not None:
        at_step, loss = study.last_evaluation(run.run_id) or (None, None)
        progress |= {"at_step": at_step, "val_loss": loss}
    shown = ("run_id", "stage", "arm", "seed", "steps", "outcome", "cause", "wall_s")
    return {**{key: getattr(run, key) for key in shown}, "progress": progress}


def failures_of(study: Study, failed: list[dict[str, Any]], called: str) -> list[dict[str, Any]]:
    """Return failed runs grouped by cause. Each group has a `command`, which trains the group's first run
    again. The command is None if this run is a measurement, or was lost or cancelled. `called`: how the
    command names the study."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for r in failed:
        groups.setdefault(cause_class(r["run_id"], r["outcome"], r["cause"]), []).append(r)
    failures = []
    for alike in groups.values():
        first = alike[0]
        files = study.run_files(first["run_id"])
        # a lost run is not at fault: the study's own command trains it again
        again = first["outcome"] not in RETRIED and read_json(files.spec, SpecRecord)["kind"] == "train"
        failures.append(
            {
                "outcome": first["outcome"],
                "cause": first["cause"] or "",
                "runs": [r["run_id"] for r in alike],
                "log": str(files.log),
                "command": run_again(called, first["run_id"]) if again else None,
            }
        )
    return failures


def _queue(study: Study, every_s: float) -> tuple[dict[str, int], list[str]]:
    """Return state -> number of the study's live Slurm jobs, and error messages if Slurm could not be asked.
    Slurm is asked at most once every `every_s` seconds."""
    try:
        session = queue_module.session_of(study)
        known = queue_module.cached_jobs(session, every_s) if session else {}
    except (UserError, queue_module.QueueUnavailable) as error:
        return {}, [str(error)]
    return dict(Counter(job.state for job in known.values() if job.live)), []


def joined(study: Study) -> list[dict[str, Any]]:
    """Return `worker`, `host` and `run_ids` of each worker from another machine in the running study."""
    workers = []
    for session in sessions_in(study):
        notes = session.notes()
        for worker in sorted(session.guests(notes)):
            host, run_id = (notes[worker].get(key) for key in ("host", "run_id"))
            workers.append({"worker": worker, "host": host, "run_ids": [run_id] if run_id else []})
    return workers


def _ahead(
    snapshot: Snapshot, holder: Mapping[str, Any] | None, runs: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any] | None, float | None]:
    """Return the result of `known_so_far`, and the seconds that the expected runs will still take at the pace
    of the finished runs (None before a run has finished).

    The process that runs the study keeps both in a file. Without that file, they are computed here, in a few
    milliseconds a run. `runs`: all runs, as `run_status` returns them; the line may mention one in progress.
    """
    config = snapshot.config
    known, left_s = outlook(snapshot.study, holder) or (None, None)
    if known is None or known.stage != open_stage(config, snapshot.decisions):
        results = snapshot.reusable_results()
        shares = {r["run_id"]: r["progress"].get("step", 0) / r["steps"] for r in runs if r["progress"]}
        expected = expected_left(config, results, shares)
        known = so_far(config, snapshot.decisions, results, expected["stages"])
        left_s = expected["seconds"]
    if known is None:
        return None, left_s
    flying = [{**r, **r["progress"]} for r in runs if r["progress"] and r["stage"] == known.stage]
    line = known.line(flying)
    return {"stage": known.stage, "line": line, "ended": known.done, "runs": known.runs}, left_s
