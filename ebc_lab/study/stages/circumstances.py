"""circumstances: one run under each mode of determinism, repeated in circumstances that should not matter."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ebc_lab.config.choices import under
from ebc_lab.config.dicts import run_part
from ebc_lab.config.errors import count
from ebc_lab.config.machine import capabilities
from ebc_lab.config.schema import CAPABILITIES, Config
from ebc_lab.records.decisions import Decision, ModeFound, ModesTrack
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec

from .rules import Decisions, Results, Specs, losses_of, make_decision
from .stage import Figure, Scenario, Stage

PLAIN = "none"  # the mode whose weights have to differ for the comparison to show anything
NOTHING_SHOWN = "the comparison shows nothing"


def _instructions(config: Config) -> Sequence[str]:
    """Return the vector instruction sets to compare: the configured ones, or this CPU's if there are none."""
    return config.circumstances.capabilities or capabilities()


def _mode(specs: Specs, results: Results) -> ModeFound:
    """Return how a mode's runs ended, with how many different weights, and the range of their losses."""
    outcomes = [results.get(s.run_id, RunResult()).get("outcome") for s in specs]
    done = [s for s, outcome in zip(specs, outcomes, strict=True) if outcome == "completed"]
    losses = losses_of(done, results)
    return {
        "runs": len(specs),
        "completed": len(done),
        "diverged": outcomes.count("diverged"),
        "checksums": len({results[s.run_id].get("weights_checksum") for s in done}),
        "loss_range": max(losses) - min(losses) if losses else None,
    }


def shows_nothing(modes: Mapping[str, ModeFound]) -> str:
    """Return why identical weights under other modes prove nothing; empty if they do prove something."""
    plain = modes.get(PLAIN)
    if plain is None:
        return f"determinism={PLAIN} is not among the modes"
    if plain["checksums"] > 1:
        return ""
    return f"determinism={PLAIN} has {_counted(plain)} as well"


def _counted(mode: ModeFound) -> str:
    return f"{count(mode['checksums'], 'checksum')} in {mode['completed']} runs"


class Circumstances(Stage):
    """The stage that repeats a run under each mode of determinism, varying what should change nothing."""

    name = "circumstances"
    title = "One run in many circumstances"
    about = (
        "The same run, again and again, in circumstances that should change nothing: are the weights the "
        "same, to the last bit?"
    )
    figures = tuple(
        Figure(f"modes.{mode}.{key}")
        for mode in ("none", "torch", "verity")
        for key in ("checksums", "loss_range")
    )
    concludes = True
    leads_with_optimizer = False
    shows = "modes"

    def runs(self, config: Config, decisions: Decisions, results: Results) -> list[RunSpec]:
        """Return a run for each combination of mode, number of threads, vector instruction set and number of
        parts of a batch. Each has the study's optimizer at its own learning rate, without EBC."""
        settings, base = config.circumstances, run_part(config)
        plain = replace(base, seed=settings.seed, steps=settings.steps, evaluate=["val"])
        plain = replace(plain, stabilizer=replace(base.stabilizer, name="none"))
        specs = []
        for mode, threads, capability, parts in itertools.product(
            settings.modes, settings.threads, _instructions(config), settings.parts
        ):
            run = under(replace(plain, threads_per_run=threads, capability=capability), mode, parts)
            specs.append(RunSpec(self.name, mode, f"{mode}_t{threads}_{capability}_b{parts}", 1.0, run))
        return specs

    def decide(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> Decision:
        """Return a decision that gives, for each mode, the number of different weights and the range of the
        losses. Raises Undecidable."""
        settings = config.circumstances
        instructions = _instructions(config)
        modes = {mode: _mode([s for s in specs if s.role == mode], results) for mode in settings.modes}
        tracks: dict[str, ModesTrack] = {}
        if any(mode["completed"] for mode in modes.values()):
            tracks[specs[0].track] = {"modes": modes, "capabilities": list(instructions)}
        threads, capabilities_tried, parts = (
            ", ".join(map(str, values)) for values in (settings.threads, instructions, settings.parts)
        )
        rule = (
            f"distinct sha256 of the weights after {settings.steps} steps, seed {settings.seed}, over "
            f"{threads} threads × {capabilities_tried} × a batch in {parts} parts"
        )
        left_out = [name for name in CAPABILITIES if name not in instructions]
        notes = [f"not tried: {', '.join(left_out)}"] if left_out else []
        for name, mode in modes.items():
            lost = mode["runs"] - mode["completed"] - mode["diverged"]
            incomplete = ((mode["diverged"], "diverged"), (lost, "have no result"))
            if text := ", ".join(f"{n} {what}" for n, what in incomplete if n):
                notes.append(f"{name}: of {mode['runs']} runs {text}")
        if empty := shows_nothing(modes):
            notes.append(f"{NOTHING_SHOWN}: {empty}")
        return make_decision(self.name, rule, config, specs, results, earlier, tracks=tracks, notes=notes)

    def so_far(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> list[str]:
        """Return, for each mode, how many different weights its runs have ended with so far."""
        modes = {
            mode: _mode([s for s in specs if s.role == mode], results) for mode in config.circumstances.modes
        }
        return [f"{name} {_counted(mode)}" for name, mode in modes.items() if mode["completed"]]

    def resolve(self, config: Config, say: Callable[[str], None]) -> Config:
        """Return the configuration, with this CPU's vector instruction sets filled in if none are given."""
        settings = config.circumstances
        if settings.capabilities:
            return config
        available = capabilities()
        if lacking := [name for name in CAPABILITIES if name not in available]:
            say(f"{self.name}: {', '.join(lacking)} left out, which this CPU lacks")
        return replace(config, circumstances=replace(settings, capabilities=list(available)))

    def invent(self, config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> RunResult:
        """Return a checksum of the weights that differs from run to run under the mode `none` alone."""
        return {"weights_checksum": "" if spec.role != PLAIN else str(nth)}

    def headline(self, track: ModesTrack) -> str:
        """Return how many different weights each mode ended with, and say so if that shows nothing."""
        counts = ", ".join(f"{name} {_counted(mode)}" for name, mode in track["modes"].items())
        return f"{counts}; {NOTHING_SHOWN}" if shows_nothing(track["modes"]) else counts

    def question(self, config: Config) -> str:
        return (
            "under which mode of determinism do threads, vector instructions and the split of a "
            "batch change no bit of the weights?"
        )


STAGE = Circumstances()
