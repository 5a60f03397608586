"""Where a step's time goes: a loop written out, with a clock around each part."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc import StabilizedOptimizer

from .loops import Loop, interval, opened, record_step, synchronise, warm_steps
from .pairs import Effort, measure_each, variants

PARTS = (  # of a step
    "data",
    "forward_backward",  # and zeroing the gradients
    "base",  # optimizer
    "probe",  # the model on the tokens that choose c
    "audit",  # the model on the tokens that judge
    "other",  # arithmetic of the stabilizer: checks, copies, norms, the search for c
    "recording",
)


class Clock:
    """Seconds by part, without parts nested inside it; each change of part waits for the GPU."""

    def __init__(self, run: RunConfig):
        self.run = run
        self.seconds: dict[str, float] = defaultdict(float)
        self.entered: dict[str, int] = defaultdict(int)
        self._open: list[str] = []
        self._since = 0.0

    def _turn(self) -> None:
        synchronise(self.run)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def on(self, part: str) -> Iterator[None]:
        self._turn()
        self._open.append(part)
        self.entered[part] += 1
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with the clock on this part while it runs."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.on(part):
                return function(*args, **kwargs)

        return timed


def clocked(optimizer: StabilizedOptimizer, clock: Clock) -> None:
    """Put the clock inside one stabilizer: on its base optimizers, its audits and its measurements."""

    original = optimizer.prober.measuring

    @contextlib.contextmanager
    def measuring() -> Iterator[None]:
        with clock.on("audit" if "audit" in clock._open else "probe"), original():  # an audit stays one
            yield

    for base in optimizer.bases:
        base.step = clock.around("base", base.step)  # type: ignore[method-assign]
    optimizer._audit = clock.around("audit", optimizer._audit)  # type: ignore[method-assign]
    optimizer.prober.measuring = measuring  # type: ignore[method-assign]


def block(loop: Loop, clock: Clock, count: int) -> None:
    """`count` recorded steps of the loop, every part on the clock."""
    for _ in range(count):
        with clock.on("data"):
            inputs, targets = loop.batch()
        with clock.on("forward_backward"):
            last, loss = loop.forward_backward(inputs, targets)
        with clock.on("other"):
            stats = loop.update(last)
        with clock.on("forward_backward"):
            loop.zero_grad()
        with clock.on("recording"):
            record_step(loop.training, loss, stats)


def step_shares(run: RunConfig, effort: Effort) -> dict[str, Any]:
    """Return the parts' shares of a step in per cent, which add up to 100, and milliseconds per step.

    Medians over `effort.rounds` blocks of whole audit and probe intervals. On a GPU the clock waits for every
    part, so that work which would overlap with the host counts in full: the sum exceeds a free-running step.
    """
    with opened(run) as loop:
        clock = Clock(run)
        loop.steps(warm_steps(run))
        clocked(loop.training.optimizer, clock)
        count = interval(run)
        taken: dict[str, list[float]] = {part: [] for part in PARTS}
        for _ in range(effort.rounds):
            clock.seconds.clear()
            block(loop, clock, count)
            for part in PARTS:
                taken[part].append(1e3 * clock.seconds[part] / count)
    ms = {part: statistics.median(values) for part, values in taken.items()}
    total = sum(ms.values())
    return {
        "share_pct": {part: 100 * x / total for part, x in ms.items()},
        "ms": ms,
        "step_ms": total,
        "times_entered": {part: clock.entered[part] for part in PARTS},
        "steps": effort.rounds * count,
    }


def shares(run: RunConfig, effort: Effort) -> dict[str, Any]:
    """Return `step_shares` of the baseline and of EBC with each budget, by name, as `measure_each` does."""
    asked = {name: v for name, v in variants(run).items() if v.stabilizer.name in ("none", "ebc")}
    return measure_each(asked, "shares of a step", step_shares, effort)
