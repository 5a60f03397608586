"""The runs of the ladder: on each rung a search around what was carried there, and the runs that are judged.

Every arm begins on a rung with the settings that `tune` found at the suite's own size, carried by stated
rules (`LadderConfig.rules`). By default:

* lr ∝ 1/width, as Adam's of hidden matrices (Yang et al., arXiv:2203.03466), ∝ √batch (Malladi et al.,
  arXiv:2205.10287), and ∝ steps to the power −0.32 (Bjorck et al., arXiv:2409.19913);
* decoupled weight decay so that lr · decay · steps stays, the share of its weights that a run of less than
  an epoch forgets (Wang & Aitchison, arXiv:2405.13698);
* 1 − β₂ ∝ batch, so that the average reaches over as many tokens (Malladi et al.).

A rule is no claim, and was made for Adam: on each rung every arm is tuned again around what was carried, with
the same number of points, and the loss of what was carried is shown beside that of what was found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from ebc_lab.bench.flops import block_elements, step_flops
from ebc_lab.config.schema import (
    BASE,
    GROWING,
    HALF_LIVES,
    SIZES,
    ArmConfig,
    Config,
    RunConfig,
    RungConfig,
)
from ebc_lab.records.decisions import TunedArm
from ebc_lab.records.spec import RunSpec

from ..rules import Decisions, Results
from ..search import Point, Search
from ..suite import arm_run, shape_of, short_name, tuned_arms
from ..tune import FURTHER, RATES, final_seeds, fitted, name_of, tuning_seeds, without_idle

NAME = "ladder"
ROUNDED = 4  # digits of a carried value


class Rungs:
    """One track's arms on every rung: what is carried there, the search around it and the judged runs, as far
    as the results so far allow."""

    def __init__(self, config: Config, earlier: Decisions, track: str, results: Results):
        self.config, self.earlier, self.track, self.results = config, earlier, track, results
        self.ladder = config.ladder
        self.tuned: Mapping[str, TunedArm] = tuned_arms(earlier.get("tune"), track)
        self.tuning_seeds, self.final_seeds = tuning_seeds(config), final_seeds(config)
        self.sigma: float = earlier["lr_sweep"]["tracks"][track]["sigma"]
        self.sizes: dict[str, RungConfig] = {BASE: RungConfig(), **self.ladder.rungs}
        self.rules = self.ladder.rules if self.ladder.carry == "rules" else {}
        self._searches: dict[tuple[str, str], Search | None] = {}

    @cached_property
    def compared(self) -> list[tuple[str, str, bool]]:
        """The comparisons, as (arm, reference, whether the answer is about it): each arm of the user's own
        with its rival, the best of the others by the validation loss of `tune`; and each arm with the suite's
        reference, unless only the arms asked about are compared."""
        suite, arms = self.config.ablation, self._comparable()
        own = [label for label in suite.mine.arms if label in arms]
        others = self._ranked([label for label in arms if label not in own])
        if self.ladder.arms == "asked":  # of a suite that asks about none: its best two
            asked, rivals = (own, others) if own else (others[:1], others[1:])
            return [(label, rival, True) for label in asked for rival in rivals[:1]]
        pairs = {(label, rival): True for label in own for rival in others[:1]}
        for label in arms if suite.reference in arms else ():
            if label != suite.reference:
                pairs.setdefault((label, suite.reference), not own)
        return [(label, other, about) for (label, other), about in pairs.items()]

    @cached_property
    def arms(self) -> dict[str, ArmConfig]:
        """The arms that are trained on the rungs."""
        named = {label for label, other, _ in self.compared for label in (label, other)}
        return {label: arm for label, arm in self.config.ablation.arms.items() if label in named}

    def _comparable(self) -> dict[str, ArmConfig]:
        """Return the arms that have the suite's own size, and copy or start from no other."""
        arms = self.config.ablation.arms
        alone = {k: a for k, a in arms.items() if not (a.replay or a.matched or a.init or a.tuned_as)}
        return {k: arm for k, arm in alone.items() if not shape_of(arm)}

    def _ranked(self, labels: Sequence[str]) -> list[str]:
        """Return arms by the validation loss that `tune` found, the lowest first, without those it could not
        tune. An arm without a grid comes last."""

        def loss(label: str) -> float:
            found = self.tuned.get(label)
            return math.inf if found is None or found["val_loss"] is None else found["val_loss"]

        able = [label for label in labels if "untuned" not in self.tuned.get(label, {})]
        return sorted(able, key=loss)

    # -- what is carried -------------------------------------------------------------------------------------

    def untuned(self, label: str) -> str:
        """Return why an arm has no settings to be carried; empty if it has."""
        found = self.tuned.get(label)
        return found.get("untuned", "") if found else ""

    def carried(self, label: str, rung: str) -> Point:
        """Return an arm's settings as `tune` found them, carried to a rung; {} for an arm without a grid."""
        found = self.tuned.get(label)
        size, rules = self.sizes[rung], {**self.rules, **self.ladder.rules_of.get(label, {})}
        times = dict(zip(SIZES, (size.width_scale, size.batch_scale, size.steps), strict=True))
        point = dict(found["point"]) if found else {}
        rates = [key for key in RATES if key in point]
        for key in [*rates, *(key for key in point if key not in rates)]:
            if isinstance(point[key], str):
                continue
            name = "lr" if key in rates else short_name(key)
            factor = math.prod(
                times[what] ** power for what, power in rules.get(name, {}).items() if what in times
            )
            point[key] = _carried(name, point[key], factor)
            times |= {"lr": factor} if key in rates else {}
        return point

    # -- runs ------------------------------------------------------------------------------------------------

    def specs(
        self, label: str, rung: str, point: Point, seeds: Sequence[int], *, judged: bool
    ) -> list[RunSpec]:
        """Return an arm's runs on a rung at a point, one per seed. Those that are judged are also evaluated
        on the test split, and those at the suite's own size are the ones of the stage `ablation`."""
        run, scale = self._run(label, rung, point, seeds[0])
        run = replace(run, evaluate=["val", "test"] if judged else ["val"])
        name = name_of(label if rung == BASE else f"{label}_{rung}", {} if rung == BASE else point)
        return [RunSpec(NAME, label, name, scale, replace(run, seed=s), of_track=self.track) for s in seeds]

    def _run(self, label: str, rung: str, point: Point, seed: int) -> tuple[RunConfig, float]:
        size = self.sizes[rung]
        arm = self.config.ablation.arms[label]
        arm = replace(
            arm,
            settings={**size.settings, **arm.settings},
            steps=size.steps,
            batch_scale=size.batch_scale,
            width_scale=size.width_scale,
        )
        run, scale = arm_run(self.config, self.earlier, self.track, arm, self.ladder.steps, seed, point)
        # as many evaluations as at the suite's own size
        return replace(run, eval_every=max(1, round(run.eval_every * size.steps))), scale

    def search(self, label: str, rung: str) -> Search | None:
        """Return the search for an arm's best point on a rung around what was carried there, as far as the
        results allow; None where what was carried is judged as it is."""
        if (label, rung) not in self._searches:
            self._searches[label, rung] = self._searched(label, rung)
        return self._searches[label, rung]

    def _searched(self, label: str, rung: str) -> Search | None:
        arm, carried, most = self.arms[label], self.carried(label, rung), self.config.tune.max_extensions
        again = [k for k in carried if short_name(k) in self.ladder.again and not isinstance(carried[k], str)]
        if rung == BASE or not self.ladder.trials or not again:
            return None
        rules = {key: arm.grows.get(key, "log") for key in again}
        first, *others = sorted(again, key=lambda key: key not in GROWING)

        def around(point: Point, key: str) -> list[Point]:
            values = sorted(arm.tune[key])
            ratio = values[-1] / values[-2] if len(values) > 1 else 2.0
            found = [
                search.moved(point, key, x) for x in (point[key] / ratio, point[key], point[key] * ratio)
            ]
            return [point for points in found for point in points]

        search = Search(
            [carried],
            lambda point: self.specs(label, rung, point, self.tuning_seeds, judged=False),
            self.results,
            ratios={first: 2.0},
            prefer_low=first,
            fitted=partial(fitted, arm),
            canonical=without_idle,
            most=self.ladder.trials,
        )
        search.add(around(carried, first))
        search.grow(most, by_spacing=True, lowering=first)
        for key in others:
            search.step(partial(around, key=key))
            search.beyond(key, rules[key], FURTHER)
        search.refine(rules)
        search.final(
            self.config.tune.finalists,
            lambda point: self.specs(label, rung, point, self.final_seeds, judged=False),
        )
        return search

    def point(self, label: str, rung: str) -> Point | None:
        """Return an arm's best point on a rung, or None while its search is open or if nothing completed."""
        search = self.search(label, rung)
        if search is None:
            return self.carried(label, rung)
        return None if search.open else search.best()

    def judged(self, label: str, rung: str) -> list[RunSpec]:
        """Return the runs of an arm on a rung that are judged; empty until its best point there is known."""
        point = self.point(label, rung)
        return [] if point is None else self.specs(label, rung, point, self.config.seeds, judged=True)

    def kept(self, label: str, rung: str) -> list[RunSpec]:
        """Return the runs of an arm on a rung at its carried settings, which are judged beside the others."""
        return self.specs(label, rung, self.carried(label, rung), self.config.seeds, judged=True)

    def all_specs(self) -> list[RunSpec]:
        """Return every run that can be planned so far."""
        specs: list[RunSpec] = []
        for label in (label for label in self.arms if not self.untuned(label)):
            for rung in self.sizes:
                search = self.search(label, rung)
                specs += search.specs if search else []
                specs += self.kept(label, rung)
                specs += self.judged(label, rung) if search else []  # else they are the same runs
        return specs


def _carried(name: str, value: float, factor: float) -> float:
    """Return a setting's value times the factor; of betas and momentum what is lacking to 1 is multiplied."""
    if name.startswith(HALF_LIVES):
        return float(f"{max(0.0, 1 - (1 - value) * factor):.{ROUNDED}g}")
    return float(f"{value * factor:.{ROUNDED}g}")


def rung_size(run: RunConfig) -> dict[str, Any]:
    """Return a rung's size: width, blocks, batch, steps, tokens of a run, and its floating-point operations
    after Kaplan et al. (arXiv:2001.08361), without those of the head, whose size only the text tells."""
    model, tokens = run.model, run.tokens_per_step
    flops = step_flops(block_elements(model), model.blocks, model.context, model.width, tokens)["total"]
    return {
        "width": model.width,
        "blocks": model.blocks,
        "batch_size": run.batch_size,
        "steps": run.steps,
        "tokens": tokens * run.steps,
        "compute": flops * run.steps,
    }
