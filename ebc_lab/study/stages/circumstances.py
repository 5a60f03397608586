"""circumstances: one run under each mode of determinism, in circumstances that should change nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ebc_lab.config.choices import under
from ebc_lab.config.dicts import run_part
from ebc_lab.config.machine import capabilities
from ebc_lab.config.schema import CAPABILITIES, Config, RunConfig
from ebc_lab.records.figures import RunResult

from .rules import Decision, Results, losses_of, make_decision, refuse_without_tracks
from .spec import RunSpec
from .stage import Figure, Stage, Track

NAME = "circumstances"
PLAIN = "none"  # the mode that has to differ, for the comparison to show anything
NOTHING_SHOWN = "the comparison shows nothing"


def runs(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
    """Every mode in every combination of threads, vector instructions and parts of a batch."""
    own = config.circumstances
    specs = []
    for mode, threads, capability, parts in itertools.product(
        own.modes, own.threads, _instructions(config), own.parts
    ):
        run = _run(config, mode, threads, capability, parts)
        specs.append(RunSpec(NAME, mode, f"{mode}_t{threads}_{capability}_b{parts}", 1.0, run))
    return specs


def _instructions(config: Config) -> Sequence[str]:
    """Those asked for; before the study is resolved, or in a plan of it, those of this CPU."""
    return config.circumstances.capabilities or capabilities()


def _run(config: Config, mode: str, threads: int, capability: str, parts: int) -> RunConfig:
    """The study's own optimizer at its own rate, plain, in these circumstances."""
    base = run_part(config)
    plain = replace(
        base,
        seed=config.circumstances.seed,
        steps=config.circumstances.steps,
        evaluate=["val"],
        stabilizer=replace(base.stabilizer, name="none"),
        threads_per_run=threads,
        capability=capability,
    )
    return under(plain, mode, parts)


def decide(
    config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> Decision:
    """How many different weights each mode ended with, and how far apart their losses are."""
    own = config.circumstances
    instructions = _instructions(config)
    modes = {mode: _mode([s for s in specs if s.role == mode], results) for mode in own.modes}
    told = {specs[0].track: {"modes": modes, "capabilities": list(instructions)}}
    completed = any(found["completed"] for found in modes.values())
    refuse_without_tracks(told if completed else {}, NAME, specs, results)
    rule = (
        f"distinct sha256 of the weights after {own.steps} steps, seed {own.seed}, over "
        f"{_listed(own.threads)} threads × {_listed(instructions)} × a batch in {_listed(own.parts)} parts"
    )
    left_out = [name for name in CAPABILITIES if name not in instructions]
    notes = [f"not tried: {', '.join(left_out)}"] if left_out else []
    notes += [f"{mode}: {text}" for mode, found in modes.items() if (text := _incomplete(found))]
    if empty := shows_nothing(modes):
        notes.append(f"{NOTHING_SHOWN}: {empty}")
    return make_decision(NAME, rule, config, specs, results, earlier, tracks=told, notes=notes)


def resolved(config: Config, say: Callable[[str], None]) -> Config:
    """With the vector instructions of this CPU, where none are given."""
    own = config.circumstances
    if own.capabilities:
        return config
    there = capabilities()
    if lacking := [name for name in CAPABILITIES if name not in there]:
        say(f"{NAME}: {', '.join(lacking)} left out, which this CPU lacks")
    return replace(config, circumstances=replace(own, capabilities=list(there)))


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def _mode(own: Sequence[RunSpec], results: Results) -> dict[str, Any]:
    """What the runs of one mode have in common."""
    found = [results.get(s.run_id, RunResult()) for s in own]
    done = [s for s in own if results.get(s.run_id, RunResult()).get("outcome") == "completed"]
    losses = losses_of(done, results)
    return {
        "runs": len(own),
        "completed": len(done),
        "diverged": sum(r.get("outcome") == "diverged" for r in found),
        "checksums": len({results[s.run_id].get("weights_checksum") for s in done}),
        "loss_range": max(losses) - min(losses) if losses else None,
    }


def _incomplete(found: Mapping[str, Any]) -> str:
    lost = found["runs"] - found["completed"] - found["diverged"]
    parts = ((found["diverged"], "diverged"), (lost, "have no result"))
    told = ", ".join(f"{n} {what}" for n, what in parts if n)
    return f"of {found['runs']} runs {told}" if told else ""


def shows_nothing(modes: Mapping[str, Mapping[str, Any]]) -> str:
    """Why equal weights under another mode would be no sign of it; empty where they are one."""
    plain = modes.get(PLAIN)
    if plain is None:
        return f"determinism={PLAIN} is not among the modes"
    if plain["checksums"] > 1:
        return ""
    return f"determinism={PLAIN} has {_counted(plain)} as well"


def _counted(found: Mapping[str, Any]) -> str:
    n = found["checksums"]
    return f"{n} checksum{'' if n == 1 else 's'} in {found['completed']} runs"


def headline(track: Track) -> str:
    told = ", ".join(f"{mode} {_counted(found)}" for mode, found in track["modes"].items())
    return f"{told}; {NOTHING_SHOWN}" if shows_nothing(track["modes"]) else told


def invented(config: Config, scenario: Any, spec: RunSpec, nth: int) -> RunResult:
    """What the forecast assumes."""
    return {"weights_checksum": "" if spec.role != PLAIN else str(nth)}


STAGE = Stage(
    name=NAME,
    runs=runs,
    decide=decide,
    headline=headline,
    figures=tuple(
        Figure(f"modes.{mode}.{key}")
        for mode in ("none", "torch", "verity")
        for key in ("checksums", "loss_range")
    ),
    grows=False,
    concludes=True,
    title="One run in many circumstances",
    about="The same run, again and again, in circumstances that should change nothing: are the weights the "
    "same, to the last bit?",
    resolved=resolved,
    question=lambda config: (
        "under which mode of determinism do threads, vector instructions and the split of a "
        "batch change no bit of the weights?"
    ),
    shows="modes",
)
