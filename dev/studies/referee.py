"""A referee's figures: what README.md and findings.md claim, computed again from the recorded bundles.

    python dev/studies/referee.py      # all items
    python dev/studies/referee.py 1 4  # two of them

Written by hand to check the project's statistics from outside: it reads the JSON of `docs/evidence/*.zip` and
imports nothing of `ebc_lab`. t-intervals, Bonferroni's correction, the bootstrap, windows and the choice of a
carried constant are its own. Nats, 95%. A δ beyond a grid is given the loss at its end.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import numpy as np
from scipy import stats

EVIDENCE = Path(__file__).parents[2] / "docs/evidence"
NEAR = 0.05  # nats: what a window's losses may lie above the best
PAIRS = [("kl_x2", "lr"), ("kl_x8", "lr"), ("radius", "lr"), ("radius", "kl_x2"), ("radius", "kl_x8")]
SCORED = [("confidence_radius", "radius"), ("double", "radius"), ("untuned", "prodigy"), ("muon", "adamw")]
CALIBRATED = ("gpt", "gru", "cnn")  # the workloads on which configurations were chosen
LIMITS = ("radius", "double", "confidence_radius", "untuned", "kl")  # of `calibrated`


@functools.cache
def decided(bundle: str, stage: str, of: str = "tracks") -> Any:
    """What a stage of a bundle decided of its only track, or its candidates."""
    found = json.loads(zipfile.ZipFile(EVIDENCE / f"{bundle}.zip").read("auto_decisions.json"))[stage][of]
    return next(iter(found.values())) if of == "tracks" else found


@functools.cache
def runs(bundle: str) -> dict[str, tuple[Any, Any]]:
    """Run id -> its spec and its result."""
    lines = zipfile.ZipFile(EVIDENCE / f"{bundle}.zip").read("runs.jsonl").decode().splitlines()
    rows = [row for row in map(json.loads, lines) if "result.json" in row]
    return {row["run"]: (json.loads(row["spec.json"]), json.loads(row["result.json"])) for row in rows}


def curve_of(bundle: str, arm: str, setting: str) -> dict[float, float]:
    """Validation loss by constant, of an arm of the stage carry in a setting."""
    points = decided(bundle, "carry")["arms"][arm]["curves"][setting]["points"]
    return {p["value"]: p["mean"] for p in points}


def interval(values: Any, comparisons: int = 1) -> tuple[float, float, float]:
    """Mean and t-interval, with the error divided by the number of comparisons."""
    x = np.asarray(values, float)
    half = stats.t.ppf(1 - 0.025 / comparisons, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return x.mean(), x.mean() - half, x.mean() + half


def told(values: Any, comparisons: int = 1) -> str:
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*interval(values, comparisons))


def window(losses: Mapping[float, float]) -> tuple[float, float, str]:
    """The best value, the octaves around it within NEAR (log-linear between values), and the open ends."""
    values, best = sorted(losses), min(losses, key=losses.__getitem__)
    limit, at = losses[best] + NEAR, values.index(best)

    def end(along: Sequence[float]) -> tuple[float, bool]:
        for a, b in itertools.pairwise(along):
            if losses[b] > limit:
                return a * (b / a) ** ((limit - losses[a]) / (losses[b] - losses[a])), False
        return along[-1], True

    (low, open_low), (high, open_high) = end(values[at::-1]), end(values[at:])
    return best, math.log2(high / low), "open" if open_low or open_high else "closed"


def carried(settings: Any, curves: Any, grids: Any, names: Sequence[str]) -> dict[str, Any]:
    """Arm -> (settings, seeds): test loss above the setting's best, at the constant that others choose."""
    best = {s: min((v.mean(), t.mean()) for arm in curves for v, t in curves[arm][s].values()) for s in names}
    excess = {}
    for arm, grid in grids.items():
        chosen = {}
        for name in names:
            others = [s for s in names if s != name and not settings[s]["kept"]]
            regret = {g: np.mean([curves[arm][s][g][0].mean() - best[s][0] for s in others]) for g in grid}
            chosen[name] = min(grid, key=regret.__getitem__)
        excess[arm] = np.array([curves[arm][s][chosen[s]][1] - best[s][1] for s in names])
        print(f"    {arm:18} excess {excess[arm].mean():.4f}, carried {sorted(set(chosen.values()))}")
    return excess


