"""Run a study, stage by stage: plan runs, train the missing ones, decide and record; report at the end.

Everything follows from the configuration and the results on disk, so the same command continues a study.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ebc_lab.config.errors import MISTAKEN, UserError, count
from ebc_lab.config.schema import Config
from ebc_lab.config.study_checks import beyond_sensible
from ebc_lab.records.decisions import Acceptance, Decision
from ebc_lab.records.figures import FINISHED, RunResult
from ebc_lab.records.files import refuse_unwritable, stamp
from ebc_lab.records.spec import RunSpec
from ebc_lab.workloads.text import checked_text

from .guards import Breaker, Limits, StageFailed
from .launch import Pool, open_pool
from .launch.pool import PAUSE, Signs, slots
from .launch.queue import refuse_without_slurm
from .launch.rehearse import rehearse
from .mirror.upload import mirroring, refuse_unusable
from .resolve import WorkOf, resolve_study, with_earlier
from .so_far import SoFar, leave_outlook, so_far
from .stages.rules import Results, Undecidable
from .stages.runs import check_lengths, distinct
from .stages.stage import ending_stages, planned_runs, speculative_runs, stage_of
from .store import attempts, crate, manifest
from .store.counts import TRAINING, UNUSED, counted, sorts_of_runs, trained_by, upgraded
from .store.index import Index
from .store.neighbours import finished_elsewhere, take
from .store.study import RETRIED, RETRIED_UNFINISHED, Cancelled, Record, Study, study_of
from .trackers import following


@dataclass
class Listener:
    """Optional callbacks through which a caller follows a study.

    `say(text)` is called with every message, `decided(stage, decision)` after each requested stage is
    decided, and `watch(progress)` whenever the pool checks its runs. `tabulate(study, stage, specs, results)`
    writes a stage's table. `conclude(config, study, decisions, say)` writes the final outputs after the last
    stage and returns the verdict, if there is one. Both are in `ebc_lab.report.conclude`.
    `expect(config, results, under_way)` returns the work that remains, and `work(config)` the total, like
    `expected_left` and `expected_work` of `ebc_lab.study.inspect.forecast`. `stalled(text)` is called once if
    no run has made progress for a long time.
    """

    say: Callable[[str], None] = lambda text: None
    decided: Callable[[str, Decision], None] = lambda stage, decision: None
    watch: Callable[[Progress], None] = lambda progress: None
    tabulate: Callable[..., None] = lambda study, stage, specs, results: None
    conclude: Callable[..., Acceptance | None] = lambda config, study, decisions, say: None
    expect: Callable[..., Mapping[str, Any] | None] = lambda config, results, under_way: None
    work: WorkOf = lambda config: None
    stalled: Callable[[str], None] = lambda text: None


@dataclass
class Progress:
    """The state of a running study, for the live view."""

    study: str
    stage: str
    at_a_time: int  # runs that train in parallel
    done: int = 0  # training runs of the whole study that have a result
    total: int | None = None  # training runs that are expected in all
    left_s: float | None = None  # expected seconds until the study is done
    so_far: str = ""  # what is known of the open stage, in a line
    measuring: bool = False  # whether a measurement of time runs, alone; `total` does not count it
    # run_id, arm, lr, seed, step, steps, steps_per_s; val_loss and at_step, None before an evaluation
    running: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Outcome:
    """What one call of `autopilot` did and found."""

    study: Study
    runs: dict[str, int]  # sort of run -> how many of them ended in this call
    failed: list[str]  # ids of the runs that have no usable result
    stages: list[str]  # the stages that this call decided
    answer: list[str]  # what the study found up to the last of these stages, a line for each track
    decisions: dict[str, Decision]
    warning: str | None = None
    acceptance: Acceptance | None = None

    @property
    def trained(self) -> int:
        """Return how many runs this call of `autopilot` trained, including those not needed in the end."""
        return self.runs[TRAINING] + self.runs[UNUSED]


def autopilot(
    config: Config,
    listener: Listener,
    *,
    stages: Sequence[str] | None = None,
    force: bool = False,
    limits: Limits | None = None,
    command: Sequence[str] = (),
) -> Outcome:
    """Run or continue `stages` of a study in order (by default all of its stages), and return the outcome.

    `command`: the words of a command line that continues the study, recorded in case the study stops. Raises
    UserError (for a mistake in the settings, a study that another process runs, or an undecided earlier
    stage), StageFailed (also when `limits` are used up), WorkersFailed, Cancelled, KeyboardInterrupt.
    """
    study = study_of(config)
    order = config.study.stages
    stages = list(order if stages is None else stages)
    study.must_have(stages[0], order)
    earlier = order[: order.index(stages[0])]
    _refuse_undecided(stages[0], earlier, study.decisions())
    if config.launcher.name == "slurm":
        refuse_without_slurm("launcher=local")
    if not study.exists():  # a mistake that is found here leaves no files behind
        refuse_unwritable(study.root)
        refuse_unusable(config, study)
        check_lengths(config, checked_text(config)[0])
        rehearse(config, study, listener.say)
    study.must_be_ours()
    study.prepare()
    with study.held():
        study.cancel_mark.unlink(missing_ok=True)
        config, corpus = resolve_study(config, study, listener.say, force=force, work=listener.work)
        manifest.refuse_changed(study.root)
        runs = Index(study).records
        trained = trained_by(runs, sorts_of_runs(runs, {}))
        mixed = upgraded(trained, study.called, attempts.software(attempts.code_here()))
        for warning in filter(None, (corpus.warning, beyond_sensible(config), mixed)):
            listener.say(f"warning: {warning}")
        rehearse(config, study, listener.say)  # a second time only if a part was changed in between
        manifest.begin(study.root)
        if command:
            study.note_command(command)
        call = _Call(config, study, stages, listener, limits or Limits())
        call.forget_failures(runs)
        for stage in earlier:
            call.decide_again(stage)
        before = set(filter(study.has_result, study.run_ids()))
        with mirroring(config, study, listener.say):
            with (
                following(config.tracker, study.root, listener.say),
                open_pool(config, study, listener.say) as pool,
            ):
                for stage in stages:
                    call.run_stage(stage, pool)
            return call.conclude(before, corpus.warning)


@dataclass
class _Call:
    """One call of `autopilot`, which holds the study's lock, with the decisions made so far."""

    config: Config
    study: Study
    stages: list[str]
    listener: Listener
    limits: Limits
    decisions: dict[str, Decision] = field(default_factory=dict)
    taken: dict[str, str] = field(default_factory=dict)  # run copied from another study -> that study's name
    read: dict[str, tuple[Any, RunResult]] = field(default_factory=dict)  # run id -> which file, what it held

    def results(self, specs: list[RunSpec]) -> dict[str, RunResult]:
        """Return what `Study.results` would return, but read only files that are new or have changed."""
        for spec in specs:
            which = stamp(self.study.run_files(spec.run_id).result), spec.identity_sha256
            if which[0] is None:
                self.read.pop(spec.run_id, None)
            elif self.read.get(spec.run_id, (None,))[0] != which:
                self.read.pop(spec.run_id, None)  # the file may be removed before it is read
                found = self.study.results([spec])
                self.read |= {run_id: (which, result) for run_id, result in found.items()}
        return {s.run_id: self.read[s.run_id][1] for s in specs if s.run_id in self.read}

    def results_seen(self, specs: list[RunSpec]) -> dict[str, RunResult]:
        """Return the results as they were when last read. Use them for display, not for decisions."""
        self.results([s for s in specs if s.run_id not in self.read])
        return {s.run_id: self.read[s.run_id][1] for s in specs if s.run_id in self.read}

    def forget_failures(self, runs: Sequence[Record]) -> None:
        """Remove the results of runs that were lost or cancelled, so that the requested stages train these
        runs again. Until the last stage is decided, this includes runs that failed or ran out of memory."""
        finished = self.config.study.stages[-1] in self.study.decisions()
        outcomes = RETRIED if finished else RETRIED_UNFINISHED
        if again := self.study.forget(runs, outcomes, self.stages):
            self.listener.say(f"{len(again)} run(s) that were lost or failed are tried again")

    def decide_again(self, stage: str) -> None:
        """Decide an earlier stage again from its runs, so that nothing is built on an outdated decision.
        Raises UserError if the stage was never decided, or if any of its runs are missing."""
        _refuse_undecided(self.stages[0], [stage], self.study.decisions())
        specs, results = planned_runs(stage, self.config, self.decisions, self.results)
        if any(s.run_id not in results for s in specs):
            raise UserError(f"some runs of {stage} are missing: run `ebc-lab stage {stage} …` first.")
        self._decide(stage, specs, results)

    def run_stage(self, stage: str, pool: Pool) -> None:
        """Train until the stage asks for no more runs, decide the stage, and inform the listener."""
        answers = getattr(self.config, stage).judges and stage not in self.study.decisions()
        while True:
            specs, results = planned_runs(stage, self.config, self.decisions, self.results)
            if answers:  # for the first time under these settings
                self.config = with_earlier(self.study, self.config, stage, specs, self.listener.say)
            missing = [s for s in distinct(specs) if s.run_id not in results]
            if not missing:
                break
            if not self._take_from_neighbours(stage, missing):
                self._train(stage, distinct(specs), missing, pool)
        decision = self._decide(stage, specs, results)
        self.listener.decided(stage, decision)
        self.listener.tabulate(self.study, stage, specs, results)

    def _decide(self, stage: str, specs: Sequence[RunSpec], results: Results) -> Decision:
        """Decide a stage and record the decision. Report it if this replaces a different recorded decision.
        Raises StageFailed if the stage cannot be decided."""
        try:
            decision = stage_of(stage).decide(self.config, specs, results, self.decisions)
        except Undecidable as error:
            raise StageFailed(str(error)) from None
        self.decisions[stage] = decision
        if self.study.write_decision(stage, decision):
            self.listener.say(
                f"{stage}: the recorded decision does not follow from the runs that are there now, by the "
                "rules of this version; it is replaced, and what was built on it is decided again"
            )
        return decision

    def conclude(self, before: set[str], warning: str | None) -> Outcome:
        """Write the final outputs and return the outcome. `before`: ids of runs that ended before this
        call."""
        study = self.study
        verdict = None
        if self.config.study.stages[-1] in self.stages:
            with study.blame_files():
                verdict = self.listener.conclude(self.config, study, self.decisions, self.listener.say)
        crate.complete(study)
        if self.taken:
            counts = sorted(Counter(self.taken.values()).items())
            taken = ", ".join(f"{n} from {name}" for name, n in counts)
            self.listener.say(f"runs taken from other studies, and not trained: {taken}")
        records = Index(study).records
        failed = [r.run_id for r in records if r.brief.outcome not in (None, *FINISHED)]
        sorts = sorts_of_runs(records, self.decisions)
        ended = {run_id for run_id in sorts if study.has_result(run_id)} - before - self.taken.keys()
        runs = counted(sorts[run_id] for run_id in ended)
        ends = ending_stages(self.decisions)
        answer = [line for stage in ends for line in stage_of(stage).headlines(self.decisions[stage])]
        return Outcome(study, runs, failed, self.stages, answer, self.decisions, warning, verdict)

    def _take_from_neighbours(self, stage: str, missing: Sequence[RunSpec]) -> bool:
        """Copy missing runs that other studies in the folder have finished. Return whether any was copied."""
        there = finished_elsewhere(self.study, missing)
        manifest.remove_entries(self.study.root, runs=there)
        specs = {spec.run_id: spec for spec in missing}
        taken = {r: theirs.name for r, theirs in there.items() if take(self.study, specs[r], theirs)}
        for name in sorted({*taken.values()} - {*self.taken.values()}):
            self.listener.say(f"{stage}: runs are taken from {name}, where they are finished")
        self.taken |= taken
        return bool(taken)

    def _train(self, stage: str, runs: list[RunSpec], missing: list[RunSpec], pool: Pool) -> None:
        """Train one wave of the missing runs: as many as the limits admit or, if only timing runs are
        missing, one of those. Raises StageFailed if the limits admit no run."""
        study = self.study
        timed = [s for s in missing if s.kind != "train"]
        wave = self.limits.admit([s for s in missing if s.kind == "train"])
        if not wave and len(timed) < len(missing):
            what = f"{len(missing)} run(s) of {stage} are still to be trained"
            raise StageFailed(self.limits.message(what))
        wave = wave or timed[:1]  # a measurement of time runs alone
        if stage in study.decisions():  # a run was deleted, or its name changed with the code
            lacking = f"{len(missing)} of its {len(runs)} runs are not there"
            self.listener.say(f"{stage} was decided, but {lacking}: trained again")
        self.prepare(wave)
        self.listener.say(f"{stage}: {_wave_in_words(wave, timed, len(runs) - len(missing))}")
        watched = _Wave(self, stage, runs, wave)
        canary = not (watched.breaker.proven or watched.progress.measuring)
        pool.run(wave, watched.spare, watched.check_in, canary=canary)

    def prepare(self, planned: Sequence[RunSpec]) -> None:
        """Write the files that workers need to train these runs."""
        manifest.remove_entries(self.study.root, runs=[s.run_id for s in planned])
        for spec in planned:
            self.study.write_spec(spec)


