"""What `ebc-lab train` shows of a run: how far it is while it trains, and at its end what it came to."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ebc_lab.config.errors import clock
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.streams import NewRows
from ebc_lab.report.text.words import fixed, format_share

from .ebm_view import Evaluations
from .options import console as made_console
from .options import live

DRAWN_EVERY_S = 0.25  # on a terminal
LINE_EVERY_S = 60.0  # elsewhere
BAR = 40  # characters


class RunView:
    """How far a run is, to be called with the step that is reached: a line and a bar that change on a
    terminal, elsewhere a line in a minute; of an energy-based model also a line for every evaluation.

    It reads the streams of the run as they are flushed, and keeps nothing of its own.
    """

    def __init__(self, run: RunConfig, directory: Path, console: Console | None = None):
        files = RunFiles(directory)
        self.run = run
        self.console = console or made_console()
        self.steps = NewRows(files.steps)
        self.evals = NewRows(files.evals)
        self.evaluations = Evaluations(run, files) if run.workload.name == "ebm" else None
        self.every_s = DRAWN_EVERY_S if self.console.is_terminal else LINE_EVERY_S
        self.first: tuple[float, int] | None = None  # when this attempt took its first step, and which
        self.shown_at = time.monotonic()
        self.figures: dict[str, str] = {}
        self.display: Any = None

    @contextmanager
    def shown(self) -> Iterator[RunView]:
        """Show it while the run trains. Evaluations stay on the terminal, the line and its bar do not."""
        with live(self.console, auto_refresh=False, transient=True) as self.display:
            if self.display:
                self.display.update(self._picture(0, "step 0"), refresh=True)
            yield self

    def __call__(self, step: int) -> None:
        now = time.monotonic()
        self.first = self.first or (now, step)
        news = self.evaluations.read(step) if self.evaluations else []
        due = now - self.shown_at >= self.every_s
        if not (due or news):
            return
        self._read()
        line = self._line(step, now)
        if due:
            self.shown_at = now
        if self.display:
            self.display.update(self._picture(step, line), refresh=True)
        elif due:
            news = [line, *news]
        for text in news:
            self.console.print(Text(text), soft_wrap=not self.display)

    def _line(self, step: int, now: float) -> str:
        """`step 60/120, 51.2 steps/s, 20 s left: loss 2.5`; what is not known is left out."""
        pace = [f"step {step}/{self.run.steps}"]
        began, first = self.first or (now, step)
        if step > first and now > began:
            rate = (step - first) / (now - began)
            pace += [f"{rate:.1f} steps/s", f"{clock((self.run.steps - step) / rate)} left"]
        figures = ", ".join(f"{name} {value}" for name, value in self.figures.items())
        return ": ".join(filter(None, [", ".join(pace), figures]))

    def _picture(self, step: int, line: str) -> RenderableType:
        """The line, cut at its end where room is short, and a bar."""
        progress = Table.grid()
        progress.add_row(Text(line, no_wrap=True, overflow="ellipsis"))
        progress.add_row(ProgressBar(self.run.steps, step, width=BAR))
        return progress

    def _read(self) -> None:
        """Bring the figures up to date with the rows that were flushed since they were read."""
        rows = self.steps.read()
        if rows:
            self.figures["loss"] = fixed(fmean(row["loss"] for row in rows), 3)
        for row in self.evals.read():
            self.figures["val"] = fixed(row["val_loss"], 3)
        if rows and self.run.stabilizer.name == "ebc":
            self.figures["c"] = format_share(median(row["c"] for row in rows))
            ratios = [row["applied_kl"] / row["target_kl"] for row in rows if row["target_kl"] > 0]
            audited = [ratio for ratio in ratios if not math.isnan(ratio)]
            if audited:
                self.figures["KL/δ*"] = fixed(audited[-1], 2)


# -- at the end ----------------------------------------------------------------------------------------------


def closing_lines(
    run: RunConfig, result: Mapping[str, Any], directory: Path, *, earlier: bool
) -> Iterator[str]:
    """What a run came to: its losses, what its budget did, what its quantized model takes.

    `earlier`: it had ended before this command.
    """
    known = {split: result.get(f"{split}_loss") for split in ("val", "test")}
    losses = ", ".join(f"{split} {loss:.4f}" for split, loss in known.items() if loss is not None)
    steps = "1 step" if result["steps"] == 1 else f"{result['steps']} steps"
    came_to = losses or str(result.get("cause")).rstrip(".")
    ended = f"{result['outcome']} after {steps}; {came_to}; {directory}"
    yield f"trained before: {ended}" if earlier else ended
    if "steps_to_target" in result:
        reached = result["steps_to_target"]
        when = "never reached" if reached is None else f"reached after {reached} steps"
        yield f"target loss {result['target_loss']:g}: {when}"
    if run.stabilizer.name == "ebc" and result.get("clip_rate") is not None:
        yield _budget_in_words(run, result)
    if result.get("kl_law"):
        a, b = result["kl_law"]
        yield f"KL of c times an update: {a:.3g} c² + {b:.3g} c"
    if "packed_bytes" in result:
        times = result["model_bytes_float32"] / result["packed_bytes"]
        sizes = f"{result['packed_bytes']:,} of {result['model_bytes_float32']:,} bytes, {times:.2f}× smaller"
        bits = f"{result['bits_per_weight']:.3f} bits a hidden weight"
        yield f"model.ebcpack: {sizes}; {bits}, {result['zero_share']:.0%} of them 0"


def _budget_in_words(run: RunConfig, result: Mapping[str, Any]) -> str:
    """c and the applied KL of a run with EBC that took a step."""
    target = run.budget.target_kl
    if not result["clip_rate"]:
        return f"c = 1 throughout: the budget never limited an update{_unlimited(target, result)}."
    share = f"{result['clip_rate']:.0%}" if result["clip_rate"] >= 0.005 else "less than 1%"
    c = f"c: median {format_share(result['c_median'])}, {share} of the steps clipped"
    if run.budget.radius is not None:
        c += f"; the KL ruled {result['kl_ruled']:.0%} of the steps, the radius {result['radius_ruled']:.0%}"
        c += f"; a KL was measured at {result['measured']:.0%}"
        if result["kl_within_30pct"] is None:
            return f"{c}."
    if result["kl_within_30pct"] is None:
        return f"{c}; none of them was audited (audit_every={run.audit_every})."
    ratio = f"median {result['kl_ratio_median']:.2f} times the target (target_kl={target:g})"
    audits = f"{result['kl_within_30pct']:.0%} of {result['kl_clipped_audits']} audited clipped steps"
    return f"{c}; applied KL: {ratio}, on {audits} within ±30% of it."


def _unlimited(target: float, result: Mapping[str, Any]) -> str:
    """How far the updates moved the predictions where none was clipped, against the target."""
    natural = result.get("kl_median")
    if natural is None:
        return ""
    moved = f"; updates moved the predictions by a median of {natural:.2g} nats/token"
    if natural >= target:
        return f"{moved}, target_kl={target:g}"
    return f"{moved}, less than target_kl={target:g}, so this is the optimizer without EBC"
