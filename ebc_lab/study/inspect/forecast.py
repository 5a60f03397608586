"""A forecast of the runs of a study and their duration: its stages plan and decide on invented results.

If the study has begun, its stages get the results that it has and those that it would copy from other studies
in the same folder. Only the missing results are invented.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ebc_lab.bench import speeds
from ebc_lab.bench.flops import GPU, PEAK, UTILISATION, gpu_hours, run_flops
from ebc_lab.config.choices import groups, read_choice
from ebc_lab.config.dicts import run_part, to_dict
from ebc_lab.config.errors import UserError, naming
from ebc_lab.config.machine import chosen_device, cores
from ebc_lab.config.parts.init import InitConfig
from ebc_lab.config.schema import Config
from ebc_lab.config.study_checks import beyond_sensible
from ebc_lab.records.decisions import Decision
from ebc_lab.records.figures import RunResult
from ebc_lab.records.paths import WEIGHTS
from ebc_lab.records.spec import RunSpec
from ebc_lab.workloads.named import refuse_missing

from ..launch.pool import slots
from ..stages.rules import Undecidable, val_loss
from ..stages.runs import check_lengths, distinct, own_runs
from ..stages.stage import ResultsOf, Scenario, Stage, stage_of
from ..store.changes import Change, describe, requested
from ..store.neighbours import finished_elsewhere, neighbours_of
from ..store.own import edited
from ..store.reuse import reusable_results
from ..store.snapshot import Snapshot, read
from ..store.study import Study, studies_in, study_of
from .pace import Pace, learned, learned_from_siblings, observed

ASSUMED = f"6·N·tokens and attention at {UTILISATION:.0%} of the {PEAK / 1e12:.0f} TFLOP/s of an {GPU}"
OPEN = "0" * 64  # stands in for a checksum that is not known yet
USUAL = 2.0  # nats per token; the best invented loss if no real one is known
EXPECTED = Scenario("expected", edge=True, extra=1, merged=True)
SCENARIOS = (
    Scenario("min", edge=False, extra=0, merged=True),
    EXPECTED,
    Scenario("max", edge=True, extra=99, merged=False),
)


class WithNeighbours:
    """A function from specs to results (run id -> result): those that a study has, and those that it would
    copy from other studies in its folder."""

    def __init__(self, study: Study, own: ResultsOf):
        self.study, self.own = study, own
        self.neighbours = neighbours_of(study)
        self.copied: dict[str, RunResult] = {}  # by run id
        self.looked_for: set[str] = set()  # ids of runs already searched for in other studies

    def __call__(self, specs: list[RunSpec]) -> dict[str, RunResult]:
        there = self.own(specs)
        new = {s.run_id: s for s in specs if s.run_id not in there and s.run_id not in self.looked_for}
        self.looked_for |= new.keys()
        found = finished_elsewhere(self.study, [*new.values()], self.neighbours) if new else {}
        for run_id, neighbour in found.items():
            self.copied |= neighbour.results([new[run_id]])
        return {s.run_id: self.copied[s.run_id] for s in specs if s.run_id in self.copied} | there


def forecast(
    config: Config, known: ResultsOf = lambda specs: {}, scenario: Scenario = EXPECTED
) -> dict[str, list[RunSpec]]:
    """Return stage -> the distinct training runs of the stage, without those of earlier stages. `known`: a
    function that returns the existing results of specs. Missing results are invented according to
    `scenario`."""
    decisions: dict[str, Decision] = {}
    results: dict[str, RunResult] = {}
    runs: dict[str, list[RunSpec]] = {}
    for name in config.study.stages:
        before = set(results)
        stage = stage_of(name)
        specs = _asked(config, scenario, stage, decisions, results, known)
        runs[name] = [s for s in distinct(specs) if s.run_id not in before]
        if not scenario.merged:  # decisions settle which runs two arms or stages share; at worst, none
            there = known(specs)
            runs[name] = [s for s in runs[name] if s.run_id in there]
            runs[name] += [s for s in specs if s.run_id not in there]
        if stage.concludes:
            continue
        try:
            decisions[name] = stage.decide(config, specs, results, decisions)
        except Undecidable:  # the known results would stop the study here: forecast without them
            return forecast(config, scenario=scenario)
    return {name: [s for s in specs if s.kind == "train"] for name, specs in runs.items()}


def _asked(
    config: Config,
    scenario: Scenario,
    stage: Stage,
    decisions: Mapping[str, Decision],
    results: dict[str, RunResult],
    known: ResultsOf,
) -> list[RunSpec]:
    """Return all runs that a stage needs, and add their results, known or invented, to `results`."""
    first = len(results)
    lowest: dict[str, float] = {}  # role -> the lowest known loss; "" stands for all roles
    while True:
        specs = stage.runs(config, decisions, results)
        new = [s for s in specs if s.run_id not in results]
        there = known(new)
        results |= there
        if len(results) == first:  # the first look and the last suffice: nothing is decided in between
            more = max(1, config.finals.max_seeds - len(config.seeds))
            config = replace(config, finals=replace(config.finals, seeds_per_look=more))
        for spec in (s for s in new if s.run_id in there):
            for role in ("", spec.role):
                lowest[role] = min(lowest.get(role, math.inf), val_loss(there[spec.run_id]))
        for spec in new:
            if spec.run_id not in results:
                known_best = lowest.get(spec.role, lowest.get("", math.inf))
                best = 0.99 * known_best if math.isfinite(known_best) else USUAL
                results[spec.run_id] = _invent(config, scenario, spec, len(results) - first, best)
        if not new:
            return specs


def _invent(config: Config, scenario: Scenario, spec: RunSpec, nth: int, best: float) -> RunResult:
    """Return an invented result that fits the scenario. Its losses are relative to `best`, so that they can
    be compared with known losses. `nth`: how many results the stage had before this one."""
    lr = spec.run.optimizer.lr
    grid = config.lr_sweep.grids.get(spec.run.optimizer.name, [])  # empty for an optimizer only in arms
    behind = 1 / (1 + 1e4 * lr)  # the highest learning rate wins
    if not scenario.edge and len(grid) > 2:
        behind = abs(math.log(lr / grid[len(grid) // 2]))  # the middle of the grid wins
    # EBC arms whose seeds contradict each other leave the verdict undecided
    luck = 1.0 - 2.0 * (spec.run.seed % 2) if scenario.edge and spec.run.stabilizer.name == "ebc" else 0.0
    result: RunResult = {
        "outcome": "completed",
        # the sweep's replicates are alike: a noise of 0 is known without scipy, which takes long to import
        "val_loss": best + behind + 1e-6 * spec.run.seed * (spec.role != "replicate"),
        "test_loss": 2.0 + luck,
        "kl_median": 0.01,
        "kl_ratio_median": 1.0,
        "clip_rate": 0.5,
        "surrogate_median": 1.0,
        "descent_median": 0.1,
        "grad_norm_quantiles": [1.0] * 41,
        "streams": {WEIGHTS: OPEN},
    }
    figures = stage_of(spec.stage).invent(config, scenario, spec, nth)
    result.update(figures)
    if (loss := figures.get("val_loss")) is not None:
        result["val_loss"] = best + loss - USUAL
    return result


def expected_left(config: Config, known: ResultsOf, under_way: Mapping[str, float]) -> dict[str, Any]:
    """Return the remaining work of a running study: how many training runs are `done` and how many are
    expected to be `left`, the remaining `steps` and `seconds` (None before a run has finished), and `stages`
    (stage -> number of its runs).

    `config` is resolved. `known`: a function that returns the existing results of specs. `under_way`: run id
    -> the share of the run that is already trained, 0 to 1.
    """
    stages = forecast(config, known)
    specs = [s for planned in stages.values() for s in planned]
    results = known(specs)
    left = [(s, 1 - under_way.get(s.run_id, 0.0)) for s in specs if s.run_id not in results]
    pace = observed(specs, results)
    work = [pace.seconds(s) * share for s, share in left] if pace else []
    longest = max(work, default=0.0)  # a lower bound, since one run cannot use several slots
    return {
        "done": len(specs) - len(left),
        "left": len(left),
        "steps": sum(s.run.steps * share for s, share in left),
        "seconds": max(longest, sum(work) / slots(config)) if pace else None,
        "stages": {stage: len(planned) for stage, planned in stages.items()},
    }


def expected_work(config: Config) -> speeds.Work:
    """Return the total numbers of training runs and of steps that a study is expected to need."""
    steps = [s.run.steps for planned in forecast(config).values() for s in planned]
    return speeds.Work(len(steps), sum(steps))


def planned(config: Config) -> dict[str, Any]:
    """Return the least, expected and largest number of runs, steps, tokens and seconds of each stage. The
    numbers are not fixed, because grids may grow.

    Runs that are `done`, or will be `copied` from other studies in the folder, count as runs but take no
    time. Raises UserError if a result was edited, or a file that a setting names is not there.
    """
    study = study_of(config)
    snapshot = read(study) if study.exists() else None
    with study.blame_files() if snapshot else nullcontext():
        return _planned(config, study, snapshot)


def _planned(config: Config, study: Study, snapshot: Snapshot | None) -> dict[str, Any]:
    header = snapshot.header if snapshot else None
    records = snapshot.sound_records() if snapshot else []
    changed: list[Change] = []
    if header and snapshot:
        from ..resolve import adopt, all_changes  # imported late: loads numpy, which a new study's plan lacks

        changed = all_changes(config, header, snapshot.index)
        config = adopt(config, header)
    not_fetched = _not_fetched(config)
    text = None
    if config.data.name == "path":
        from ebc_lab.workloads.corpus import locate  # likewise

        text = locate(config.data)
    check_lengths(config, text, own=("path",))
    placed = _placed(config, study)
    speed: speeds.Choice | None = None
    with suppress(speeds.NotMeasured):
        speed = speeds.choose_for_study(placed, work=expected_work, measure=False)
    named = (speed or _plainest(placed)).apply_to(placed)
    finished = snapshot is not None and snapshot.finished and not changed
    known = WithNeighbours(study, reusable_results(records, finished=finished))
    rate = learned(records) or learned_from_siblings(named, study)
    eta_from = rate.source if rate else None
    if speed and speed.rate and not rate:
        eta_from = (
            f"steps/s of optimizer={named.optimizer.name} alone, measured on this machine; what other "
            "optimizers, EBC, evaluations and start-up add is not counted"
        )
    return {
        "study": config.study.name,
        "scale": config.scale,
        "text": text and text.title,
        "not_fetched": not_fetched,
        "device": placed.device,
        "launcher": config.launcher.name,
        "dtype": named.dtype if speed else config.dtype,
        "threads_per_run": named.threads_per_run if speed else config.threads_per_run,
        "slots": slots(named),
        "begun": header is not None,
        "changed": describe(changed, requested(config), edited(config, header or {})),
        "beyond_sensible": beyond_sensible(config),
        "stages": _by_scenario(named, known, rate, speed),
        "eta_from": eta_from,
        "gpu_hours_from": ASSUMED,
    }


def _not_fetched(config: Config) -> list[str]:
    """Return a sentence for each built-in suite's own place of shards that is still empty: one asks what they
    would cost before one fetches them. Raises UserError for any other file or folder that is not there."""
    sentences = []
    for where, run in [("", run_part(config)), *own_runs(config)]:
        try:
            refuse_missing(run, [Path(config.output_dir).expanduser()])
        except UserError as error:
            suites = [read_choice("study", name).get("data", {}) for name in groups()["study"]]
            with naming(where):
                if not run.data.files or run.data.files not in [data.get("files") for data in suites]:
                    raise
            sentences.append(str(error))
    return list(dict.fromkeys(sentences))


def _placed(config: Config, study: Study) -> Config:
    """Return the configuration with a device and with the checksums that go into a run's name. A missing
    checksum of the text or tokenizer is taken from another study in the folder that made the same request. A
    checksum that is still missing is set to `OPEN`."""
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
    start = InitConfig.from_run(config)
    if start.name == "run":
        start = replace(start, sha256=start.sha256 or OPEN, text_sha256=start.text_sha256 or OPEN)
    return replace(
        start.put_into(config),
        device=chosen_device(config.device),
        data=replace(config.data, sha256=config.data.sha256 or OPEN),
        tokens=replace(config.tokens, sha256=config.tokens.sha256 or OPEN),
    )


def _by_scenario(
    config: Config, known: WithNeighbours, rate: Pace | None, speed: speeds.Choice | None
) -> dict[str, dict[str, Any]]:
    """Return stage, or `total` -> scenario -> `_figures` of its runs. `min` and `max` bound all scenarios."""
    stages: dict[str, dict[str, Any]] = {stage: {} for stage in (*config.study.stages, "total")}
    for scenario in SCENARIOS:
        runs = forecast(config, known, scenario)
        runs["total"] = [s for specs in runs.values() for s in specs]
        for stage, figures in stages.items():
            figures[scenario.name] = _figures(runs[stage], config, known, rate, speed)
    for figures in stages.values():  # known results may put the scenarios in another order
        for key in ("runs", "steps", "tokens", "eta_s", "gpu_hours", "flop_hours"):
            known_figures = [f[key] for f in figures.values() if f[key] is not None]
            figures["min"][key] = min(known_figures, default=None)
            figures["max"][key] = max(known_figures, default=None)
    for key in ("runs", "steps", "tokens"):  # each stage's least may come from a different scenario
        least = sum(stages[stage]["min"][key] for stage in config.study.stages)
        stages["total"]["min"][key] = min(least, stages["total"]["min"][key])
    return stages


def _figures(
    specs: list[RunSpec],
    config: Config,
    known: WithNeighbours,
    rate: Pace | None,
    speed: speeds.Choice | None,
) -> dict[str, Any]:
    """Return the number, length and expected duration of `specs`. Copied and finished runs take no time.

    `eta_s` (seconds) comes from the pace of finished runs or else a measured speed; None if neither is known.
    `gpu_hours` is the same time summed over all GPUs; None without a GPU. `flop_hours`: the GPU hours of the
    remaining operations at the assumed utilisation (`bench.flops`); None if any run's operations are unknown.
    """
    there = known(specs)
    copied = sum(s.run_id in known.copied for s in specs)
    left = [s for s in specs if s.run_id not in there]
    seconds: float | None = None
    if rate is not None:
        seconds = sum(map(rate.seconds, left)) / slots(config)
    elif speed is not None and speed.rate is not None:
        # a speed measured on this machine's CPU is that of all slots together
        alone = config.device == "cuda" or config.launcher.name == "slurm"
        steps_per_s = speed.rate[-1] * (slots(config) if alone else 1)
        seconds = sum(s.run.steps for s in left) / steps_per_s
    hours = None
    if seconds is not None and config.device == "cuda":
        hours = seconds * slots(config) * config.launcher.processes_per_run / 3600
    flops = [run_flops(spec.run) for spec in left]
    return {
        "runs": len(specs),
        "done": len(there) - copied,
        "copied": copied,
        "steps": sum(s.run.steps for s in specs),
        "tokens": sum(s.run.steps * s.run.tokens_per_step for s in specs),
        "eta_s": seconds,
        "gpu_hours": hours,
        "flop_hours": None if None in flops else gpu_hours(sum(filter(None, flops))),
    }


def _plainest(config: Config) -> speeds.Choice:
    """Return the assumptions of an estimate for settings that will be chosen by a measurement: float32, one
    thread, not compiled."""
    run, why = speeds.chosen_by_rule(run_part(config), cores(), speeds.job_cores(config.launcher))
    dtype = "float32" if speeds.is_open(run, "dtype") else run.dtype
    compiled = "off" if speeds.is_open(run, "compile") else run.compile
    return speeds.Choice(dtype, run.threads_per_run or 1, compiled, why)
