"""Paired measurements in one process: the sides take turns, so a drifting machine hurts all of them alike."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ebc_lab.components.stabilizers import STABILIZERS
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import resolve_controller
from ebc_lab.config.schema import RunConfig, StabilizerConfig
from ebc_lab.ebc.options import BUDGETS
from ebc_lab.records.json_files import write_checksummed
from ebc_lab.records.paths import RunFiles

from .loops import WARM_STEPS, Loop, interval, opened, warm_steps
from .plain_loop import PlainLoop, PlainProcess

LEAST_ROUNDS = 3  # however slow the machine is
Side = Callable[[int], float]  # steps to take -> seconds that they took


def in_turns(
    sides: Sequence[Side],
    count: int,
    rounds: int,
    *,
    limit_s: float = math.inf,
    on_round: Callable[[int], None] = lambda i: None,
) -> list[list[float]]:
    """Seconds of each side's blocks of `count` steps, one list a side, one block a round; the order rotates.

    Once `limit_s` seconds are over no further round is begun, but for the first LEAST_ROUNDS.
    """
    took: list[list[float]] = [[] for _ in sides]
    begun = time.perf_counter()
    for i in range(rounds):
        if i >= LEAST_ROUNDS and time.perf_counter() - begun > limit_s:
            break
        on_round(i)
        for k in range(len(sides)):
            side = (i + k) % len(sides)
            took[side].append(sides[side](count))
    return took


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles; with fewer than two values these are the value itself."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "quartiles": [low, high]}


# -- what a stabilizer adds to a step --------------------------------------------------------------------------------------


def paired_overhead(
    run: RunConfig, on_progress: Callable[[int], None] = lambda step: None, *, limit_s: float = math.inf
) -> dict[str, Any]:
    """What the run's stabilizer adds to a step, in per cent of the bare step, checks and audits included.

    The bare step is the same model, data and precision under the base optimizer with no wrapper at all; on a GPU, where steps
    come from CUDA graphs, it is that of the lab's plain arm without audits, recorded like the other. Blocks of whole audit and
    probe intervals; `run.steps` steps a side, the warm-up's many measurements left out. Median over block pairs and quartiles.
    Raises UserError, ValueError or KeyError for a run that cannot be built.
    """
    run = resolve_controller(run)
    block, rounds = interval(run), max(2, (run.steps - WARM_STEPS) // interval(run))
    graphed = run.device == "cuda"
    if graphed:  # blocks that hide what a step's launch and a block's reading cost the host
        block *= max(1, 50 // block)
        run = dataclasses.replace(run, steps=warm_steps(run) + (rounds + 1) * block)
    plain = dataclasses.replace(
        run, stabilizer=StabilizerConfig(), audit_every=0 if graphed else run.audit_every
    )
    with opened(plain) as unwrapped, opened(run) as training:
        bare, stabilized = Loop(unwrapped, bare=True), Loop(training)
        sides = [loop.recorded_steps if graphed else loop.steps for loop in (bare, stabilized)]
        for side in sides:
            side(warm_steps(run))
        took = in_turns(sides, block, rounds, limit_s=limit_s, on_round=lambda i: on_progress(i * block))
    found = spread([100 * (b / a - 1) for a, b in zip(*took, strict=True)])
    return {
        "overhead_pct": found["median"],
        "overhead_iqr_pct": found["quartiles"],
        "pairs": len(took[0]),
        "plain_steps_per_s": block / statistics.median(took[0]),
    }


def overhead_and_record(
    run: RunConfig,
    directory: Path,
    run_id: str,
    identity: str,
    on_progress: Callable[[int], None] = lambda step: None,
) -> None:
    """Measure and write `result.json` under the measurement's identity; a failure is recorded as one."""
    started = time.perf_counter()
    try:
        result: dict[str, Any] = {"outcome": "completed", "cause": None, **paired_overhead(run, on_progress)}
    except Exception as error:
        with open(RunFiles(directory).log, "a") as f:
            f.write(traceback.format_exc())
        result = {"outcome": "failed", "cause": f"{type(error).__name__}: {error}"}
    about = {
        "run_id": run_id,
        "identity": identity,
        "steps": run.steps,
        "wall_s": time.perf_counter() - started,
    }
    write_checksummed(RunFiles(directory).result, {**about, **result})


