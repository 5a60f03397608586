"""What holding the KL costs: how near clipped steps come to the target, over what they add to the plain loop.

    python dev/studies/tracking_frontier.py --picture frontier.png [--sizes tiny laptop] [--seeds 0 1]
    python dev/studies/tracking_frontier.py --only default 'tracked, above 0.25'

Trains the GPT of attach_cost.py on Shakespeare's characters with AdamW at a constant rate, four times one at
which it trains well, and a target of half the median KL of the plain loop's steps there, so that most steps
are clipped. From step 20 on the KL of each clipped step is measured on the whole batch, by two forwards that
no hook of `attach` sees and torch's own kl_div in float64. The rows that chose c are among them, more of them
the more rows choose; `--fresh` measures on another batch, which no step has been trained on and no c was
chosen by, and where a step moves predictions somewhat less.

All configurations and the plain loop take turns step by step on the same batches; the cost is the median of
attach_cost.py, and counts no measurement of this script. The loss is the mean over the last tenth of the
steps.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from attach_cost import (
    FIRST,
    SIZES,
    SKIPPED,
    Batch,
    Loop,
    Record,
    Size,
    Text,
    kl,
    logits,
    machine,
    natural,
    table,
)
from torch import Tensor

from ebc_lab.ebc import attach
from ebc_lab.ebc.options import CLIPPED_BELOW

HOT = 4  # times the rate at which a size trains well
SHARE = 0.5  # of the natural KL: the target
NEAR = 0.3  # within this share of the target a step holds it
STEPS = {"tiny": 600, "laptop": 200, "mid": 100}
FRESH = 1_000_000  # added to a seed: that of the batches which nothing is trained on
ENOUGH = 250  # tokens that choose c by default, see docs/own_loop.md

Options = dict[str, Any]


def configurations(size: Size) -> dict[str, Options]:
    """The arguments of `attach` beside the target, by name."""
    rows = min(max(2, -(-ENOUGH // size.context)), size.rows - size.rows // 4)
    half, quarter = {"probe_sequences": max(1, rows // 2)}, {"probe_sequences": max(1, rows // 4)}
    tracked: Options = {"budget": "tracked"}
    needed: Options = {**tracked, "measure": "when_needed"}
    return {
        "default": {},
        "all rows": {"probe_sequences": "all"},
        "half the rows": half,
        "a quarter": quarter,
        "no audits": {"audit_every": 0, "probe_sequences": rows},
        "1 step in 2": {"measure_every": 2},
        "1 in 2, half the rows": {"measure_every": 2, **half},
        "tracked": tracked,
        "tracked, half the rows": {**tracked, **half},
        "tracked, a quarter": {**tracked, **quarter},
        "tracked, 1 step in 2": {**tracked, "measure_every": 2},
        "tracked, above 0.2": {**needed, "measure_above": 0.2},
        "tracked, above 0.25": needed,
        "tracked, above 0.3": {**needed, "measure_above": 0.3},
        "tracked, above 0.4": {**needed, "measure_above": 0.4},
        "tracked, above 0.25, half": {**needed, **half},
    }


@dataclass
class Kept:
    """What one configuration did in the runs of all seeds."""

    record: Record = field(default_factory=Record)
    ratios: list[list[float]] = field(default_factory=list)  # of each seed: KL over target of clipped steps
    steps: int = 0  # whose KL was measured
    losses: list[float] = field(default_factory=list)  # of each seed, at the end

    def held(self) -> list[float]:
        """Of each seed, the share of clipped steps within ±30% of the target."""
        return [float(np.mean(np.abs(np.array(r) - 1) <= NEAR)) if r else np.nan for r in self.ratios]

    def share(self) -> float:
        """The same of all seeds together."""
        found = np.concatenate(self.ratios)
        return float(np.mean(np.abs(found - 1) <= NEAR)) if len(found) else np.nan


class Watched:
    """One loop of one seed, whose steps are timed and looked at."""

    def __init__(self, loop: Loop, target: float, kept: Kept):
        self.loop, self.target, self.kept = loop, target, kept
        self.ratios: list[float] = []
        self.losses: list[float] = []
        kept.ratios.append(self.ratios)

    def step(self, t: int, batch: Batch, tokens: Tensor) -> None:
        """Take the step, and measure its KL on some tokens if it was clipped."""
        loop = self.loop
        before = logits(loop.model, tokens)
        record = self.kept.record if t >= SKIPPED else Record()
        self.losses.append(float(record.step(loop, batch)))
        if loop.ebc is None or t < FIRST:
            return
        self.kept.steps += 1
        if float(loop.ebc.last.clip_coefficient) < CLIPPED_BELOW:
            self.ratios.append(kl(before, logits(loop.model, tokens)) / self.target)

    def end(self) -> None:
        self.kept.losses.append(float(np.mean(self.losses[-max(1, len(self.losses) // 10) :])))


@dataclass(frozen=True)
class Plan:
    """What is trained at one size."""

    size: Size
    text: Text
    steps: int
    chosen: Mapping[str, Options]
    fresh: bool  # whether KLs are measured on batches of their own

    def loop(self, seed: int) -> Loop:
        return Loop(self.size, self.text, seed, HOT * self.size.lr)

    def target(self) -> float:
        batches = self.text.batches(self.size, self.steps, seed=0)
        return SHARE * natural(self.size, self.text, batches, HOT * self.size.lr)

    def watched(self, seed: int, target: float, kept: dict[str, Kept]) -> list[Watched]:
        """A new loop of each configuration, and the plain one."""
        watched = [Watched(self.loop(seed), target, kept.setdefault("plain", Kept()))]
        for name, options in self.chosen.items():
            loop = self.loop(seed)
            loop.ebc = attach(loop.model, loop.optimizer, target_kl=target, **options)
            watched.append(Watched(loop, target, kept.setdefault(name, Kept())))
        return watched

    def trained(self, seeds: Sequence[int]) -> tuple[float, dict[str, Kept]]:
        """The target, and what each configuration did."""
        target = self.target()
        kept: dict[str, Kept] = {}
        for seed in seeds:
            sides = self.watched(seed, target, kept)
            order, shuffle = list(sides), random.Random(seed)
            batches = self.text.batches(self.size, self.steps, seed)
            others = self.text.batches(self.size, self.steps, FRESH + seed) if self.fresh else batches
            for t, batch in enumerate(batches):
                if t == SKIPPED:
                    gc.collect()
                    gc.freeze()
                shuffle.shuffle(order)
                for side in order:
                    side.step(t, batch, others[t][0])
            gc.unfreeze()
            for side in sides:
                side.end()
        return target, kept


def cost(kept: Mapping[str, Kept], name: str) -> float:
    return kept[name].record.median(kept["plain"].record)


def rows(kept: Mapping[str, Kept]) -> list[list[str]]:
    """The table of one size."""
    head = ["configuration", "step, over plain", "within ±30%", "by seed", "KL/target: quartiles"]
    found = [[*head, "clipped", "KL measured", "loss at the end"]]
    for name, k in kept.items():
        loss = f"{np.mean(k.losses):.3f}"
        if name == "plain":
            found.append([name, "1", "", "", "", "", "", loss])
            continue
        all_ratios = np.concatenate(k.ratios)
        quartiles = np.quantile(all_ratios, [0.25, 0.5, 0.75]) if len(all_ratios) else [np.nan] * 3
        found.append(
            [
                name,
                f"{cost(kept, name):.3f}",
                f"{100 * k.share():.1f}%",
                ", ".join(f"{100 * share:.0f}" for share in k.held()),
                " / ".join(f"{q:.2f}" for q in quartiles),
                f"{100 * len(all_ratios) / k.steps:.0f}%",
                f"{100 * sum(k.record.measured) / len(k.record.measured):.0f}%",
                loss,
            ]
        )
    return found


def apart(places: Sequence[float], least: float) -> list[float]:
    """Rising places, moved so that neighbours are at least so far apart."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + least) if moved else place)
    down = max(0.0, moved[-1] - max(places)) / 2
    return [place - down for place in moved]


