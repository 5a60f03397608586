"""Precision, threads and compiling: what is fastest here, measured, and the rules that choose from it (DESIGN: speed).

The rules are pure functions of measured rates; `settle` applies them, measuring what is not known yet. Measurements are made
in processes of their own (`timing.py`), so that the driver stays without torch, and are kept in the user's cache by machine,
torch version and shape. `python -m ebc_lab.bench.speeds` settles the run on its standard input: what a Slurm node is asked.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ebc_lab.config import machine
from ebc_lab.config.dicts import from_dict, run_part, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest
from ebc_lab.config.schema import Config, LauncherConfig, RunConfig
from ebc_lab.records.json_files import read_json, write_json

DTYPES = ("float32", "bfloat16")
CANDIDATES = 4  # thread counts tried at most: 1, 2, 4, 8
TIE = 1.05  # what is not faster by more than this is not chosen over the plainer: float32, fewer threads
LEAST_COMPILED_S = 120.0  # of training, eagerly, below which a run cannot pay for compiling
PAYS = 2.0  # times the seconds of compiling that compiling must save
COMPILER_S = 900.0  # after which a measurement of compiling is given up
GIVE = "give dtype=…, threads_per_run=… and compile=off"
RULES = {  # as `ebc-lab doctor` prints them
    "dtype": "bfloat16 autocast where it is more than 5% faster than float32",
    "threads_per_run": "study: what makes the most steps/s on the whole machine, one run per threads_per_run cores at once; "
    "single run: what makes one process fastest; fewer threads where the gain is below 5%; 1 on a GPU; launcher=slurm: "
    "launcher.cpus_per_task, or 1",
    "compile": "off where the longest run trains for less than 2 minutes; else on where it saves twice the seconds that "
    "compiling takes; off on a GPU, whose step is captured as a whole, and on Slurm nodes: compile=on asks for it",
    "optimizers": "adam, adamw and sgd are torch's fused kernels (fused=True); Muon's and EBC's own arithmetic goes over all "
    "tensors at once (foreach)",
}

Case = tuple[int, int, str]  # threads of each process, processes at once, dtype
Say = Callable[[str], None]
Compiling = Mapping[str, float]  # compile_s; eager_ms and compiled_ms of a step


@dataclass(frozen=True)
class Choice:
    """What a run takes for each of the three settings, and why, in a few words each. `rate`: the case that it is, and its
    steps/s, all processes together; None where that was not measured."""

    dtype: str
    threads_per_run: int
    compile: str
    why: Mapping[str, str]
    rate: tuple[int, int, str, float] | None = None

    def said(self, run: RunConfig) -> list[str]:
        """A line for each setting that `run` leaves open."""
        return [
            f"{k}={getattr(self, k)}: {self.why[k]}"
            for k in ("dtype", "threads_per_run", "compile")
            if is_open(run, k)
        ]


def is_open(run: RunConfig, setting: str) -> bool:
    """Whether one of the three settings is still to be chosen."""
    return getattr(run, setting) in ("auto", 0)


def take(run: Any, choice: Choice) -> Any:
    """The run (or study) with what was chosen for it."""
    return replace(run, dtype=choice.dtype, threads_per_run=choice.threads_per_run, compile=choice.compile)


# -- the rules ------------------------------------------------------------------------------------------------------------


def thread_candidates(cores: int) -> list[int]:
    return [t for t in (2**i for i in range(CANDIDATES)) if t <= max(1, cores)]


def processes_at_once(threads: int, cores: int, at_once: int) -> int:
    """How many runs of so many threads go together: one per core group, or as many as `at_once` says if that is not 0."""
    groups = max(1, cores // threads)
    return min(groups, at_once) if at_once else groups


def unmeasured(run: RunConfig, cores: int, job_cores: int | None = None) -> tuple[RunConfig, dict[str, str]]:
    """What needs no measuring, and why. `job_cores`: what each Slurm job asks for; None where this machine trains."""
    settings = ("dtype", "threads_per_run", "compile")
    why = {k: "as given" for k in settings if not is_open(run, k)}
    if is_open(run, "threads_per_run"):
        chosen, reason = 0, ""
        if run.device == "cuda":
            chosen, reason = 1, "the GPU does the work"
        elif job_cores is not None:
            chosen, reason = job_cores, "the cores that each job asks for"
        elif cores == 1:
            chosen, reason = 1, "there is one core"
        if chosen:
            run, why["threads_per_run"] = replace(run, threads_per_run=chosen), reason
    if is_open(run, "compile") and (run.device == "cuda" or job_cores is not None):
        where = (
            "on a GPU the whole step is captured instead"
            if run.device == "cuda"
            else "not measured for jobs on nodes"
        )
        run, why["compile"] = replace(run, compile="off"), f"{where}; compile=on asks for it all the same"
    return run, why


def cases_of(run: RunConfig, cores: int, at_once: int) -> list[Case]:
    """What is to be measured for the settings that are open; the given ones are kept to."""
    threads = [run.threads_per_run] if run.threads_per_run else thread_candidates(cores)
    together = {t: 1 if run.device == "cuda" else processes_at_once(t, cores, at_once) for t in threads}
    return [(t, together[t], d) for t in threads for d in (DTYPES if is_open(run, "dtype") else (run.dtype,))]


def fastest(rates: Mapping[Case, float]) -> Case:
    """The case with the most steps/s; float32, then fewer threads, where nothing else is more than 5% faster.

    One count of processes a thread count.
    """
    chosen: dict[int, Case] = {}
    for case in sorted(rates, key=lambda c: (c[0], DTYPES.index(c[2]))):
        known = chosen.get(case[0])
        if known is None or rates[case] > TIE * rates[known]:
            chosen[case[0]] = case
    best = max(rates[c] for c in chosen.values())
    return next(c for c in chosen.values() if TIE * rates[c] >= best)


def why_dtype(rates: Mapping[Case, float], case: Case) -> str:
    threads, processes, _ = case
    both = " and ".join(f"{rates[threads, processes, d]:.1f} in {d}" for d in DTYPES)
    return f"steps/s {both}, {together(threads, processes)}"


def why_threads(rates: Mapping[Case, float], case: Case) -> str:
    best = {(t, n): max(r for c, r in rates.items() if c[:2] == (t, n)) for t, n, _ in rates}
    return "steps/s " + ", ".join(f"{rate:.1f} by {together(t, n)}" for (t, n), rate in best.items())


def together(threads: int, processes: int) -> str:
    """`2 runs of 1 thread at once`."""
    each = f"{threads} thread{'s' if threads > 1 else ''}"
    return f"one run of {each}" if processes == 1 else f"{processes} runs of {each} at once"


def compile_rule(planned_s: float, steps: int, figures: Callable[[], Compiling | str]) -> tuple[str, str]:
    """on or off, and why. `planned_s`: of the longest run's training, eagerly; its steps; what compiling costs, or why that
    is not known, asked for only where it matters."""
    if planned_s < LEAST_COMPILED_S:
        return (
            "off",
            f"the longest run trains for {planned_s:.0f} s, and below {LEAST_COMPILED_S:.0f} s compiling cannot pay",
        )
    found = figures()
    if isinstance(found, str):
        return "off", found
    saved = steps * (found["eager_ms"] - found["compiled_ms"]) / 1e3
    told = (
        f"compiling takes {found['compile_s']:.0f} s and makes a step {found['compiled_ms']:.1f} ms instead of "
        f"{found['eager_ms']:.1f}: {saved:+.0f} s saved in the longest run's {steps} steps"
    )
    return ("on" if saved > PAYS * found["compile_s"] else "off"), told


# -- from measurements to a choice ----------------------------------------------------------------------------------------


def settle(
    run: RunConfig,
    *,
    steps: int,
    at_once: int = 0,
    job_cores: int | None = None,
    measure: bool = True,
    say: Say = lambda text: None,
) -> Choice | None:
    """Choose what `run` leaves open, its device known; None without `measure` where something is not known from before.

    `steps`: of the longest run that it stands for. `at_once`: how many such runs go together at most, 0 for one per core
    group. `job_cores`: see `unmeasured`. Raises UserError when a measurement fails.
    """
    cores = machine.cores()
    run, why = unmeasured(run, cores, job_cores)
    cases = cases_of(run, cores, at_once if job_cores is None else 1)
    undecided = [k for k in ("dtype", "threads_per_run", "compile") if is_open(run, k)]
    rates = Known(run).rates(cases)
    if not rates and not undecided:
        return Choice(run.dtype, run.threads_per_run, run.compile, why)
    if not rates and not measure:
        return None
    if not rates:
        say("measuring what is fastest here at this shape …")
        rates = measured_rates(run, cases)
    threads, processes, dtype = case = fastest(rates)
    if "dtype" in undecided:
        why["dtype"] = why_dtype(rates, case)
    if "threads_per_run" in undecided:
        why["threads_per_run"] = why_threads(rates, case)
    compiled = run.compile
    if "compile" in undecided:
        shape = replace(run, dtype=dtype, threads_per_run=threads)
        planned_s = steps * processes / rates[case]
        compiled, why["compile"] = compile_rule(
            planned_s, steps, lambda: compiling(shape, measure=measure, say=say)
        )
    return Choice(dtype, threads, compiled, why, (*case, rates[case]))


def settle_study(config: Config, *, measure: bool = True, say: Say = lambda text: None) -> Choice | None:
    """`settle` for all runs of a study, whose device is known: by its longest run and its launcher."""
    launcher = config.launcher
    steps = max(getattr(config, stage).steps for stage in config.study.stages)
    together, cores = at_once(launcher), job_cores(launcher)
    return settle(run_part(config), steps=steps, at_once=together, job_cores=cores, measure=measure, say=say)


def at_once(launcher: LauncherConfig) -> int:
    return 1 if launcher.name == "inline" else launcher.slots


def job_cores(launcher: LauncherConfig) -> int | None:
    return launcher.cpus_per_task or 1 if launcher.name == "slurm" else None


# -- what is known from before --------------------------------------------------------------------------------------------


class Known:
    """The measurements of a shape on this machine, in the user's cache; one that cannot be written costs seconds only."""

    def __init__(self, run: RunConfig):
        from ebc_lab.records.cache import cache_dir

        here = machine.hardware()
        about = {
            "model": to_dict(run.model),
            "batch": run.batch_size,
            "device": run.device,
            "params": run.param_dtype,
        }
        about |= {"torch": metadata.version("torch"), "optimizer": run.optimizer.name}
        about |= {k: here[k] for k in ("cpu", "cores")}
        about["gpus"] = machine.gpu_names() if run.device == "cuda" else ()
        self.path: Path = cache_dir() / f"speed-{digest(about)[:16]}.json"

    def read(self) -> dict[str, Any]:
        try:
            return {"rates": [], "compile": {}, **read_json(self.path)}
        except (OSError, UserError):
            return {"rates": [], "compile": {}}

    def rates(self, cases: Sequence[Case]) -> dict[Case, float]:
        """Steps/s of these cases, or nothing unless all are known: those measured together compare."""
        known = {(t, n, d): rate for t, n, d, rate in self.read()["rates"]}
        return {c: known[c] for c in cases} if all(c in known for c in cases) else {}

    def keep_rates(self, rates: Mapping[Case, float]) -> None:
        others = [row for row in self.read()["rates"] if tuple(row[:3]) not in rates]
        self._write({"rates": [*others, *([*case, rate] for case, rate in rates.items())]})

    def compiling(self, run: RunConfig) -> Compiling | None:
        found: Compiling | None = self.read()["compile"].get(f"{run.threads_per_run} {run.dtype}")
        return found

    def keep_compiling(self, run: RunConfig, found: Compiling) -> None:
        self._write(
            {"compile": {**self.read()["compile"], f"{run.threads_per_run} {run.dtype}": dict(found)}}
        )

    def _write(self, new: Mapping[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {**self.read(), **new})
        except OSError:
            pass


# -- measuring ------------------------------------------------------------------------------------------------------------


def measured_rates(run: RunConfig, cases: Sequence[Case]) -> dict[Case, float]:
    """Steps/s of each case, all its processes together; kept in the cache. Raises UserError when that fails."""
    done = _timed({"run": to_dict(run), "cases": cases})
    if done.returncode != 0:
        raise UserError(f"measuring the speed failed ({_last_line(done.stderr)}): {GIVE}.")
    rates = dict(zip(cases, json.loads(done.stdout), strict=True))
    Known(run).keep_rates(rates)
    return rates


def _timed(asked: Mapping[str, Any], **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ebc_lab.bench.step_timer"]
    return subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, **options)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def compiling(run: RunConfig, *, measure: bool = True, say: Say = lambda text: None) -> Compiling | str:
    """What `torch.compile` costs and gains at the run's shape, threads and dtype, nothing compiled before; or why not known."""
    known = Known(run)
    found = known.compiling(run)
    if found or not measure:
        return found or "what compiling costs is not known yet"
    say("measuring what torch.compile costs and gains at this shape: a minute or so …")
    with tempfile.TemporaryDirectory() as cold:
        try:
            done = _timed(
                {"run": to_dict(run)}, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cold}, timeout=COMPILER_S
            )
        except subprocess.TimeoutExpired:
            return f"compiling takes more than {COMPILER_S:.0f} s here"
    if done.returncode != 0:
        return f"torch.compile fails here ({_last_line(done.stderr)[:200]})"
    found = json.loads(done.stdout.splitlines()[-1])
    known.keep_compiling(run, found)
    return found


