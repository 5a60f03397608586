"""Paired measurements in one process: the sides take turns, so a drifting machine affects all alike."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from ebc_lab.workloads.corpus import locate

from .loops import WARM_STEPS, Loop, interval, opened, probes, warm_steps
from .plain_loop import PlainLoop

MIN_ROUNDS = 3  # however slow the machine is
GRAPHED_BLOCK = 50  # steps at least on a GPU, to hide what a block's launch and records cost the host
STEP_BLOCK = 4  # steps of `step_ratio` between turns: short, so that what else runs here meets both sides
STEP_ROUNDS = 40  # of them at most
STEP_LIMIT_S = 8.0
Side = Callable[[int], float]  # steps to take -> seconds that they took


def interleaved(
    sides: Sequence[Side],
    count: int,
    rounds: int,
    *,
    limit_s: float = math.inf,
) -> list[list[float]]:
    """Seconds of each side's blocks of `count` steps, a list per side, a block per round; the order rotates.

    After `limit_s` seconds no further round begins, except for the first MIN_ROUNDS.
    """
    took: list[list[float]] = [[] for _ in sides]
    begun = time.perf_counter()
    for i in range(rounds):
        if i >= MIN_ROUNDS and time.perf_counter() - begun > limit_s:
            break
        for k in range(len(sides)):
            side = (i + k) % len(sides)
            took[side].append(sides[side](count))
    return took


def reporting(sides: Sequence[Side], on_progress: Callable[[int], None]) -> list[Side]:
    """Return the sides. Each calls `on_progress` after its block, outside of what it times, with how many
    steps a side has taken on average: a worker that is silent for `launcher.heartbeat_s` is killed."""
    taken = 0

    def counted(side: Side) -> Side:
        def steps(count: int) -> float:
            nonlocal taken
            seconds = side(count)
            taken += count
            on_progress(taken // len(sides))
            return seconds

        return steps

    return [counted(side) for side in sides]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles; with fewer than two values these are the value itself."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "quartiles": [low, high]}


# -- what a stabilizer adds to a step ------------------------------------------------------------------------


def paired_overhead(
    run: RunConfig, on_progress: Callable[[int], None] = lambda step: None, *, limit_s: float = math.inf
) -> dict[str, Any]:
    """What the run's stabilizer adds to a step, in per cent of the bare step, checks and audits included.

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
    with opened(plain) as unwrapped, opened(run) as training:
        loops = [Loop(unwrapped, bare=True), Loop(training)]
        warm = warm_steps(run)
        sides = reporting(
            [loop.recorded_steps if graphed else loop.steps for loop in loops],
            lambda step: on_progress(max(0, step - warm)),
        )
        for begun in range(0, warm, block):
            for side in sides:
                side(min(block, warm - begun))
        bare, stabilized = interleaved(sides, block, rounds, limit_s=limit_s)
    overhead = spread([100 * (b / a - 1) for a, b in zip(bare, stabilized, strict=True)])
    return {
        "overhead_pct": overhead["median"],
        "overhead_iqr_pct": overhead["quartiles"],
        "pairs": len(bare),
        "plain_steps_per_s": block / statistics.median(bare),
    }


def overhead_run(
    run: RunConfig,
    directory: Path,
    run_id: str,
    on_progress: Callable[[int], None] = lambda step: None,
    **hooks: Any,
) -> dict[str, Any]:
    """The run kind `overhead`: see `_measured_run`."""
    return _measured_run("overhead", lambda: paired_overhead(run, on_progress), run, directory, run_id)


def step_run(
    run: RunConfig,
    directory: Path,
    run_id: str,
    on_progress: Callable[[int], None] = lambda step: None,
    **hooks: Any,
) -> dict[str, Any]:
    """The run kind `step`, the time of the run's step over that of torch's Adam: see `_measured_run`."""
    return _measured_run("step", lambda: step_ratio(run, on_progress), run, directory, run_id)