def units() -> None:
    """One constant of each unit."""
    track = decided("units", "carry")
    settings, curves = track["settings"], {arm: {} for arm in track["arms"]}  # type: Any, Any
    losses = {(r["val_loss"], r["test_loss"]) for _, r in runs("units").values()}
    for arm, name in itertools.product(curves, settings):
        points = curves[arm][name] = {}
        for p in track["arms"][arm]["curves"][name]["points"]:
            pairs = [(p["val"][seed], p["test"][seed]) for seed in sorted(p["val"])]
            assert losses.issuperset(pairs), "a loss of the decision is that of no run"
            points[p["value"]] = np.array(pairs).T
    # what all settings share is the grid, before it grew in some of them
    grids = {arm: sorted(set.intersection(*map(set, of.values()))) for arm, of in curves.items()}
    pairs = [*itertools.combinations(grids, 2)]
    for names in ([*settings], [name for name in settings if name not in ("muon", "sgd", "lion")]):
        print(f"  {len(names)} settings, " + "with Adam alone" * (len(names) < len(settings)))
        excess = carried(settings, curves, grids, names)
        for axis, sample in ((0, "seeds"), (1, "settings")):
            of = {(a, b): (excess[a] - excess[b]).mean(axis=axis) for a, b in pairs}
            clear = [" - ".join(pair) for pair, d in of.items() if np.prod(interval(d, len(pairs))[1:]) > 0]
            print(f"    with the {sample} as the sample, corrected for {len(pairs)} pairs, clear: {clear}")
            for a, b in PAIRS:
                print(f"        {a} - {b}: {told((excess[a] - excess[b]).mean(axis=axis))}")
    floor = min((v.mean(), t.mean()) for of in curves.values() for v, t in of["muon"].values())[1]
    rates = {lr / 0.016: t.mean() - floor for lr, (_, t) in sorted(curves["lr"]["muon"].items())}
    print("  Muon's excess by rate over its usual one:", {f"{x:.2f}": f"{e:.3f}" for x, e in rates.items()})


def delta() -> None:
    """δ and the natural KL."""
    for bundle, arm in (("units", "kl_x2"), ("units", "kl_x8"), ("units_laptop", "kl_x8")):
        for name in decided(bundle, "carry")["settings"]:
            best, octaves, ends = window(curve_of(bundle, arm, name))
            print(f"  {bundle} {arm} {name}: best {best:g}, window {octaves:.2f} octaves, {ends}")
    for bundle in ("double_adam", "double_muon", "double_adam_pydoc", "double_muon_pydoc"):
        tuned: Any = defaultdict(list)
        for c in (c for c in decided(bundle, "tune", "candidates") if c["role"] == "kl"):
            tuned[c["delta_star"]].append(c["val_loss"])
        best, octaves, ends = window({d: mean(x) for d, x in tuned.items()})
        track = decided(bundle, "lr_sweep")
        print(f"  {bundle}: best {best / track['natural_kl']:.2f} × natural, {octaves:.2f} octaves, {ends}")
    swept, tried = decided("paper", "lr_sweep"), decided("paper", "calibrate")["ranked_losses"]
    natural, plain = swept["natural_kl"], (swept["val_loss"], swept["control"]["val_loss"])
    print("  paper, validation, one seed: constant rate {:.3f}, tuned schedule {:.3f}".format(*plain))
    for budget in ("tracked", "surrogate"):
        budgets = ((runs("paper")[run][0]["config"]["budget"], x) for run, x in tried.items())
        of = {b["target_kl"]: x for b, x in budgets if b["name"] == budget}
        best, octaves, ends = window(of)
        by = ", ".join(f"{d / natural:.2f} × natural {x:.3f}" for d, x in sorted(of.items()))
        print(f"    {budget}: best {best / natural:.2f} × natural, {octaves:.2f} octaves, {ends}: {by}")
    for bundle in ("mechanism", "drift", "double_muon", "paper"):
        ran = (runs(bundle)[run] for run in decided(bundle, "lr_sweep")["ranked"])  # one seed
        by = ", ".join(f"{spec['config']['optimizer']['lr']:g}: {r['kl_median']:.4f}" for spec, r in ran)
        print(f"  {bundle}, natural KL by constant rate: {by}")
    read_off()