def variants(run: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Every stabilizer at its default strength, EBC once a budget: (name, the run with it)."""
    for name in STABILIZERS:
        if name != "ebc":
            yield name, dataclasses.replace(run, stabilizer=StabilizerConfig(name))
            continue
        for budget in BUDGETS:
            guard = (
                run.budget.guard if budget == "surrogate" else "none"
            )  # it corrects a bound: the others refuse it
            changed = dataclasses.replace(run.budget, name=budget, guard=guard)
            yield (
                f"ebc {budget}",
                dataclasses.replace(run, stabilizer=StabilizerConfig("ebc"), budget=changed),
            )


def overheads(
    run: RunConfig, rounds: int, limit_s: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """`paired_overhead` of every variant, `rounds` pairs each or, where these take longer, about `limit_s` seconds.

    One that the run's other settings rule out says why in `refused`.
    """
    rows: list[dict[str, Any]] = []
    for name, variant in variants(run):
        say(f"overhead of {name}")
        enough = dataclasses.replace(
            variant, steps=WARM_STEPS + rounds * interval(resolve_controller(variant))
        )
        try:
            rows.append({"stabilizer": name, "refused": None, **paired_overhead(enough, limit_s=limit_s)})
        except (UserError, ValueError) as error:
            rows.append({"stabilizer": name, "refused": str(error)})
    return rows


# -- the lab's step against a plain loop -----------------------------------------------------------------------------------


def throughput(run: RunConfig, rounds: int, limit_s: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Tokens/s of the lab's baseline and of a plain eager float32 loop of the same model, and their paired ratios.

    The lab's side is the run without stabilizer as it would be trained: its precision, its threads, checks, audits, recording.
    `plain` takes turns with it in this process, with the same number of threads (and the lab's settings of the allocator,
    which help it); `plain_defaults` in a process of its own with whatever torch sets up there. `rounds` turns each, fewer
    where they would take longer than `limit_s` seconds.
    """
    say("tokens/s against a plain loop")
    block = 2 * run.audit_every
    most = WARM_STEPS + rounds * block
    baseline = dataclasses.replace(run, stabilizer=StabilizerConfig(), steps=max(run.steps, most))
    tokens = run.batch_size * run.model.context
    with opened(baseline) as training, PlainProcess(run) as elsewhere:
        lab = Loop(training)
        plain = PlainLoop.of_run(run, training.tokens["train"], training.workload.vocabulary)
        sides = {"lab": lab.recorded_steps, "plain": plain.steps, "plain_defaults": elsewhere.steps}
        for side in sides.values():
            side(WARM_STEPS)
        took = dict(zip(sides, in_turns(list(sides.values()), block, rounds, limit_s=limit_s), strict=True))
    threads = {"lab": run.threads_per_run, "plain": run.threads_per_run, "plain_defaults": elsewhere.threads}
    dtypes = {"lab": run.dtype, "plain": "float32", "plain_defaults": "float32"}
    found: dict[str, Any] = {
        name: {
            "dtype": dtypes[name],
            "threads": threads[name],
            "tokens_per_s": spread([block * tokens / s for s in seconds]),
            "step_ms": spread([1e3 * s / block for s in seconds]),
        }
        for name, seconds in took.items()
    }
    for name in ("plain", "plain_defaults"):
        found[f"lab_over_{name}"] = spread([b / a for a, b in zip(took["lab"], took[name], strict=True)])
    return {**found, "pairs": len(took["lab"]), "steps_per_block": block}