def _measured_run(
    kind: str, measure: Callable[[], dict[str, Any]], run: RunConfig, directory: Path, run_id: str
) -> dict[str, Any]:
    """Measure, write `result.json`, a failure too, and return it. Knows no checkpoint and no stop."""
    files = RunFiles(directory)
    started = time.perf_counter()
    try:
        result: dict[str, Any] = {"outcome": "completed", "cause": None, **measure()}
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
    """The time of a step of the run over that of the same run under torch's Adam alone, in turns, without
    audits where its own step needs none: median and quartiles."""
    run = with_derived_settings(run)
    block = interval(run)
    if not probes(run):
        run, block = dataclasses.replace(run, audit_every=0), STEP_BLOCK
    if run.device == "cuda":
        block *= math.ceil(GRAPHED_BLOCK / block)
    # at a rate of its own: at the run's it may blow up, and numbers near zero take longer on a CPU
    adam = {"name": "adam", "lr": optimizer_defaults("adam").lr}
    sides = {"adam": changed(run, {"optimizer": adam, "stabilizer": {"name": "none"}}), "run": run}
    [ratio] = steps_compared(sides, {"run": "adam"}, STEP_ROUNDS, STEP_LIMIT_S, block, on_progress)
    times = ratio["times"]
    return {"step_ratio": times["median"], "step_ratio_iqr": times["quartiles"]}


