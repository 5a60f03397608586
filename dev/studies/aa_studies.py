"""How often a study claims a difference where there is none: real ones that compare AdamW with itself.

    python dev/studies/aa_studies.py FOLDER [STUDIES] [SLOTS] [OVERRIDES…]        60 studies, 2 slots

The arms stand in a ring, and each is compared with the next two: there are half as many arms as studies. Each
is torch's AdamW, which first moves the weights half-way to another draw of theirs, one for each arm, so that
the losses of two arms differ by as much as those of two seeds. Each is tuned in all that `study=optimizers`
tunes of AdamW, and judged on the seeds that judge there. The runs of an arm are trained once, and copied into
the other studies that it is in; so the claims of studies with a common arm are not quite independent, for
which the interval allows (its variance is that of such a ring, not of as many single studies).
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from ebc_lab.config.compose import compose
from ebc_lab.config.schema import Config
from ebc_lab.study.autopilot import Listener, autopilot

OWN = '''import torch


class Twin(torch.optim.AdamW):
    """torch's AdamW, from weights of which half the variance was drawn again. `arm`: which draw."""

    def __init__(self, params, lr, arm, weight_decay=0.01, beta2=0.999):
        params = list(params)
        draw = torch.Generator().manual_seed(torch.initial_seed() % 2**31 + 1 + 10_000 * arm)
        with torch.no_grad():
            for p in params:
                if p.ndim == 2:
                    p.add_(torch.randn(p.shape, generator=draw) * p.std()).mul_(0.5**0.5)
        super().__init__(params, lr=lr, betas=(0.9, beta2), weight_decay=weight_decay, fused=True)
'''
SMALL = (  # what a study does after its answer, or beside it, is left out
    *("scale=mini", "study=optimizers", "~ablation.arms.adamw", "~ablation.arms.muon"),
    *("tune.window=false", "ablation.step_cost=false"),
)
TUNED = "optimizer.arguments."
NEXT = 2  # studies that each arm begins: with so many of the arms that follow it
# the correlation of two claims, of a and b and of a and c, by tests at 5% of losses without a difference
COMMON_ARM = 0.14


def arm(nth: int) -> str:
    """An arm of the ring as an override: tuned as AdamW is."""
    optimizer = f"{{name: twin, target: 'twin:Twin', arguments: {{arm: {nth}}}}}"
    shapes = "warmup_share: [0.1667, 0.0333, 0.3333], schedule: [trapezoid, warmup_linear, cosine, constant]"
    own = f"{TUNED}weight_decay: [0.1, 0.01, 1.0], {TUNED}beta2: [0.99, 0.95, 0.999]"
    settings = f"{{optimizer: {optimizer}, lr_schedule: {{name: trapezoid}}}}"
    grows = f"{{{TUNED}weight_decay: log}}"
    tune = f"{{lr: [2e-3, 4e-3, 8e-3], {shapes}, {own}}}"
    return f"+ablation.arms.twin_{nth}={{settings: {settings}, tune: {tune}, grows: {grows}}}"


def pair(nth: int, studies: int) -> tuple[int, int]:
    """The two arms of a study."""
    arms = math.ceil(studies / NEXT)
    further, first = divmod(nth, arms)
    return first, (first + further + 1) % arms


def study(folder: Path, first: int, second: int, overrides: Sequence[str]) -> Config:
    """The settings of a study of two arms of the ring."""
    own = (
        *(arm(first), arm(second)),
        f"ablation.reference=twin_{first}",
        f"ablation.mine.arms=[twin_{second}]",
        f"study.name=aa_{first}_{second}",
        f"output_dir={folder / 'studies'}",
    )
    return compose([*SMALL, *own, *overrides])


def answer(config: Config) -> dict[str, Any]:
    """What the study says of its second arm."""
    outcome = autopilot(config, Listener())
    [track] = outcome.study.decisions()["ablation"]["tracks"].values()
    [found] = track["answers"].values()
    return dict(found)


def interval(claims: Mapping[tuple[int, int], bool]) -> tuple[float, float]:
    """The 95% interval of the share of claims, by pair of arms: Wilson's, of as many single studies as have
    this variance. The correlation of two studies with a common arm is estimated, and COMMON_ARM at least."""
    n = len(claims)
    share = sum(claims.values()) / n
    variance = share * (1 - share)
    common = [(a, b) for a, b in itertools.permutations(claims, 2) if set(a) & set(b)]
    together = sum(claims[a] and claims[b] for a, b in common) / max(1, len(common))
    correlation = max(COMMON_ARM, (together - share**2) / variance if variance else 0.0)
    single = n / (1 + correlation * len(common) / n)
    z = float(stats.norm.ppf(0.975))
    centre = (share + z**2 / (2 * single)) / (1 + z**2 / single)
    half = z * math.sqrt(variance / single + (z / (2 * single)) ** 2) / (1 + z**2 / single)
    return max(0.0, centre - half), centre + half


def main(folder: Path, studies: int, slots: int, overrides: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "twin.py").write_text(OWN)
    os.chdir(folder)
    claims: dict[tuple[int, int], bool] = {}
    counts: Counter[str] = Counter()
    for nth in range(studies):
        arms = pair(nth, studies)
        found = answer(study(folder, *arms, [f"launcher.slots={slots}", *overrides]))
        counts[found["verdict"]] += 1
        claims[arms] = found["verdict"] in ("better", "worse")
        print(f"{nth + 1}: {found['sentence']}", flush=True)
    low, high = interval(claims)
    told = ", ".join(f"{verdict} {n}" for verdict, n in counts.most_common())
    n = sum(claims.values())
    print(f"a difference claimed in {n} of {studies} studies [{low:.1%}, {high:.1%}] ({told})")


if __name__ == "__main__":
    asked = sys.argv[1:]
    if not asked:
        sys.exit(__doc__)
    numbers = [int(a) for a in asked[1:] if a.isdigit()]
    given = [a for a in asked[1:] if not a.isdigit()]
    studies, slots = (numbers + [60, 2][len(numbers) :])[:2]
    main(Path(asked[0]).resolve(), studies, slots, given)
