"""Precision, threads and compiling: rules that choose what is fastest here, and what they are applied to.

The rules are pure functions of measured rates; `choose` applies them and measures what is not known yet.
Measurements run in processes of their own (`step_timer`), so that the driver needs no torch, and are kept in
the user's cache by machine, torch version and shape. `python -m ebc_lab.bench.speeds` chooses for the run on
its standard input: this is what runs on a Slurm node.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, NamedTuple, TypedDict, TypeVar

from ebc_lab.config import machine
from ebc_lab.config.dicts import from_dict, run_part, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.parts.quantizer import QuantizerConfig
from ebc_lab.config.schema import Config, LauncherConfig, RunConfig
from ebc_lab.records.cache import MeasurementCache

from .child import Child, ChildEnded

CHOSEN = ("dtype", "threads_per_run", "compile")  # by measurement, where they are left open
DTYPES = ("float32", "bfloat16")
THREADS = (1, 2, 4, 8)  # per run; those that the machine has are tried
TIE = 1.05  # a gain below 5% does not justify bfloat16 or more threads
MIN_COMPILED_S = 1200.0  # of eager training in all: below that measuring what compiling gains cannot pay
MIN_PAYOFF = 2.0  # times the seconds of compiling that compiling must save
COMPILE_TIMEOUT_S = 900.0
ROUNDS = 3  # measurements of each case
ENOUGH_S = 8.0  # after which no further round begins

Case = tuple[int, int, str]  # threads per process, processes in parallel, dtype
R = TypeVar("R", bound=RunConfig)


class CompileCost(TypedDict):
    """What compiling takes, at first and from inductor's cache on disk, and a step without and with it."""

    compile_s: float
    again_s: float
    eager_ms: float
    compiled_ms: float


class Work(NamedTuple):
    """What is to be trained in all: by one run, or by a study."""

    runs: int
    steps: int


class NotMeasured(UserError):
    """A choice needs a measurement that has not been made on this machine."""


@dataclass(frozen=True)
class Choice:
    """What a run takes for each of the three settings, and a short reason for each.

    `rate`: the chosen case, and its steps/s over all processes; None where that was not measured.
    """

    dtype: str
    threads_per_run: int
    compile: str
    why: Mapping[str, str]
    rate: tuple[int, int, str, float] | None = None

    def apply_to(self, run: R) -> R:
        """The run (or study) with the three settings."""
        return replace(run, **{k: getattr(self, k) for k in CHOSEN})

    def reasons(self, run: RunConfig) -> list[str]:
        """A line for each setting that `run` leaves open."""
        return [f"{k}={getattr(self, k)}: {self.why[k]}" for k in CHOSEN if is_open(run, k)]


def is_open(run: RunConfig, setting: str) -> bool:
    """Whether the setting is still to be chosen."""
    return getattr(run, setting) in ("auto", 0)


# -- the rules -----------------------------------------------------------------------------------------------


def chosen_by_rule(
    run: RunConfig, cores: int, job_cores: int | None = None
) -> tuple[RunConfig, dict[str, str]]:
    """The run with every setting that needs no measurement, and a reason for each setting that is now fixed.

    `job_cores`: what each Slurm job asks for; None where this machine trains.
    """
    on_gpu = run.device == "cuda"
    set_by_user = [k for k in CHOSEN if not is_open(run, k)]
    chosen: dict[str, tuple[Any, str]] = {k: (getattr(run, k), "already set") for k in set_by_user}
    if "threads_per_run" not in chosen:
        if on_gpu:
            chosen["threads_per_run"] = (1, "the GPU does the work")
        elif job_cores is not None:
            chosen["threads_per_run"] = (job_cores, "the cores that each job asks for")
        elif cores == 1:
            chosen["threads_per_run"] = (1, "there is one core for each process")
    if run.determinism.exact:
        rules = {"dtype": "float32", "compile": "off"}
        chosen |= {k: (v, "determinism=verity") for k, v in rules.items() if k not in chosen}
    if "compile" not in chosen and (on_gpu or job_cores is not None):
        reason = "steps on a GPU come from CUDA graphs" if on_gpu else "not measured for jobs on nodes"
        chosen["compile"] = ("off", f"{reason}; compile=on overrides this")
    if "compile" not in chosen and run.workload.name != "gpt":
        chosen["compile"] = ("off", f"workload={run.workload.name} is not compiled")
    if "compile" not in chosen and run.model.name == "gru":
        chosen["compile"] = ("off", "model=gru is not compiled")
    run = replace(run, **{k: value for k, (value, _) in chosen.items()})
    return run, {k: reason for k, (_, reason) in chosen.items()}


