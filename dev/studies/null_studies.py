"""How often the finals claim something false: their own decision on invented studies whose truth is known.

    python dev/studies/null_studies.py [STUDIES] [OVERRIDES…]        1,000 studies, each way; e.g.
    seeds=[0,1,2,3,4]

In each study all arms have the same true loss (or every EBC arm is worse by exactly the margin, or only EBC
at its highest rate, by exactly the LR window's). Seeds differ, runs differ, and the validation loss that
picks the best arm shares the run's luck with the test loss that judges it. Counted are the studies in which
any arm is said to beat the baseline or the fair control, or the plain arm at its own rate, and those that
call EBC no worse or its window wide.

Then the same of suites that ask about arms of one's own: how often one of them is said to be better or worse
than the best of the others by validation, although all have the same true loss; and level, although it is
worse by more than the margin.

Last an optimizer that is tuned twice, on other seeds, and compared with itself, with and without the luck of
the tuning in the interval; and a fair control, which one seed chose, beside what is as good as it could be.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from ebc_lab.config.compose import compose
from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import Decision
from ebc_lab.records.spec import RunSpec
from ebc_lab.study.stages import ablation, compare_arms, finals
from ebc_lab.study.stages.rules import Results
from ebc_lab.study.stages.statistics import NO_LUCK, luck_of_choice, noise_of_runs, paired
from ebc_lab.study.stages.tune import begun_with

SEEDS_SD = 0.03  # nats, between seeds
RUNS_SD = 0.02  # between runs of a seed
SPLIT_SD = 0.005  # between the splits of a run
SETTINGS = (
    "scale=laptop",
    "optimizer=adam",
    "dtype=float32",
    "threads_per_run=1",
    "compile=off",
    "device=cpu",
    "data.sha256=0",
)


def settings(overrides: Sequence[str] = ()) -> Config:
    """A study's settings with nothing left to measure."""
    return compose([*SETTINGS, *overrides])


def decided(config: Config) -> dict[str, Decision]:
    """What the finals build on: an lr, the noise, a target KL and a scale that no other arm has."""
    schedule = {"name": "trapezoid", "warmup_steps": 100, "decay_share": 0.4}
    control = {"lr": 4e-3, "lr_scale": 1.0, "lr_schedule": schedule, "grid": []}
    swept = {
        "optimizer": "adam",
        "projection": "none",
        "lr": 4e-3,
        "natural_kl": 0.02,
        "sigma": 0.02,
        "ranked": [],  # nothing was chosen from several: there is no luck of a tuning
        "control": control,
    }
    found = {
        "lr_sweep": swept | {"replicate_losses": [2.0, 2.02, 2.04]},
        "calibrate": {
            "budget": "tracked",
            "delta_star": 0.02,
            "by_budget": {"tracked": 0.02},
            "ranked_losses": {},
            "seeds": 1,
        },
        "lr_scale": {"lr_scale": 4.0},
    }
    return {
        stage: {"inputs_sha256": stage, "candidates": [], "tracks": {"adam_none": track}}
        for stage, track in found.items()
    }


def invented(
    specs: Sequence[RunSpec], draw: random.Random, worse: float, diverging: float, narrow: float
) -> dict[str, dict[str, Any]]:
    """Results of runs whose truth is known: EBC arms `worse` in nats and `narrow` more at the highest rate, a
    share of runs `diverging`."""
    seeds = {s.run.seed: draw.gauss(2.0, SEEDS_SD) for s in specs}
    highest = max(s.lr_scale for s in specs)
    results: dict[str, dict[str, Any]] = {}
    for spec in specs:
        loss = draw.gauss(seeds[spec.run.seed], RUNS_SD)
        if spec.run.stabilizer.name == "ebc":
            loss += worse + narrow * (spec.lr_scale == highest)
        whole = draw.random() >= diverging
        figures = {
            f"{split}_loss": draw.gauss(loss, SPLIT_SD) if whole else None for split in ("val", "test")
        }
        results[spec.run_id] = {"outcome": "completed" if whole else "diverged", **figures}
    return results


