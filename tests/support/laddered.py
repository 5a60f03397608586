"""An invented ladder: losses of a few arms on a few rungs, compared as the stage compares them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ebc_lab.study.stages import ladder
from ebc_lab.study.stages.ladder import compared
from ebc_lab.study.stages.statistics import paired
from ebc_lab.study.stages.verdict import verdict_of

SIZES = {  # rung -> width, batch, steps
    "base": (32, 8, 100),
    "wide": (64, 8, 100),
    "long": (32, 8, 200),
    "corner": (64, 16, 200),
}
NOISE = (0.0, 0.002, -0.001, 0.001)
SPEED = {
    "seeds": 4,
    "steps": 1.5,
    "steps_low": 1.25,
    "steps_high": None,
    "seconds": 1.2,
    "seconds_low": 1.1,
    "seconds_high": 1.4,
}
Losses = Mapping[str, Mapping[str, float | None]]  # arm -> rung -> mean test loss


def ladder_of(losses: Losses, pairs: Sequence[tuple[str, str]], regret: float = 0.01, **more: Any) -> Any:
    """Return a track. A loss that is infinite is that of an arm whose runs diverged; None: it could not be
    tuned there. `pairs`: those compared, all of them asked about; `regret`: of what was carried."""
    names = [name for name in SIZES if name in next(iter(losses.values()))]
    rungs = {name: _rung(name, {arm: of[name] for arm, of in losses.items()}, regret) for name in names}
    climbs = [_climb(arm, other, losses, rungs, regret) for arm, other in pairs]
    rules = {"lr": {"width": -1.0}}
    return {"reference": pairs[0][1], "rungs": rungs, "climbs": climbs, "rules": rules, "tuned": True} | more


def _rung(name: str, losses: Mapping[str, float | None], regret: float) -> Any:
    width, batch, steps = SIZES[name]
    size = {"width": width, "blocks": 2, "batch_size": batch, "steps": steps, "tokens": batch * 16 * steps}
    about = "the suite's own size" if name == "base" else f"about {name}"
    compute = 1e3 * width**2 * batch * steps
    arms = {arm: _arm(name, loss, regret) for arm, loss in losses.items()}
    return {"about": about, "shape": "", **size, "compute": compute, "arms": arms}


def _arm(rung: str, loss: float | None, regret: float) -> Any:
    base = rung == "base"
    seeds = {} if loss is None else _seeds(loss)
    known = None if loss is None or math.isinf(loss) else loss
    diverged = {"diverged": len(seeds)} if seeds and known is None else {"completed": len(seeds)}
    carried = {"lr": 0.004 if base else 0.002, "schedule": "cosine"}
    arm = {
        "point": carried if base else {"lr": 0.003, "schedule": "cosine"},
        "carried": carried,
        "trials": 0 if base else 6,
        "edges": {} if base else {"optimizer.lr": "high"},
        "luck": {"sd": 0.0, "freedom": math.inf},
        "runs": {seed: f"run_{seed}" for seed in seeds},
        "outcomes": diverged if seeds else {},
        "val_loss": known,
        "test_loss": known,
        "test_sd": None if known is None else 0.002,
        "train_s": 3.0,
        "carried_runs": {},
        "regret": None if base or known is None else paired(_seeds(known + regret), _seeds(known)),
    }
    return arm | ({"untuned": "no point that was tried there completed"} if loss is None else {})


def _seeds(loss: float | None, noise: Sequence[float] = NOISE) -> dict[str, float]:
    return {} if loss is None else {str(seed): loss + more for seed, more in enumerate(noise)}


def _climb(arm: str, other: str, losses: Losses, rungs: Any, regret: float) -> Any:
    settings: Any = {"margin": 0.01, "comparisons": 1}
    turned = {name: NOISE[nth:4] + NOISE[:nth] for nth, name in enumerate(rungs)}
    own = {name: _seeds(losses[arm][name], turned[name]) for name in rungs}
    others = {name: _seeds(losses[other][name]) for name in rungs}
    slopes = compared.slope_weights(rungs)
    climb = {
        "arm": arm,
        "reference": other,
        "asked": True,
        "rungs": {name: paired(own[name], others[name], **settings) for name in rungs},
        "carried": {
            name: paired({s: x + regret for s, x in own[name].items()}, others[name], **settings)
            for name in rungs
        },
        "speed": dict.fromkeys(rungs, SPEED),
        "lengths": {"rungs": ["base", "long"], "times": 1.6, "low": 1.4, "high": None},
        "overall": compared.contrast(compared.equal_weights([*rungs]), own, others, **settings),
        "overall_carried": None,
        "trend": slopes and compared.contrast(slopes, own, others, **settings),
        "lacking": "",
    }
    for difference in (*climb["rungs"].values(), *climb["carried"].values()):
        difference["verdict"] = verdict_of(difference)
    climb["verdict"] = verdict_of(climb["overall"]) if climb["overall"] else "undecided"
    if climb["overall"]:
        climb["overall"]["verdict"] = climb["verdict"]
    else:
        climb["lacking"] = f"nothing to compare on {', '.join(n for n in rungs if not own[n])}"
    return (
        climb | {"course": ladder._course(climb["trend"])} | {"sentence": f"{arm} against {other}, in full"}
    )
