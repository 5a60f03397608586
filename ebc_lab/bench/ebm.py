"""What the parts of an energy-based model's step take: paired ratios of steps as a run takes them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from ebc_lab.config.choices import changed
from ebc_lab.config.parts.stabilizer import StabilizerConfig
from ebc_lab.config.schema import RunConfig

from .loops import WARM_STEPS, Loop, opened, synchronise
from .pairs import spread, steps_compared

WHOLE = "ebm"
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {  # name -> settings, and what its time is compared with
    "without denoising score matching": ({"ebm": {"score": 0.0}}, WHOLE),
    "without revival and toppling": ({"ebm": {"revive": False, "soc": False}}, WHOLE),
    "without splats": ({"ebm": {"splats": 0}}, WHOLE),
}


def energy_steps(run: RunConfig, rounds: int, limit_s: float, say: Callable[[str], None]) -> dict[str, Any]:
    """`compared`: seconds of a step over those of the GPT of this scale, and of a step without a part over
    those of the whole, `rounds` turns each, fewer where they would take longer than `limit_s` seconds;
    `after_step_pct`: the share of statistics, revival and toppling in a step."""
    say("the energy-based model's step against a GPT's, and without its parts")
    whole = dataclasses.replace(run, stabilizer=StabilizerConfig())
    runs = {"gpt": changed(whole, {"workload": {"name": "gpt"}}), WHOLE: whole}
    runs |= {name: changed(whole, settings) for name, (settings, _) in VARIANTS.items()}
    against = {WHOLE: "gpt", **{name: other for name, (_, other) in VARIANTS.items()}}
    compared = steps_compared(runs, against, rounds, limit_s)
    return {"compared": compared, "after_step_pct": _after_step(whole)}


def _after_step(run: RunConfig) -> dict[str, Any]:
    """The share of `after_step` in steps without audits, in per cent, over three parts of a short run, each
    with a revival and a look at the pile, without the step that adds splats."""
    block = max(run.ebm.revive_every, run.ebm.soc_every)
    third = WARM_STEPS + block + 1
    run = dataclasses.replace(run, audit_every=30 * third, steps=3 * third)
    spent = 0.0
    with opened(run) as training:
        inner = training.workload.after_step

        def timed(*args: Any) -> Any:
            nonlocal spent
            synchronise(run)
            start = time.perf_counter()
            further = inner(*args)
            synchronise(run)
            spent += time.perf_counter() - start
            return further

        training.workload.after_step = timed  # type: ignore[method-assign, assignment]
        loop = Loop(training)
        shares = []
        for _ in range(3):
            loop.recorded_steps(WARM_STEPS)
            spent = 0.0
            seconds = loop.recorded_steps(block)
            shares.append(100 * spent / seconds)
            loop.recorded_steps(1)
    return spread(shares)