# -- for doctor -----------------------------------------------------------------------------------------------------------


def report(config: Config, run: RunConfig) -> dict[str, Any]:
    """All rates at this shape, and what a study and a single run would take and why. Measures what is not known.

    Both dtypes are measured even where one is given. Raises UserError when a measurement fails.
    """
    cores = machine.cores()
    shape = replace(unmeasured(run, cores, job_cores(config.launcher))[0], dtype="auto")
    limits = (1, at_once(config.launcher) if job_cores(config.launcher) is None else 1)
    cases = list(dict.fromkeys(case for limit in limits for case in cases_of(shape, cores, limit)))
    rates = Known(shape).rates(cases) or measured_rates(shape, cases)
    study = settle_study(replace(config, device=run.device))
    single = settle(run, steps=run.steps, at_once=1)
    assert study is not None
    assert single is not None
    alone = {d: rate for (t, n, d), rate in rates.items() if (t, n) == (study.threads_per_run, 1)}
    figures = Known(run).read()["compile"]
    return {
        "scale": config.scale,
        "device": run.device,
        "rates": [
            {"threads": t, "processes": n, "dtype": d, "steps_per_s": rate}
            for (t, n, d), rate in sorted(rates.items())
        ],
        "steps_per_s": alone,  # of one process with a study's threads
        "study": _as_json(study),
        "single_run": _as_json(single),
        "compile": [{"threads": int(k.split()[0]), "dtype": k.split()[1], **v} for k, v in figures.items()],
        "rules": RULES,
    }


def _as_json(choice: Choice) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(choice).items() if k != "rate"}


if __name__ == "__main__":
    asked: RunConfig = from_dict(RunConfig, json.load(sys.stdin))
    settled = settle(asked, steps=asked.steps, at_once=1)
    assert settled is not None
    print(json.dumps(dataclasses.asdict(settled)))