def judged(
    config: Config, decisions: dict[str, Decision], looks: Sequence[Sequence[RunSpec]], results: Results
) -> Decision:
    """The finals' decision at the look where they stop: each look has more seeds than the one before."""
    specs = next((s for s in looks if not compare_arms.next_seeds(config, s, results, decisions)), looks[-1])
    return finals.STAGE.decide(config, specs, results, decisions)


def simulate(
    config: Config,
    studies: int,
    *,
    worse: float = 0.0,
    diverging: float = 0.0,
    narrow: float = 0.0,
    seed: int = 0,
) -> dict[str, float]:
    """Shares of studies: `beats` the baseline or the control, `beats_rate` the plain arm at its rate,
    `no_worse` by each line of the verdict, a wide `window`; mean `seeds`."""
    decisions = decided(config)
    draw = random.Random(seed)
    looks = seeds_of(config, decisions)
    counted = ("beats", "beats_rate", "uncorrected", "x2_no_worse", "best_no_worse", "window", "seeds")
    found = dict.fromkeys(counted, 0.0)
    for _ in range(studies):
        results = cast(Results, invented(looks[-1], draw, worse, diverging, narrow))
        decision = judged(config, decisions, looks, results)
        [track] = decision["tracks"].values()
        families = track["differences"]
        differences = [*families["baseline"].values(), *families["control"].values()]
        lines = {line["name"]: line for line in track["verdict"]}
        claims = [d["judged"] for d in differences] + [
            "beats" for line in lines.values() if line.get("beats")
        ]
        found["beats"] += "beats" in claims
        found["beats_rate"] += "beats" in [d["judged"] for d in families["rate"].values()]
        found["uncorrected"] += any(d["alone"] == "beats" for d in differences)
        found["x2_no_worse"] += lines["x2_no_worse_than_baseline"]["verdict"] == "pass"
        found["best_no_worse"] += lines["best_ebc_no_worse_than_control"]["verdict"] == "pass"
        found["window"] += lines["lr_window"]["verdict"] == "pass"
        found["seeds"] += len(next(iter(track["arms"].values()))["runs"])
    return {k: v / studies for k, v in found.items()}


def seeds_of(config: Config, decisions: dict[str, Decision]) -> list[list[RunSpec]]:
    """The runs of the finals at each look."""
    looks: list[list[RunSpec]] = []
    results: dict[str, Any] = {}
    while len(looks) < len(compare_arms.looks(config)):  # played with results that leave everything open
        looks.append(finals.STAGE.runs(config, decisions, results))
        results |= {s.run_id: _open(s) for s in looks[-1]}
    return looks


def _open(spec: RunSpec) -> dict[str, Any]:
    loss = 2.0 + (spec.run.seed % 2 if spec.run.stabilizer.name == "ebc" else 0.5)
    return {"outcome": "completed", "val_loss": loss, "test_loss": loss}


SUITES = {  # in words -> what is asked
    "one optimizer against one": (
        "study=optimizers",
        "ablation.mine.arms=[muon]",
        "ablation.step_cost=false",
    ),
    "two stabilizers against ten": ("study=stabilizers", "ablation.mine.arms=[agc,zclip]"),
}


def answered(
    config: Config, studies: int, *, worse: float = 0.0, diverging: float = 0.0, seed: int = 0
) -> dict[str, float]:
    """Shares of studies in which the arms asked about, `worse` in nats than all others, are said to be
    `better`, `worse`, `level` or `undecided` beside their rival, and in which `any` of the comparisons claims
    a difference."""
    draw = random.Random(seed)
    mine = config.ablation.mine.arms
    decisions = decided(config) | {"tune": _tuned(config, draw)}
    del decisions["calibrate"], decisions["lr_scale"]
    specs = ablation.STAGE.runs(config, decisions, {})
    found = dict.fromkeys(("better", "worse", "level", "undecided", "any"), 0.0)
    for _ in range(studies):
        decisions["tune"] = _tuned(config, draw)
        results = invented(specs, draw, 0.0, diverging, 0.0)
        for spec in specs if worse else ():
            if spec.arm in mine and results[spec.run_id]["test_loss"] is not None:
                results[spec.run_id]["test_loss"] += worse
        decision = ablation.STAGE.decide(config, specs, cast(Results, results), decisions)
        [track] = decision["tracks"].values()
        verdicts = {answer["verdict"] for answer in track["answers"].values()}
        for verdict in verdicts:
            found[verdict] += 1
        every = [d["verdict"] for answer in track["answers"].values() for d in answer["against"].values()]
        found["any"] += bool({"better", "worse"} & set(every))
    return {k: v / studies for k, v in found.items()}