def cases_of(run: RunConfig, cores: int, limit: int) -> list[Case]:
    """What to measure. `limit`: runs in parallel at most on a CPU, 0 for as many as the cores hold."""
    threads = [run.threads_per_run] if run.threads_per_run else [t for t in THREADS if t <= cores]
    dtypes = DTYPES if is_open(run, "dtype") else (run.dtype,)
    limit = 1 if run.device == "cuda" else limit or cores
    return [(t, max(1, min(cores // t, limit)), d) for t in threads for d in dtypes]


def fastest(rates: Mapping[Case, float]) -> Case:
    """The case with the most steps/s; float32, then fewer threads, where nothing else is more than 5% faster.

    Expects one number of processes for each number of threads.
    """
    by_threads: dict[int, Case] = {}
    for case in sorted(rates, key=lambda c: (c[0], DTYPES.index(c[2]))):
        plainer = by_threads.get(case[0])
        if plainer is None or rates[case] > TIE * rates[plainer]:
            by_threads[case[0]] = case
    best = max(rates[case] for case in by_threads.values())
    return next(case for case in by_threads.values() if TIE * rates[case] >= best)


def why_dtype(rates: Mapping[Case, float], case: Case) -> str:
    threads, processes, _ = case
    both = " and ".join(f"{rates[threads, processes, d]:.1f} in {d}" for d in DTYPES)
    return f"steps/s {both}, {in_parallel(threads, processes)}"


def why_threads(rates: Mapping[Case, float]) -> str:
    best: dict[tuple[int, int], float] = {}
    for (threads, processes, _), rate in rates.items():
        best[threads, processes] = max(rate, best.get((threads, processes), 0.0))
    return "steps/s " + ", ".join(f"{rate:.1f} with {in_parallel(*key)}" for key, rate in best.items())


def in_parallel(threads: int, processes: int) -> str:
    """`2 runs of 1 thread in parallel`."""
    each = f"{threads} thread{'s' if threads > 1 else ''}"
    return f"one run of {each}" if processes == 1 else f"{processes} runs of {each} in parallel"


def compile_rule(
    work: Work, rate: float, at_a_time: int, cost: Callable[[], CompileCost | str]
) -> tuple[str, str]:
    """on or off, and why.

    Args:
        work: all that is trained, with one cache of compiled code.
        rate: eager steps/s, of `at_a_time` runs together.
        cost: what compiling costs, or why that is not known; called only where it matters.
    """
    planned_s = work.steps / rate
    what = "the run trains" if work.runs == 1 else f"all {work.runs} runs together train"
    if planned_s < MIN_COMPILED_S:
        return "off", f"{what} for {planned_s:.0f} s, and below {MIN_COMPILED_S:.0f} s compiling cannot pay"
    cost_of = cost()
    if isinstance(cost_of, str):
        return "off", cost_of
    step_s = (cost_of["eager_ms"] - cost_of["compiled_ms"]) / 1e3
    saved = (work.steps * step_s - work.runs * cost_of["again_s"]) / at_a_time
    why = (
        f"compiling takes {cost_of['compile_s']:.0f} s, {cost_of['again_s']:.1f} s again in each run, and "
        f"makes a step {cost_of['compiled_ms']:.1f} ms instead of {cost_of['eager_ms']:.1f}: "
        f"{saved:+.0f} s saved in the {planned_s:.0f} s of {work.steps} steps"
    )
    return ("on" if saved > MIN_PAYOFF * cost_of["compile_s"] else "off"), why


# -- from measurements to a choice ---------------------------------------------------------------------------


def choose(
    run: RunConfig,
    *,
    work: Callable[[RunConfig], Work],
    limit: int = 0,
    job_cores: int | None = None,
    together: int = 1,
    measure: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Choice:
    """Choose what `run`, whose device is known, leaves open.

    Args:
        work: all that is trained with the settings chosen; asked where that matters, with nothing left open.
        limit: how many such runs train in parallel at most, 0 for as many as the cores hold.
        job_cores: see `chosen_by_rule`.
        together: how many processes train a run, so that each has that share of the cores.
    Raises:
        NotMeasured: something is not known yet, and `measure` is false.
        UserError: a measurement failed.
    """
    cores = max(1, machine.cores() // together)
    run, why = chosen_by_rule(run, cores, job_cores)
    cases = cases_of(run, cores, limit)
    undecided = [k for k in CHOSEN if is_open(run, k)]
    rates = known_rates(run, cases)
    if not rates and not undecided:
        return Choice(run.dtype, run.threads_per_run, run.compile, why)
    if not rates and not measure:
        raise NotMeasured("no speed is known for this shape here: run `ebc-lab doctor`.")
    if not rates:
        say("measuring what is fastest here at this shape …")
        rates = measured_rates(run, cases)
    case = fastest(rates)
    threads, processes, dtype = case
    if "dtype" in undecided:
        why["dtype"] = why_dtype(rates, case)
    if "threads_per_run" in undecided:
        why["threads_per_run"] = why_threads(rates)
    run = replace(run, dtype=dtype, threads_per_run=threads)
    compiled = run.compile
    if "compile" in undecided:
        cost = functools.partial(compile_cost, run, measure=measure, say=say)
        planned = work(replace(run, compile="off"))
        compiled, why["compile"] = compile_rule(planned, rates[case], processes, cost)
    return Choice(dtype, threads, compiled, why, (*case, rates[case]))


def choose_for_study(
    config: Config,
    *,
    work: Callable[[Config], Work | None] = lambda config: None,
    measure: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Choice:
    """`choose` for all runs of a study, whose device is known, by its launcher.

    `work`: what the study will train in all; where that is not known, the longest run of each of its stages.
    """
    launcher = config.launcher
    stages = config.study.stages
    longest = Work(len(stages), sum(getattr(config, stage).steps for stage in stages))

    def in_all(run: RunConfig) -> Work:
        chosen = {k: getattr(run, k) for k in CHOSEN}
        return work(replace(config, **chosen)) or longest

    return choose(
        run_part(config),
        work=in_all,
        limit=parallel_limit(launcher),
        job_cores=job_cores(launcher),
        together=launcher.processes_per_run,
        measure=measure,
        say=say,
    )


def one_run(run: RunConfig) -> Work:
    """Return the work of a run by itself."""
    return Work(1, run.steps)


def parallel_limit(launcher: LauncherConfig) -> int:
    """How many runs train on this machine, or on a job's node, in parallel at most; 0 for as many as fit."""
    return launcher.slots if launcher.name == "local" else 1


def job_cores(launcher: LauncherConfig) -> int | None:
    """What each process of a run has in a Slurm job; None where this machine trains."""
    together = launcher.processes_per_run // launcher.nodes_per_run
    return (launcher.cpus_per_task or together) // together if launcher.name == "slurm" else None


# -- measuring -----------------------------------------------------------------------------------------------


def shape_here(run: RunConfig) -> dict[str, Any]:
    """What the speed of a step depends on, here: the run's shape, this machine, torch."""
    here = machine.hardware()
    shape = {
        "model": to_dict(run.model),
        "batch": run.batch_size,
        "device": run.device,
        "params": run.param_dtype,
        "optimizer": run.optimizer.name,
        "torch": metadata.version("torch"),
        "cpu": here["cpu"],
        "cores": here["cores"],
        "gpus": machine.gpu_names() if run.device == "cuda" else (),
    }
    own: list[str] = []
    if run.workload.name != "gpt":
        own += ["workload", "encoder", "decoder", "index", "ebm"]
    # how weights and activations are kept, where a step does that in a way of its own
    kept = (QuantizerConfig.from_run(run), run.memory)
    own += [part.group_name for part in kept if not part.changes_nothing()]
    shape |= {name: to_dict(getattr(run, name)) for name in own}
    return shape | ({"determinism": run.determinism.engine} if run.determinism.exact else {})


def rate_caches(run: RunConfig, cases: Sequence[Case]) -> dict[Case, MeasurementCache]:
    about = shape_here(run)
    return {case: MeasurementCache("speed", {**about, "case": case}, form=float) for case in cases}


def compile_cache(run: RunConfig) -> MeasurementCache:
    about = {**shape_here(run), "compile": (run.threads_per_run, run.dtype)}
    return MeasurementCache("speed", about, form=CompileCost)


def known_rates(run: RunConfig, cases: Sequence[Case]) -> dict[Case, float]:
    """Return the steps/s of these cases from the cache, or nothing unless all are known."""
    rates = {case: cache.read() for case, cache in rate_caches(run, cases).items()}
    return rates if all(rate is not None and rate > 0 for rate in rates.values()) else {}


def measured_rates(run: RunConfig, cases: Sequence[Case]) -> dict[Case, float]:
    """Measure and keep the steps/s of each case, all taking turns; medians of rounds. Raise UserError."""
    measured: dict[Case, list[float]] = {case: [] for case in cases}
    try:
        with ExitStack() as stack:
            most = max(processes for _, processes, _ in cases)
            children = [stack.enter_context(Child("step_timer")) for _ in range(most)]
            for child in children:
                child.answer()  # all have started
            begun = time.perf_counter()
            for nth in range(ROUNDS):
                if nth and time.perf_counter() - begun > ENOUGH_S:
                    break
                for threads, processes, dtype in cases:
                    asked = to_dict(replace(run, threads_per_run=threads, dtype=dtype))
                    used = children[:processes]
                    ask_all(used, {"what": "step", "run": asked})  # all are ready before any is timed
                    seconds = ask_all(used, {"what": "block", "run": asked})
                    measured[threads, processes, dtype].append(sum(1 / s for s in seconds))
    except ChildEnded as error:
        remedy = "give dtype=…, threads_per_run=… and compile=off"
        raise UserError(f"measuring the speed failed ({error}): {remedy}.") from None
    rates = {case: statistics.median(of_case) for case, of_case in measured.items()}
    for case, cache in rate_caches(run, cases).items():
        cache.write(rates[case])
    return rates


def ask_all(children: Sequence[Child], request: Any) -> list[Any]:
    """Return the answers of several processes that measure at the same time."""
    for child in children:
        child.ask(request)
    return [child.answer() for child in children]


def compile_cost(
    run: RunConfig, *, measure: bool = True, say: Callable[[str], None] = lambda text: None
) -> CompileCost | str:
    """Return what `torch.compile` costs and gains from a cold start at this shape, or why it is not known."""
    cache = compile_cache(run)
    known: CompileCost | None = cache.read()
    if known or not measure:
        return known or "what compiling costs is not known yet"
    say("measuring what torch.compile costs and gains at this shape: a minute or so …")
    try:
        with Child("step_timer") as child:
            child.answer()
            child.ask({"what": "compiling", "run": to_dict(run)})
            measured: CompileCost = child.answer(COMPILE_TIMEOUT_S)
    except TimeoutError:
        return f"compiling takes more than {COMPILE_TIMEOUT_S:.0f} s here"
    except ChildEnded as error:
        return f"torch.compile fails here ({error!s:.200})"
    cache.write(measured)
    return measured


if __name__ == "__main__":
    asked: RunConfig = from_dict(RunConfig, json.load(sys.stdin))
    print(json.dumps(dataclasses.asdict(choose(asked, work=one_run, limit=1))))