def panel(axes: Any, name: str, kept: Mapping[str, Kept]) -> None:
    """One size: a point for each configuration, their names in a column beside them."""
    points = sorted((100 * kept[n].share(), cost(kept, n), n) for n in kept if n != "plain")
    low, high = points[0][0], points[-1][0]
    least = max(0.055 * (high - low), 0.3)
    places = apart([y for y, _, _ in points], least)
    left, right = min(x for _, x, _ in points), max(x for _, x, _ in points)
    column = right + 0.12 * (right - left)
    for (y, x, n), place in zip(points, places, strict=True):
        axes.plot(x, y, "o", color="#0072b2", markersize=5)
        axes.plot([x, column], [y, place], color="#bbbbbb", linewidth=0.5, zorder=0)
        axes.text(column, place, f" {n}", va="center", fontsize=7)
    axes.set_xlim(left - 0.05 * (right - left), column + 0.55 * (right - left))
    axes.set_ylim(min(low, places[0]) - least, max(high, places[-1]) + least)
    axes.set_title(name)
    axes.set_xlabel("processor time of a step, over the plain loop's")


def draw(found: Mapping[str, Mapping[str, Kept]], file: Path) -> None:
    """Cost on the one axis, how well the KL is held on the other."""
    figure, panels = plt.subplots(1, len(found), figsize=(6.2 * len(found), 4.6), squeeze=False)
    for axes, (name, kept) in zip(panels[0], found.items(), strict=True):
        panel(axes, name, kept)
    panels[0][0].set_ylabel("clipped steps within ±30% of the target KL, %")
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How well a KL is held, and at what cost.")
    parser.add_argument("--sizes", nargs="+", default=["tiny", "laptop"], choices=SIZES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, help="by default as many as a size needs")
    parser.add_argument("--only", nargs="+", help="configurations, by their names")
    parser.add_argument("--fresh", action="store_true", help="measure on text that the step did not see")
    parser.add_argument("--picture", type=Path)
    return parser.parse_args()


def main() -> None:
    asked = options()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of few probe tokens, which is what some configurations are about
    text = Text()
    print(machine())
    found: dict[str, dict[str, Kept]] = {}
    for name in asked.sizes:
        size, steps = SIZES[name], asked.steps or STEPS[name]
        chosen = configurations(size)
        unknown = set(asked.only or ()) - set(chosen)
        if unknown:
            sys.exit(
                f"There is no configuration {', '.join(sorted(unknown))}; there are {', '.join(chosen)}."
            )
        chosen = {n: o for n, o in chosen.items() if not asked.only or n in asked.only}
        target, found[name] = Plan(size, text, steps, chosen, asked.fresh).trained(asked.seeds)
        seeds, kept = ", ".join(map(str, asked.seeds)), found[name]
        about = f"{name}: {steps} steps of seeds {seeds}, AdamW at {HOT * size.lr:g}"
        plain = f"a plain step {1000 * kept['plain'].record.mean():.2f} ms"
        print(
            f"\n{about}, a target of {target:.3g} nats per token; {plain}\n\n{table(rows(kept))}",
            flush=True,
        )
    if asked.picture:
        draw(found, asked.picture)


if __name__ == "__main__":
    main()
