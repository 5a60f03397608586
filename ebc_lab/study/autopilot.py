"""The study, stage after stage: plan, train what is missing, decide, record; then tables, plots and the verdict.

Everything it does is a function of the configuration and of the results on disk, so the same command again carries on.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import Config
from ebc_lab.records.files import refuse_unwritable
from ebc_lab.workloads.corpus import check_length, locate

from .guards import Breaker, Limits, StageFailed
from .launch import Pool, opened
from .resolve import resolve_study
from .stages import decision_that_shows, planned_runs, speculative_runs, stage_of
from .stages.rules import Decision, Results, Undecidable
from .stages.runs import distinct
from .stages.spec import RunSpec
from .store import manifest
from .store.study import FINISHED, RETRIED, RETRIED_UNFINISHED, Cancelled, Study
from .trackers import following

Say = Callable[[str], None]
Tabulate = Callable[[Study, str, Sequence[RunSpec], Results], None]
Conclude = Callable[[Config, Study, dict[str, Decision], Say], dict[str, Any] | None]


@dataclass
class Listener:
    """What the caller does while a study runs, all optional: it is told, and it writes what is made for readers.

    `tabulate(study, stage, specs, results)` writes a stage's table; `conclude(config, study, decisions, say)` writes what a
    study leaves behind after its last stage, and returns the verdict if there is one. Both are `ebc_lab.report.conclude`'s.
    """

    say: Callable[[str], None] = lambda text: None
    decided: Callable[[str, Decision], None] = lambda stage, decision: None
    watch: Callable[[Progress], None] = lambda progress: None
    tabulate: Tabulate = lambda study, stage, specs, results: None
    conclude: Conclude = lambda config, study, decisions, say: None


@dataclass
class Progress:
    """Where a running study stands, for the live view."""

    study: str
    stage: str
    at_a_time: int  # runs
    done: int = 0
    total: int = 0
    running: list[dict[str, Any]] = field(default_factory=list)  # run_id, step, steps, steps_per_s
    eta_s: float | None = None


@dataclass
class Outcome:
    """What a call did and found."""

    study: Study
    trained: int
    failed: list[str]
    stages: list[str]
    warning: str | None = None
    acceptance: dict[str, Any] | None = None
    ablation: Decision | None = None


def study_of(config: Config) -> Study:
    return Study(Path(config.output_dir).expanduser() / config.study.name)


# -- the stages -----------------------------------------------------------------------------------------------------------


def autopilot(
    config: Config,
    listener: Listener,
    *,
    stages: Sequence[str] | None = None,
    force: bool = False,
    limits: Limits | None = None,
) -> Outcome:
    """Run `stages` of the study in order (all of `study.stages` by default), or carry on with them.

    Raises UserError (configuration, a held study, a missing earlier stage), StageFailed (also when `limits` are used up),
    WorkersFailed, Cancelled, KeyboardInterrupt.
    """
    study = study_of(config)
    order = config.study.stages
    stages = order if stages is None else stages
    if stages[0] not in order:
        raise UserError(f"study {study.name} has no stage {stages[0]}; its stages are {', '.join(order)}.")
    earlier = order[: order.index(stages[0])]
    _refuse_lacking(stages[0], study.decisions(), earlier)
    if not study.exists():  # whatever is wrong leaves nothing behind
        refuse_unwritable(study.root)
        check_length(locate(config.data), config.model.context)
    study.prepare()
    with study.held():
        study.cancel_mark.unlink(missing_ok=True)
        config, corpus = resolve_study(config, study, listener.say, force=force)
        if corpus.warning:
            listener.say(f"warning: {corpus.warning}")
        manifest.begin(study.root)
        finished = order[-1] in study.decisions()
        retried = study.forget(RETRIED if finished else RETRIED_UNFINISHED, stages)
        if retried:
            listener.say(f"{len(retried)} run(s) that were lost or failed are tried again")
        decisions: dict[str, Decision] = {}
        for stage in earlier:  # decided again from their runs, so that a stale decision cannot be built on
            _refuse_lacking(stages[0], study.decisions(), [stage])
            specs, results = planned_runs(stage, config, decisions, study.results)
            if any(s.run_id not in results for s in specs):
                raise UserError(
                    f"the runs of {stage} are not all there: run `ebc-lab stage {stage} …` first."
                )
            decisions[stage] = _decide(stage, config, specs, results, decisions)
            _record(study, stage, decisions[stage], listener)
        before = _trained(study)
        with following(config.tracker, study.root, listener.say), opened(config, study, listener.say) as pool:
            for stage in stages:
                specs = _stage(stage, stages, config, study, decisions, pool, listener, limits or Limits())
                results = study.results(specs)
                decisions[stage] = _decide(stage, config, specs, results, decisions)
                _record(study, stage, decisions[stage], listener)
                listener.decided(stage, decisions[stage])
                listener.tabulate(study, stage, specs, results)
        accepted = listener.conclude(config, study, decisions, listener.say) if order[-1] in stages else None
        manifest.complete(study.root)
        trained, failed = len(_trained(study) - before), _failed(study)
        return Outcome(
            study,
            trained,
            failed,
            list(stages),
            corpus.warning,
            accepted,
            decision_that_shows("arms", decisions),
        )


def _refuse_lacking(stage: str, known: Mapping[str, Decision], earlier: Sequence[str]) -> None:
    lacking = next((s for s in earlier if s not in known), None)
    if lacking:
        raise UserError(
            f"stage {stage} needs the decision of {lacking}: run `ebc-lab stage {lacking} …` with the same settings first."
        )


def _record(study: Study, stage: str, decision: Decision, listener: Listener) -> None:
    """Write a decision, and say it when it takes the place of another one."""
    if study.write_decision(stage, decision):
        listener.say(
            f"{stage}: the recorded decision does not follow from the runs that are there now; it is replaced, and what was "
            "built on it is decided again"
        )


def _decide(
    stage: str,
    config: Config,
    specs: Sequence[RunSpec],
    results: dict[str, Any],
    decisions: dict[str, Decision],
) -> Decision:
    try:
        return stage_of(stage).decide(config, specs, results, decisions)
    except Undecidable as error:
        raise StageFailed(str(error)) from None


def _stage(
    stage: str,
    stages: Sequence[str],
    config: Config,
    study: Study,
    decisions: dict[str, Decision],
    pool: Pool,
    listener: Listener,
    limits: Limits,
) -> list[RunSpec]:
    """Train until the stage asks for nothing more. -> its runs."""
    while True:
        specs, results = planned_runs(stage, config, decisions, study.results)
        runs = distinct(specs)
        missing = [s for s in runs if s.run_id not in results]
        if not missing:
            return specs
        timed = [s for s in missing if s.kind != "train"]
        wave = limits.admitted([s for s in missing if s.kind == "train"])
        if not wave and len(timed) < len(missing):
            raise StageFailed(limits.message(f"{len(missing)} run(s) of {stage} are still to be trained"))
        wave = wave or timed[:1]  # a measurement of time runs alone
        later = list(stages)[list(stages).index(stage) + 1 :] if wave != timed[:1] and not limits.any else []
        wanted = {s.run_id for s in runs}
        spare = [
            s for s in distinct(speculative_runs(config, decisions, wave, later)) if s.run_id not in wanted
        ]
        if stage in study.decisions():  # a deleted run, or one whose name changed with the code
            listener.say(
                f"{stage} was decided, but {len(missing)} of its {len(runs)} runs are not there: trained again"
            )
        manifest.strike(
            study.root, runs=[s.run_id for s in [*wave, *spare] if not study.has_result(s.run_id)]
        )
        for spec in [*wave, *spare]:
            study.write_spec(spec)
        listener.say(
            f"{stage}: {len(wave)} run(s) to train, {len(runs) - len(missing)} of {len(runs)} there already"
        )
        _train(stage, study, runs, wave, spare, pool, listener, limits)


def _train(
    stage: str,
    study: Study,
    specs: list[RunSpec],
    wave: list[RunSpec],
    spare: list[RunSpec],
    pool: Pool,
    listener: Listener,
    limits: Limits,
) -> None:
    progress = Progress(study.name, stage, pool.at_a_time, total=len(specs))
    by_id = {s.run_id: s for s in [*spare, *wave]}
    left = {s.run_id: s for s in wave}
    known = [found for s in specs if s.run_id not in left and (found := study.result(s.run_id))]
    breaker = Breaker(stage, study, proven=any(found["outcome"] in FINISHED for found in known))
    mark = study.cancel_mark

    def check_in(done: Sequence[str], busy: Sequence[Sequence[str]]) -> None:
        if mark.exists():
            raise Cancelled(f"study {study.name} was cancelled; the same command carries on from here")
        limits.tick(len(busy))
        for run_id in done:
            spec, found = left.pop(run_id), study.result(run_id)
            assert found is not None
            limits.ended(spec, found)
            if found["outcome"] not in FINISHED:
                listener.say(f"{stage}: {run_id} {found['outcome']}: {found.get('cause')}")
            breaker.saw(run_id, found, len(left))
        progress.done = len(specs) - len(left)
        progress.running = [
            {"run_id": s.run_id, "arm": s.arm, "lr": s.run.optimizer.lr, "seed": s.run.seed, **now}
            for run_ids in busy
            for run_id in run_ids
            if (s := by_id.get(run_id)) and (now := study.progress(run_id))
        ]
        progress.eta_s = _eta(progress, list(left.values()))
        listener.watch(progress)

    pool.run(wave, spare, check_in, canary=not breaker.proven and wave[0].kind == "train")


def _eta(progress: Progress, left: list[RunSpec]) -> float | None:
    """Seconds until the wave is done, from the speed of the runs in progress."""
    rates = [r["steps_per_s"] for r in progress.running if r["steps_per_s"] > 0]
    if not rates or not left:
        return None
    ids = {s.run_id for s in left}
    done = sum(r["step"] for r in progress.running if r["run_id"] in ids)
    return float(sum(s.run.steps for s in left) - done) / (
        statistics.fmean(rates) * min(progress.at_a_time, len(left))
    )


def _trained(study: Study) -> set[str]:
    """Ids of the training runs that have a result."""
    return {
        run_id
        for run_id in study.run_ids()
        if study.has_result(run_id) and not run_id.startswith("overhead_")
    }


def _failed(study: Study) -> list[str]:
    """Run ids whose outcome is no result."""
    return [r.run_id for r in study.records() if r.result is not None and r.result["outcome"] not in FINISHED]