def _tuned(config: Config, draw: random.Random) -> Decision:
    """Every arm at the first point of its grid; luck says which has the lowest validation loss."""
    arms = {
        label: {"point": begun_with(config.tune, arm)[0], "val_loss": draw.gauss(2.0, RUNS_SD)}
        for label, arm in config.ablation.arms.items()
    }
    return {"inputs_sha256": "tune", "tracks": {"adam_none": {"arms": arms}}}


def of_suites(studies: int, overrides: Sequence[str]) -> None:
    """Print how often a suite's answer is wrong."""
    for what, asked in SUITES.items():
        config = settings([*asked, *overrides])
        truths: dict[str, dict[str, float]] = {
            "no effect": {},
            "no effect, one run in 20 diverges": {"diverging": 0.05},
            "worse by twice the margin": {"worse": 2 * config.finals.margin},
        }
        for truth, how in truths.items():
            found = answered(config, studies, **how)  # type: ignore[arg-type]
            shares = ", ".join(
                f"{verdict} {share:.1%}" for verdict, share in found.items() if verdict != "any"
            )
            print(f"{what}, {truth}, {len(config.seeds)} seeds: {shares}; any claim {found['any']:.1%}")


CURVATURE = (0.0, 0.005, 0.01, 0.03, 0.1)  # nats per squared octave around the best rate
SHAPES = (0.0, 0.004, 0.012)  # nats: of three shapes
TUNED_SD = 0.01  # of a run without its seed's own effect


def tuned_twice(curvature: float, studies: int, *, wild: float = 0.0, seed: int = 1) -> dict[str, float]:
    """How often two searches of one landscape, five octaves and three shapes, are said to differ: `plain`,
    with the `luck` of the tuning, and with that of `uncertain` points, as where trials are counted; and by
    how much the last `widens` the interval (median).

    Two tuning seeds, the point with the best worst seed, judged on five others. `wild`: how much more noise a
    run has for each octave above the best rate.
    """
    draw = np.random.default_rng(seed)
    octaves = np.arange(-2.0, 3.0)
    noise = TUNED_SD * np.repeat(1 + wild * np.maximum(0, octaves), len(SHAPES))
    claimed = {"plain": 0, "luck": 0, "uncertain": 0}
    wider = []
    for _ in range(studies):
        off = draw.uniform(-0.5, 0.5)  # where the best rate lies between two of the grid
        losses = (curvature * (octaves[:, None] - off) ** 2 + np.array(SHAPES)).ravel()
        of_seed = draw.normal(0, SEEDS_SD, (2, 1, 2))
        tried = losses[:, None] + of_seed + noise[:, None] * draw.normal(size=(2, len(losses), 2))
        chosen = tried.max(axis=2).argmin(axis=1)
        judged_ = losses[chosen, None] + noise[chosen, None] * draw.normal(size=(2, 5))
        own, twin = ({str(s): float(x) for s, x in enumerate(arm)} for arm in judged_)
        width = {}
        for name in claimed:
            lucks = [luck_of_choice(p.tolist(), TUNED_SD, uncertain=name == "uncertain") for p in tried]
            luck = NO_LUCK if name == "plain" else lucks[0] + lucks[1]
            found = paired(own, twin, luck=luck)
            low, high = found["low"], found["high"]
            assert low is not None
            assert high is not None
            claimed[name] += low > 0 or high < 0
            width[name] = high - low
        wider.append(width["uncertain"] / width["plain"])
    return {**{name: n / studies for name, n in claimed.items()}, "widens": float(np.median(wider))}