def read_off() -> None:
    """units: the loss at 1 and 2 × a natural KL that was read at the best rate, or at a quarter."""
    settings = decided("units", "carry")["settings"]
    natural, within, ratios = defaultdict(list), defaultdict(list), []  # type: Any, Any, Any
    for (spec, result), name in itertools.product(runs("units").values(), settings):
        if spec["arm"].startswith((f"lr_{name}_", f"lr_width_{name}_")):
            natural[name, spec["config"]["optimizer"]["lr"]].append(result["kl_median"])
    for name in settings:
        plain, ebc = curve_of("units", "lr", name), curve_of("units", "kl_x8", name)
        rate, best, grid = min(plain, key=plain.__getitem__), min(ebc, key=ebc.__getitem__), sorted(ebc)
        quarter = min(plain, key=lambda lr: abs(math.log(4 * lr / rate)))
        at = {"best": mean(natural[name, rate])}
        if abs(math.log(4 * quarter / rate)) < 0.1:  # else none near a quarter was tried
            at["quarter"] = mean(natural[name, quarter])
            ratios.append(at["quarter"] / at["best"])
        print(f"  units {name}: the best δ is {best / at['best']:.2f} × natural at the best rate")
        for (title, kl), times in itertools.product(at.items(), (1, 2)):
            loss = np.interp(math.log(times * kl), np.log(grid), [ebc[d] for d in grid])
            within[times, title].append((name, round(loss - ebc[best], 3)))
    print(f"  natural at a quarter of the best rate over that at the best: {np.round(sorted(ratios), 2)}")
    for (times, title), found in within.items():
        far = {name: float(loss) for name, loss in found if loss > NEAR}
        print(
            f"  {times} × natural at the {title} rate: of {len(found)} settings more than {NEAR} off: {far}"
        )


def finals(bundle: str) -> tuple[Any, dict[str, dict[str, np.ndarray]]]:
    """The track, and arm -> loss -> by seed."""
    track, found, arms = decided(bundle, "finals"), runs(bundle), {}
    for name, arm in track["arms"].items():
        results = [found[arm["runs"][seed]][1] for seed in sorted(arm["runs"])]
        arms[name] = {key: np.array([r[key] for r in results]) for key in ("test_loss", "val_loss")}
    return track, arms


def rates() -> None:
    """The learning rate at paper scale."""
    track, arms = finals("paper")
    high, low = (arms[track["roles"][r]] for r in ("ebc_x8", "ebc_x2"))
    print(f"  paper, EBC at ×8 minus ×2, test loss: {told(high['test_loss'] - low['test_loss'])}")
    for arm, rows in decided("paper", "lr_scale")["arms"].items():
        shown = ", ".join(f"×{r['lr_scale']:g} {r['val_loss'] and round(r['val_loss'], 3)}" for r in rows)
        print(f"  paper, validation, one seed, {arm}: {shown}")


def calibrated() -> None:
    """One configuration for six workloads."""
    track = decided("calibrated", "profiles")
    methods, works = list(track["methods"]), list(track["workloads"])
    steps = np.full((len(methods), len(works), 3), math.inf)
    for (m, method), (w, work) in itertools.product(enumerate(methods), enumerate(works)):
        known = track["methods"][method]["workloads"].get(work, {}).get("steps", {})
        steps[m, w] = [known.get(seed) or math.inf for seed in "012"]

    def scores(drawn: Any) -> Any:  # (workloads, draws, 3) -> (methods, draws)
        medians = np.stack([np.median(steps[:, w][:, drawn[w]], axis=-1) for w in range(len(works))], axis=1)
        return np.clip((4 - medians / medians.min(axis=0)) / 3, 0, None).mean(axis=1)

    whole = scores(np.broadcast_to(np.arange(3), (len(works), 1, 3)))[:, 0]
    drawn = scores(np.random.default_rng(7).integers(0, 3, (len(works), 40_000, 3)))

    def paired(a: str, b: str) -> str:
        i, j = methods.index(a), methods.index(b)
        least, low, high, most = np.percentile(drawn[i] - drawn[j], [0.5, 2.5, 97.5, 99.5])
        return f"{whole[i] - whole[j]:+.3f} [{low:+.3f}, {high:+.3f}], for five [{least:+.3f}, {most:+.3f}]"

    for a, b in [*itertools.product(LIMITS, ("adamw", "nadamw")), *SCORED]:
        print(f"  {a} - {b}: {paired(a, b)}")
    for method in ("adamw", "nadamw", "lionar", *LIMITS, "muon", "soap"):
        of = np.isfinite(steps[methods.index(method)]).sum(axis=1)
        print(f"  {method}: seeds of 3 that reached: {dict(zip(works, of.tolist(), strict=True))}")
    found: Any = defaultdict(dict)
    for spec, result in runs("calibrated").values():
        method, work, point = [*spec["arm"].split("_", 2), "", ""][:3]
        if method in ("adamw", "muon", "radius") and work in CALIBRATED and spec["config"]["seed"] == 100:
            target = track["workloads"][work]["loss"]
            there = (step for step, loss, *_ in result["curve"] if loss is not None and loss <= target)
            found[method, point][work] = next(there, math.inf)
    for (method, point), of in sorted(found.items()):
        if point.startswith(("lr0p004", "lr0p008", "lr0p016", "strength0p01_")):  # horizon 1: 600 steps
            print(f"  the calibration's seed, {method} {point}: {[of[work] for work in CALIBRATED]} steps")


