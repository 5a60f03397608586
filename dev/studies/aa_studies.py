"""How often a study claims a difference where there is none: real ones that compare Adam with itself.

    python dev/studies/aa_studies.py FOLDER [STUDIES] [same|eps|start] [OVERRIDES…]        20 studies, `start`

Each is a small `study=optimizers` at the smoke scale whose `mine` is a file of its own with torch's Adam
under another name, tuned and judged as any optimizer, with seeds of its own for tuning and for judging.
`same`: its runs are those of the reference; `eps`: another epsilon, so that rounding parts them; `start`: it
first moves the weights half-way to another draw of theirs, so that its losses differ by as much as those of
two seeds.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ebc_lab.config.compose import compose
from ebc_lab.config.schema import Config
from ebc_lab.study.autopilot import Listener, autopilot

MODES = {"same": "eps=1e-8, start=0.0", "eps": "eps=1.1e-8, start=0.0", "start": "eps=1e-8, start=0.5"}
OWN = '''import torch


class Twin(torch.optim.Adam):
    """torch's Adam; with `start`, from weights of which this share of the variance was drawn again."""

    def __init__(self, params, lr, {settings}):
        params = list(params)
        draw = torch.Generator().manual_seed(torch.initial_seed() % 2**31 + 1)
        with torch.no_grad():
            for p in params if start else ():
                if p.ndim == 2:
                    other = torch.randn(p.shape, generator=draw) * p.std()
                    p.mul_((1 - start) ** 0.5).add_(other, alpha=start**0.5)
        super().__init__(params, lr=lr, eps=eps)
'''
SMALL = (  # what a study does after its answer, or beside it, is left out
    *("scale=smoke", "study=optimizers", "mine=twin:Twin", "~ablation.arms.muon", "threads_per_run=1"),
    *("tune.window=false", "ablation.step_cost=false"),
)


def study(folder: Path, nth: int, overrides: Sequence[str]) -> Config:
    """The settings of a study: Adam and its twin alone, tuned and judged on seeds that no other has."""
    seeds = [10 * nth + k for k in range(5)]
    own = (
        f"study.name=aa_{nth}",
        f"output_dir={folder / 'studies'}",
        f"study.stage_seed={10_000 + 10 * nth}",
    )
    return compose([*SMALL, f"seeds={seeds}".replace(" ", ""), *own, *overrides])


def answer(config: Config) -> dict[str, Any]:
    """What the study says of the twin."""
    outcome = autopilot(config, Listener())
    [track] = outcome.study.decisions()["ablation"]["tracks"].values()
    found: dict[str, Any] = track["answers"]["twin"]
    return found


def main(folder: Path, studies: int, mode: str, overrides: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "twin.py").write_text(OWN.format(settings=MODES[mode]))
    os.chdir(folder)
    counts: Counter[str] = Counter()
    for nth in range(studies):
        found = answer(study(folder, nth, overrides))
        counts[found["verdict"]] += 1
        print(f"{nth + 1}: {found['sentence']}", flush=True)
    claimed = counts["better"] + counts["worse"]
    told = ", ".join(f"{verdict} {n}" for verdict, n in counts.most_common())
    print(f"{mode}: a difference claimed in {claimed} of {studies} studies ({told})")


if __name__ == "__main__":
    asked = sys.argv[1:]
    if not asked:
        sys.exit(__doc__)
    named = [a for a in asked[1:] if a in MODES]
    number = [a for a in asked[1:] if a.isdigit()]
    main(
        Path(asked[0]).resolve(),
        int(number[0]) if number else 20,
        named[0] if named else "start",
        [a for a in asked[1:] if a not in named and a not in number],
    )