class _Wave:
    """The runs that a pool is training: which have ended, which are left, and whether to stop."""

    def __init__(self, call: _Call, stage: str, runs: list[RunSpec], wave: Sequence[RunSpec]):
        self.call = call
        self.wave = wave
        measuring = wave[0].kind != "train"
        self.progress = Progress(call.study.name, stage, slots(call.config), measuring=measuring)
        self.asked = len(runs)
        self.left = {s.run_id: s for s in wave}
        self.spare: list[RunSpec] = []  # what idle workers may start on
        self._speculate()
        known = call.results([s for s in runs if s.run_id not in self.left])
        proven = any(result["outcome"] in FINISHED for result in known.values())
        self.breaker = Breaker(stage, call.study, proven=proven)
        self.expected: dict[str, Any] = {}  # what `Listener.expect` last returned, and when
        self.expected_at = time.monotonic()
        self.news = True  # whether a run has ended since then
        self.forecast_due = 0.0  # on the monotonic clock; the first at once
        self.known: SoFar | None = None
        self.signs = Signs()  # whether any run moves
        self.stalled: Any = None  # the sign at which a stall was last reported

    def check_in(self, done: Sequence[str], busy: Sequence[str]) -> list[str]:
        """Record what has happened since the last call, and return the ids of the runs that idle workers may
        start. `done`: ids of the runs that have ended since then; `busy`: ids of the runs that workers are
        training. Raises Cancelled, and StageFailed if the limits are used up or runs keep failing."""
        study = self.call.study
        if study.cancel_mark.exists():
            raise Cancelled(f"study {study.name} was cancelled")
        self.call.limits.tick(len(busy))
        for run_id in done:
            result = study.result(run_id)
            assert result is not None
            self.call.limits.record_end(self.left.pop(run_id), result)
            news = [f"{run_id}: {why}" for why in attempts.restarts(study.run_dir(run_id))]
            if result["outcome"] not in FINISHED:
                news.append(f"{run_id} {result['outcome']}: {result.get('cause')}")
            for line in news:
                self.call.listener.say(f"{self.progress.stage}: {line}")
            self.breaker.see(run_id, result, len(self.left))
        self.progress.running = self._running(busy)
        sign = len(self.left), self.progress.running
        launcher = self.call.config.launcher
        patience_s = max(launcher.start_s, launcher.heartbeat_s)  # beyond it, all hang or wait in a queue
        if self.signs.unchanged_s("wave", sign) > patience_s and sign != self.stalled:
            self.stalled = sign
            under_way = f"{len(self.progress.running)} of {len(self.left)} left are under way"
            still = f"no run has moved for {patience_s:g} s"
            self.call.listener.stalled(f"{self.progress.stage}: {still}; {under_way}")
        self.news |= bool(done)
        if self.news and time.monotonic() >= self.forecast_due:
            self._look_ahead()
        self.progress.left_s = self._left_s()
        if self.known is not None:
            self.progress.so_far = self.known.line(self.progress.running)
        self.call.listener.watch(self.progress)
        return [s.run_id for s in self.spare]

    def _look_ahead(self) -> None:
        """Renew the forecast and what is known of the answer, and write both for `status`. With thousands of
        runs this takes seconds, so it is not done every time a run ends."""
        began = time.monotonic()
        if self.forecast_due and self.left:
            self._speculate()
        shares = {r["run_id"]: r["step"] / r["steps"] for r in self.progress.running}
        call = self.call
        self.expected = dict(call.listener.expect(call.config, call.results_seen, shares) or {})
        self.expected_at = time.monotonic()
        self.progress.done = self.expected.get("done", self.asked - len(self.left))
        with suppress(UserError, Undecidable, *MISTAKEN):  # what is shown never stops a study
            stages = self.expected.get("stages")
            self.known = so_far(call.config, call.decisions, call.results_seen, stages)
            if self.known is not None:
                leave_outlook(call.study, self.known, self.expected.get("seconds"))
        if "left" in self.expected:
            self.progress.total = self.progress.done + self.expected["left"]
        self.news = False
        self.forecast_due = time.monotonic() + PAUSE * (time.monotonic() - began)

    def _speculate(self) -> None:
        """Offer idle workers the runs of this stage and later ones that are already certain to be needed."""
        if self.progress.measuring or self.call.limits.is_set:
            return
        call, stage = self.call, self.progress.stage
        later = call.stages[call.stages.index(stage) + 1 :]
        runs = speculative_runs(call.config, call.decisions, stage, self.wave, later, call.results_seen)
        spare = [s for s in runs if not call.study.has_result(s.run_id)]
        elsewhere = finished_elsewhere(call.study, spare)  # these are copied once a stage asks for them
        spare = [s for s in spare if s.run_id not in elsewhere]
        call.prepare(spare)
        self.spare = distinct([*spare, *self.spare])

    def _running(self, run_ids: Iterable[str]) -> list[dict[str, Any]]:
        """Return the progress of these runs, in the format of `Progress.running`."""
        running = []
        specs = {s.run_id: s for s in (*self.spare, *self.wave)}
        for run_id in run_ids:
            spec = specs.get(run_id)
            now = self.call.study.progress(run_id)
            if spec and now:
                shown = {"arm": spec.arm, "lr": spec.run.optimizer.lr, "seed": spec.run.seed}
                at_step, loss = self.call.study.last_evaluation(run_id) or (None, None)
                running.append({"run_id": run_id, **shown, **now, "at_step": at_step, "val_loss": loss})
        return running

    def _left_s(self) -> float | None:
        """Return the expected seconds until the study is done, or None if unknown. The latest forecast is
        counted down; without one, the estimate rests on the speeds of the runs in progress."""
        if (seconds := self.expected.get("seconds")) is not None:
            return max(float(seconds) - (time.monotonic() - self.expected_at), 1.0)
        rates = [r["steps_per_s"] for r in self.progress.running if r["steps_per_s"] > 0]
        if not rates or not self.expected.get("steps"):
            return None
        return float(self.expected["steps"]) / (statistics.fmean(rates) * self.progress.at_a_time)


def _refuse_undecided(stage: str, earlier: Sequence[str], known: Mapping[str, Decision]) -> None:
    """Raise UserError if one of the stages in `earlier`, on which `stage` depends, is not decided."""
    lacking = next((s for s in earlier if s not in known), None)
    if lacking:
        first = f"run `ebc-lab stage {lacking} …` with the same settings first"
        raise UserError(f"stage {stage} needs the decision of {lacking}: {first}.")


def _wave_in_words(wave: Sequence[RunSpec], timed: Sequence[RunSpec], there: int) -> str:
    """Return the work ahead as a phrase:
    `15 runs to train, then 2 measurements of time; 3 are already done`."""
    trained = len(wave) if wave[0].kind == "train" else 0
    ahead = ((trained, "run", "to train"), (len(timed), "measurement", "of time"))
    parts = [f"{count(n, what)} {rest}" for n, what, rest in ahead if n]
    done = f"; {there} {'is' if there == 1 else 'are'} already done" if there else ""
    return ", then ".join(parts) + done