def noise(points: Sequence[Any]) -> float:
    """A run's noise: the better half of the points without their own and the seeds' effects."""
    known = np.array([p for p in points if np.isfinite(p).all()])
    near = known[np.argsort(known.mean(axis=1))[: max(2, math.ceil(len(known) / 2))]]
    left = near - near.mean(axis=1, keepdims=True) - near.mean(axis=0) + near.mean()
    shrunk = (1 - 1 / len(near)) * (1 - 1 / near.shape[1])  # of the variance, by what was taken out
    return float(np.median(abs(left)) / stats.norm.ppf(0.75) / math.sqrt(shrunk))


def luck(tried: Iterable[float | None], sd: float) -> float:
    """The spread of the points' losses under each one's probability of being the lowest, by simulation."""
    means = np.array([x for x in tried if x is not None] or [0.0])
    lowest = (means + sd * np.random.default_rng(3).normal(size=(200_000, len(means)))).argmin(axis=1)
    return float(means[lowest].std())


def small() -> None:
    """Smaller figures, and the luck of a choice."""
    for name, arm in finals("paper")[1].items():
        print(f"  paper, test minus validation, {name}: {(arm['test_loss'] - arm['val_loss']).mean():+.3f}")
    found, tuned = runs("double_adam_pydoc"), decided("double_adam_pydoc", "ablation")["arms"]
    pairs = zip(tuned["kl"]["runs"].values(), tuned["plain"]["runs"].values(), strict=True)  # by seed
    d = [found[a][1]["test_loss"] - found[b][1]["test_loss"] for a, b in pairs]
    print(f"  second text, Adam, KL minus schedule: {told(d)}; for four comparisons {told(d, 4)}")
    for spec, result in runs("published").values():
        if spec["config"]["stabilizer"]["name"] == "ebc" and spec["config"]["steps"] == 2000:
            print(f"  published, to the letter, seed {spec['config']['seed']}: mean c {result['c_mean']:.5f}")
    of = decided("calibrated", "profiles")["methods"]["d_adaptation"]["sensitivity"]["gpt"]["losses"]
    print(f"  D-Adaptation's LR sensitivity on the GPT: {np.mean(of) - min(of):.4f}")
    for bundle in ("paper", "ours", "published"):
        lucks(bundle)


def lucks(bundle: str) -> None:
    """The luck of each choice by the noise of test losses, as the stage finals has it, and of validation."""
    (track, arms), swept, deltas = finals(bundle), *(decided(bundle, s) for s in ("lr_sweep", "calibrate"))
    loss = {c["run_id"]: c["val_loss"] for c in decided(bundle, "lr_sweep", "candidates")}
    tried = {"baseline": [loss[r] for r in swept["ranked"]], "ebc": [*deltas["ranked_losses"].values()]}
    tried["control"] = [p["val_loss"] for p in swept["control"]["grid"]]
    chance: dict[str, dict[str, float]] = {}
    for key in ("test_loss", "val_loss"):
        sd = noise([arm[key] for arm in arms.values()])
        chance[key] = {what: round(luck(of, sd), 5) for what, of in tried.items()}
        print(f"  {bundle}: noise of {key} {sd:.4f}; luck by it: {chance[key]}")
    both = [role for role in ("ebc_x2", "ebc_x8") if role in track["roles"]]
    for role, against in itertools.product(both, ("baseline", "control")):
        d = arms[track["roles"][role]]["test_loss"] - arms[track["roles"][against]]["test_loss"]
        family, own = len(track["differences"][against]), d.var(ddof=1) / len(d)
        line = f"    {role} - {against}, for {family}: without luck {told(d, family)}"
        for key, of in chance.items():
            parts, free = [of[against] ** 2, of["ebc"] ** 2], (math.ceil(len(arms) / 2) - 1) * (len(d) - 1)
            freedom = (own + sum(parts)) ** 2 / (own**2 / (len(d) - 1) + sum(p**2 for p in parts) / free)
            half = stats.t.ppf(1 - 0.025 / family, freedom) * math.sqrt(own + sum(parts))
            line += f"; with that of {key} ±{max(half, interval(d, family)[2] - d.mean()):.4f}"
        print(line)


if __name__ == "__main__":
    for item in sys.argv[1:] or "12345":
        show = (units, delta, rates, calibrated, small)[int(item) - 1]
        print(f"{item}. {show.__doc__}")
        show()
