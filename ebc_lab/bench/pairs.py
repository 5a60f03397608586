"""Paired measurements in one process: the sides take turns, so a drifting machine affects all alike."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebc_lab.components.stabilizers import STABILIZERS
from ebc_lab.config.choices import changed, optimizer_defaults
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest, identity_of, with_derived_settings
from ebc_lab.config.parts.stabilizer import StabilizerConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc.options import BUDGETS, GUARDED, LAGGED
from ebc_lab.records.json_files import write_checksummed
from ebc_lab.records.paths import RunFiles

from .child import Child
from .loops import WARM_STEPS, interval, opened, probes, warm_steps
from .plain_loop import PlainLoop

MIN_ROUNDS = 3  # however slow the machine is
GRAPHED_BLOCK = 50  # steps at least on a GPU, to hide what a block's launch and records cost the host
STEP_BLOCK = 4  # steps of `step_ratio` between turns: short, so that what else runs here meets both sides
STEP_ROUNDS = 40  # of them at most
STEP_LIMIT_S = 8.0
Side = Callable[[int], float]  # steps to take -> seconds that they took


@dataclass(frozen=True)
class Effort:
    """How much a section measures, and `say`, which it calls with what it begins to measure."""

    rounds: int  # of blocks, passes or repeats
    limit_s: float = math.inf  # after which no further round begins
    quick_rounds: int = 1
    quick: bool = False  # whether only to show that it works: smaller problems, too
    say: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Turns:
    """Seconds of the blocks of each side, by its name. The nth blocks of all sides are of one round."""

    block: int  # steps
    seconds: Mapping[str, Sequence[float]]

    def ratios(self, side: str, other: str) -> list[float]:
        """Return the seconds of a side over those of another, round by round."""
        return [a / b for a, b in zip(self.seconds[side], self.seconds[other], strict=True)]

    def step_ms(self, side: str) -> dict[str, Any]:
        """Return the `spread` of the milliseconds of a step."""
        return spread([1e3 * s / self.block for s in self.seconds[side]])


def take_turns(
    sides: Mapping[str, Side],
    block: int,
    rounds: int,
    *,
    warm: int = WARM_STEPS,
    limit_s: float = math.inf,
    on_progress: Callable[[int], None] = lambda step: None,
) -> Turns:
    """Return the seconds of blocks of `block` steps: one block of each side per round, in a rotating order.

    Each side takes `warm` steps before. After `limit_s` seconds no further round begins, except for the first
    MIN_ROUNDS. `on_progress` is called after every block, outside of what is timed, with the number of steps
    timed on each side so far: a worker that is silent for `launcher.heartbeat_s` is killed.
    """
    taken = 0

    def steps(name: str, count: int) -> float:
        nonlocal taken
        seconds = sides[name](count)
        taken += count
        on_progress(max(0, taken // len(sides) - warm))
        return seconds

    for begun in range(0, warm, WARM_STEPS):
        for name in sides:
            steps(name, min(WARM_STEPS, warm - begun))
    names = list(sides)
    took: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for i in range(rounds):
        if i >= MIN_ROUNDS and time.perf_counter() - started > limit_s:
            break
        first = i % len(names)
        for name in names[first:] + names[:first]:
            took[name].append(steps(name, block))
    return Turns(block, took)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return median and quartiles; with fewer than two values these are the value itself."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "quartiles": [low, high]}


# -- what a stabilizer adds to a step ------------------------------------------------------------------------


def paired_overhead(
    run: RunConfig, on_progress: Callable[[int], None] = lambda step: None, *, limit_s: float = math.inf
) -> dict[str, Any]:
    """Return what the run's stabilizer, its checks and audits add to a step, per cent of the bare step.

    The bare step is the same model, data and precision under the base optimizer with no wrapper at all; on a
    GPU, where steps come from CUDA graphs, it is that of the lab's plain arm without audits, recorded like
    the other. Blocks hold whole audit and probe intervals; `run.steps` steps per side, without those of the
    warm-up, which measure more often. Median over block pairs and quartiles. Raises UserError, ValueError or
    KeyError for a run that cannot be built.
    """
    run = with_derived_settings(run)
    block = interval(run)
    rounds = max(2, (run.steps - WARM_STEPS) // block)
    graphed = run.device == "cuda"
    if graphed:
        block *= max(1, GRAPHED_BLOCK // block)
        run = dataclasses.replace(run, steps=warm_steps(run) + (rounds + 1) * block)
    audit_every = 0 if graphed else run.audit_every
    plain = dataclasses.replace(run, stabilizer=StabilizerConfig(), audit_every=audit_every)
    with opened(plain, bare=True) as bare_loop, opened(run) as loop:
        loops = {"bare": bare_loop, "stabilized": loop}
        turns = take_turns(
            {name: side.recorded_steps if graphed else side.steps for name, side in loops.items()},
            block,
            rounds,
            warm=warm_steps(run),
            limit_s=limit_s,
            on_progress=on_progress,
        )
    overhead = spread([100 * (ratio - 1) for ratio in turns.ratios("stabilized", "bare")])
    bare = turns.seconds["bare"]
    return {
        "overhead_pct": overhead["median"],
        "overhead_iqr_pct": overhead["quartiles"],
        "pairs": len(bare),
        "plain_steps_per_s": block / statistics.median(bare),
    }


def _measured_run(
    kind: str,
    measure: Callable[..., dict[str, Any]],
    run: RunConfig,
    directory: Path,
    run_id: str,
    on_progress: Callable[[int], None] = lambda step: None,
    **hooks: Any,
) -> dict[str, Any]:
    """Measure, write `result.json`, a failure too, and return it. The hooks for checkpoints and stops are
    ignored: a measurement is short and begins again."""
    files = RunFiles(directory)
    started = time.perf_counter()
    try:
        result: dict[str, Any] = {"outcome": "completed", "cause": None, **measure(run, on_progress)}
    except Exception as error:
        with open(files.log, "a", encoding="utf-8") as f:
            f.write(traceback.format_exc())
        result = {"outcome": "failed", "cause": f"{type(error).__name__}: {error}"}
    about = {"run_id": run_id, "identity": digest(identity_of(kind, run)), "steps": run.steps}
    about["wall_s"] = time.perf_counter() - started
    result = {**about, **result}
    write_checksummed(files.result, result)
    return result


def step_ratio(run: RunConfig, on_progress: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
    """Return the time of a step of the run over that of the same run under torch's Adam alone, in turns and
    without audits where its own step needs none: median and quartiles."""
    run = with_derived_settings(run)
    block = interval(run)
    if not probes(run):
        run, block = dataclasses.replace(run, audit_every=0), STEP_BLOCK
    if run.device == "cuda":
        block *= math.ceil(GRAPHED_BLOCK / block)
    # at a rate of its own: at the run's it may blow up, and numbers near zero take longer on a CPU
    adam = {"name": "adam", "lr": optimizer_defaults("adam").lr}
    runs = {"adam": changed(run, {"optimizer": adam, "stabilizer": {"name": "none"}}), "run": run}
    turns = recorded_turns(runs, block, STEP_ROUNDS, limit_s=STEP_LIMIT_S, on_progress=on_progress)
    times = spread(turns.ratios("run", "adam"))
    return {"step_ratio": times["median"], "step_ratio_iqr": times["quartiles"]}


# what trains a run of the kind `overhead`, and one of the kind `step`
overhead_run = functools.partial(_measured_run, "overhead", paired_overhead)
step_run = functools.partial(_measured_run, "step", step_ratio)


def recorded_turns(runs: Mapping[str, RunConfig], block: int, rounds: int, **how: Any) -> Turns:
    """Return the `take_turns` of runs whose steps are taken as in training: audited and recorded."""
    most = WARM_STEPS + (rounds + 1) * block
    with contextlib.ExitStack() as stack:
        sides = {}
        for name, run in runs.items():
            loop = stack.enter_context(opened(dataclasses.replace(run, steps=max(run.steps, most))))
            sides[name] = loop.recorded_steps
        return take_turns(sides, block, rounds, **how)


# -- a run with every stabilizer -----------------------------------------------------------------------------


def variants(run: RunConfig) -> dict[str, RunConfig]:
    """Return the run with every stabilizer at its default strength, by name, with EBC once per budget.

    With updates inside backward no other stabilizer can be combined than EBC with the one budget for them.
    """
    found = {}
    for name in ("none", "ebc") if run.memory.hooks else STABILIZERS:
        variant = dataclasses.replace(run, stabilizer=StabilizerConfig(name))
        if name != "ebc":
            found[name] = variant
            continue
        for budget in (LAGGED,) if run.memory.hooks else BUDGETS:
            guard = run.budget.guard if budget in GUARDED else "none"  # the others have no bound
            settings = dataclasses.replace(run.budget, name=budget, guard=guard)
            found[f"ebc {budget}"] = dataclasses.replace(variant, budget=settings)
    return found


def measure_each(
    variants: Mapping[str, RunConfig],
    what: str,
    measure: Callable[[RunConfig, Effort], dict[str, Any]],
    effort: Effort,
) -> dict[str, dict[str, Any]]:
    """Return what `measure` finds for each variant, by its name; where the settings rule one out, `refused`
    says why. `what` is measured, for the effort's `say`."""
    found = {}
    for name, variant in variants.items():
        effort.say(f"{what} of {name}")
        try:
            found[name] = {"refused": None, **measure(with_derived_settings(variant), effort)}
        except (UserError, ValueError) as error:
            found[name] = {"refused": str(error)}
    return found