def searched_once(curvature: float, seeds: int, studies: int, *, seed: int = 1) -> dict[str, float]:
    """How often something as good as the control's best true point is said to beat the control, whose search
    has one seed: by the interval with `luck`, and without, `plain`; and how often it is with `luck` where it
    is better by 5 times a run's noise, `found`.

    The noise is that of six arms of the finals, two of which are at too high a rate and have twice as much.
    """
    draw = np.random.default_rng(seed)
    octaves = np.arange(-1.0, 2.0)
    beats = {"plain": 0, "luck": 0, "found": 0}
    for _ in range(studies):
        off = draw.uniform(-0.5, 0.5)  # where the best rate lies between two of the grid
        losses = (curvature * (octaves[:, None] - off) ** 2 + np.array(SHAPES)).ravel()
        tried = losses + draw.normal(0, TUNED_SD, len(losses))
        true = np.array([losses.min(), losses[tried.argmin()], *np.sort(losses)[:2], 2.5, 3.0])
        noise = TUNED_SD * np.array([1, 1, 1, 1, 2, 2])
        arms = true[:, None] + draw.normal(0, SEEDS_SD, seeds) + noise[:, None] * draw.normal(size=(6, seeds))
        sigma, freedom = noise_of_runs(arms.tolist()) or (TUNED_SD, 1)
        luck = luck_of_choice(tried[:, None].tolist(), sigma, freedom)
        own, control = ({str(nth): float(x) for nth, x in enumerate(arm)} for arm in arms[:2])
        better = {nth: x - 5 * TUNED_SD for nth, x in own.items()}
        for name, arm, of in (("plain", own, NO_LUCK), ("luck", own, luck), ("found", better, luck)):
            beats[name] += paired(arm, control, luck=of)["alone"] == "beats"
    return {name: n / studies for name, n in beats.items()}


def of_tuning(studies: int) -> None:
    """Print how often an optimizer that is tuned twice is said to differ from itself, and one that is tuned
    perfectly to beat the same one that is tuned on one seed."""
    for curvature in CURVATURE:
        for wild in (0.0, 1.0):
            found = tuned_twice(curvature, studies, wild=wild)
            where = f"{curvature:g} nats per squared octave{', wild above the best' if wild else ''}"
            shares = f"claims {found['plain']:.1%}, with luck {found['luck']:.1%}"
            shares += f", of uncertain points {found['uncertain']:.1%}"
            print(f"tuned twice, {where}: {shares} (×{found['widens']:.2f} as wide)")
        for seeds in (3, 8):
            found = searched_once(curvature, seeds, studies)
            shares = f"beats {found['plain']:.1%}, with luck {found['luck']:.1%}"
            shares += f"; where it does by 5 σ {found['found']:.1%}"
            print(f"searched on one seed, {curvature:g} nats per squared octave, judged on {seeds}: {shares}")


def main(studies: int, overrides: Sequence[str]) -> None:
    kinds = {"fixed seeds": (), "sequential": ("finals.max_seeds=9", "finals.seeds_per_look=2")}
    for kind, more in kinds.items():
        config = settings([*overrides, *more])
        truths: dict[str, dict[str, float]] = {
            "no effect": {},
            "no effect, one run in 20 diverges": {"diverging": 0.05},
            "EBC worse by the margin": {"worse": config.finals.margin},
            "EBC at ×8 worse by the window's margin": {"narrow": config.finals.window_margin},
        }
        for truth, how in truths.items():
            found = simulate(config, studies, **how)  # type: ignore[arg-type]
            shares = f"beats {found['beats']:.1%} (uncorrected {found['uncorrected']:.1%})"
            shares += f", at its rate {found['beats_rate']:.1%}"
            passes = f"no worse: ×2 {found['x2_no_worse']:.1%}, best {found['best_no_worse']:.1%}"
            passes += f"; wide window {found['window']:.1%}"
            print(f"{kind}, {truth}: {shares}; {passes}; {found['seeds']:.1f} seeds")


if __name__ == "__main__":
    number = [a for a in sys.argv[1:] if a.isdigit()]
    main(int(number[0]) if number else 1000, [a for a in sys.argv[1:] if not a.isdigit()])
    of_suites(int(number[0]) if number else 1000, [a for a in sys.argv[1:] if not a.isdigit()])
    of_tuning(int(number[0]) if number else 1000)