def variants(run: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Every stabilizer at its default strength, EBC once per budget: (name, the run with it). With updates
    inside backward that is none, and EBC with the one budget that goes with them."""
    if run.memory.hooks:
        yield "none", dataclasses.replace(run, stabilizer=StabilizerConfig())
        lagged = dataclasses.replace(run.budget, name=LAGGED)
        yield f"ebc {LAGGED}", dataclasses.replace(run, stabilizer=StabilizerConfig("ebc"), budget=lagged)
        return
    for name in STABILIZERS:
        if name != "ebc":
            yield name, dataclasses.replace(run, stabilizer=StabilizerConfig(name))
            continue
        for budget in BUDGETS:
            guard = run.budget.guard if budget in GUARDED else "none"  # the others have no bound
            changed = dataclasses.replace(run.budget, name=budget, guard=guard)
            yield f"ebc {budget}", dataclasses.replace(run, stabilizer=StabilizerConfig(name), budget=changed)


def measured_variants(
    asked: Iterable[tuple[str, RunConfig]], measure: Callable[[str, RunConfig], dict[str, Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What `measure` finds for each variant, by name; where the settings rule one out, `refused` says why."""
    for name, variant in asked:
        try:
            yield name, {"refused": None, **measure(name, with_derived_settings(variant))}
        except (UserError, ValueError) as error:
            yield name, {"refused": str(error)}


def overheads(
    run: RunConfig, rounds: int, limit_s: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """`paired_overhead` of every variant: `rounds` pairs each, or fewer after about `limit_s` seconds."""

    def measure(name: str, variant: RunConfig) -> dict[str, Any]:
        say(f"overhead of {name}")
        steps = WARM_STEPS + rounds * interval(variant)
        return paired_overhead(dataclasses.replace(variant, steps=steps), limit_s=limit_s)

    return [{"stabilizer": name, **found} for name, found in measured_variants(variants(run), measure)]


def steps_compared(
    runs: Mapping[str, RunConfig],
    against: Mapping[str, str],
    rounds: int,
    limit_s: float,
    block: int | None = None,
    on_progress: Callable[[int], None] = lambda step: None,
) -> list[dict[str, Any]]:
    """Seconds of a step of each run in `against` over those of the run that it names, all taking turns.

    Their steps are recorded, with audits. `rounds` turns each of `block` steps (two audit intervals), fewer
    where they would take longer than `limit_s` seconds.
    """
    first = next(iter(runs.values()))
    block = block or 2 * first.audit_every
    steps = max(first.steps, WARM_STEPS + (rounds + 1) * block)
    with contextlib.ExitStack() as stack:
        built = (opened(dataclasses.replace(run, steps=steps)) for run in runs.values())
        loops = [Loop(stack.enter_context(one)) for one in built]
        sides = reporting([loop.recorded_steps for loop in loops], on_progress)
        for side in sides:
            side(WARM_STEPS)
        seconds = interleaved(sides, block, rounds, limit_s=limit_s)
    took = dict(zip(runs, seconds, strict=True))
    comparisons = []
    for name, other in against.items():
        ratios = [b / a for a, b in zip(took[other], took[name], strict=True)]
        step_ms = spread([1e3 * s / block for s in took[name]])
        comparisons.append({"what": name, "against": other, "times": spread(ratios), "step_ms": step_ms})
    return comparisons


# -- the lab's step against a plain loop ---------------------------------------------------------------------


def plain_settings(run: RunConfig) -> dict[str, Any]:
    """The options of the plain loop at a run's shape."""
    shape = {k: getattr(run.model, k) for k in ("blocks", "width", "heads", "context")}
    return {**shape, "batch": run.batch_size, "lr": run.optimizer.lr, "seed": run.seed, "device": run.device}


class PlainProcess:
    """The plain loop at a run's shape in a process of its own, which takes steps on request.

    Raises UserError when the process ends. `threads`: torch's default there.
    """

    def __init__(self, run: RunConfig):
        self.folder = tempfile.TemporaryDirectory(prefix="ebc-lab-bench-")
        text = Path(self.folder.name) / "text.txt"
        text.write_bytes(locate(run.data, quiet=True).text.encode())
        options = {"text": text, **plain_settings(run)}
        command = [sys.executable, "-m", "ebc_lab.bench.plain_loop", "--on-request"]
        command += [f"--{name}={value}" for name, value in options.items()]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.threads = int(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return line
        _, errors = self.process.communicate()
        message = errors.strip().splitlines() or ["it left no message"]
        raise UserError(f"the plain loop's process ended: {message[-1]}")

    def steps(self, count: int) -> float:
        """Seconds for the next `count` steps, by that process's clock."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # there will be no answer either
            print(count, file=self.process.stdin, flush=True)
        return float(self._answer())

    def __enter__(self) -> PlainProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # the end of its input ends it
        self.folder.cleanup()


def throughput(run: RunConfig, rounds: int, limit_s: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Tokens/s of the lab's baseline and of a plain eager float32 loop of its model, and their paired ratios.

    The lab's side is the run without stabilizer as it would be trained: its precision and threads, with
    checks, audits and recording. `plain` takes turns with it in this process, with the same number of threads
    (and the lab's allocator settings, which help it); `plain_defaults` runs in a process of its own with
    torch's defaults. `rounds` turns each, fewer where they would take longer than `limit_s` seconds.
    """
    say("tokens/s against a plain loop")
    block = 2 * run.audit_every
    steps = max(run.steps, WARM_STEPS + rounds * block)
    baseline = dataclasses.replace(run, stabilizer=StabilizerConfig(), steps=steps)
    with opened(baseline) as training, PlainProcess(run) as elsewhere:
        workload = training.workload
        plain = PlainLoop(workload.tokens["train"], workload.vocabulary, **plain_settings(run))
        lab = Loop(training)
        sides = {"lab": lab.recorded_steps, "plain": plain.steps, "plain_defaults": elsewhere.steps}
        for side in sides.values():
            side(WARM_STEPS)
        took = dict(
            zip(sides, interleaved(list(sides.values()), block, rounds, limit_s=limit_s), strict=True)
        )
    figures: dict[str, Any] = {}
    for name, seconds in took.items():
        figures[name] = {
            "dtype": run.dtype if name == "lab" else "float32",
            "threads": elsewhere.threads if name == "plain_defaults" else run.threads_per_run,
            "tokens_per_s": spread([block * run.batch_size * run.model.context / s for s in seconds]),
            "step_ms": spread([1e3 * s / block for s in seconds]),
        }
    for name in ("plain", "plain_defaults"):
        figures[f"lab_over_{name}"] = spread([b / a for a, b in zip(took["lab"], took[name], strict=True)])
    return {**figures, "pairs": len(took["lab"]), "steps_per_block": block}