def overheads(run: RunConfig, effort: Effort) -> list[dict[str, Any]]:
    """Return the `paired_overhead` of every variant, of `effort.rounds` pairs each."""

    def overhead(variant: RunConfig, effort: Effort) -> dict[str, Any]:
        steps = WARM_STEPS + effort.rounds * interval(variant)
        return paired_overhead(dataclasses.replace(variant, steps=steps), limit_s=effort.limit_s)

    found = measure_each(variants(run), "overhead", overhead, effort)
    return [{"stabilizer": name, **row} for name, row in found.items()]


# -- the lab's step against a plain loop ---------------------------------------------------------------------


def throughput(run: RunConfig, effort: Effort) -> dict[str, Any]:
    """Return tokens/s of the lab's baseline and of a plain eager float32 loop of its model, and the ratios.

    The lab's side is the run without stabilizer as it would be trained: its precision and threads, with
    checks, audits and recording. `plain` takes turns with it in this process, with the same number of threads
    (and the lab's allocator settings, which help it); `plain_defaults` runs in a process of its own with
    torch's defaults.
    """
    block = 2 * run.audit_every
    steps = max(run.steps, WARM_STEPS + effort.rounds * block)
    baseline = dataclasses.replace(run, stabilizer=StabilizerConfig(), steps=steps)
    settings: dict[str, Any] = {k: getattr(run.model, k) for k in ("blocks", "width", "heads", "context")}
    settings |= {"batch": run.batch_size, "lr": run.optimizer.lr, "seed": run.seed, "device": run.device}
    with opened(baseline) as lab, Child("plain_loop") as child:

        def steps_elsewhere(count: int) -> float:
            child.ask(count)
            return float(child.answer())

        workload = lab.training.workload
        settings |= {"data": workload.tokens["train"].tolist(), "vocabulary": workload.vocabulary}
        child.ask(settings)
        default_threads = child.answer()
        plain = PlainLoop(**settings)
        sides = {"lab": lab.recorded_steps, "plain": plain.steps, "plain_defaults": steps_elsewhere}
        turns = take_turns(sides, block, effort.rounds, limit_s=effort.limit_s)
    figures: dict[str, Any] = {}
    for name, seconds in turns.seconds.items():
        figures[name] = {
            "dtype": run.dtype if name == "lab" else "float32",
            "threads": default_threads if name == "plain_defaults" else run.threads_per_run,
            "tokens_per_s": spread([block * run.batch_size * run.model.context / s for s in seconds]),
            "step_ms": turns.step_ms(name),
        }
    for name in ("plain", "plain_defaults"):
        figures[f"lab_over_{name}"] = spread(turns.ratios(name, "lab"))
    return {**figures, "pairs": len(turns.seconds["lab"]), "steps_per_block": block}
