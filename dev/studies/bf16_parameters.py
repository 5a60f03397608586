"""What bfloat16 parameters do to a small update: the KL of W + c·dW, stored in float32 and in bfloat16.

    python dev/studies/bf16_parameters.py [scale=laptop steps=300 optimizer.lr=4e-3 …]

Trains a plain run with the given overrides, then applies fractions c of one more update of its optimizer.
"""

from __future__ import annotations

import copy
import math
import sys

import torch

from ebc_lab.components import optimizer as optimizers
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.ebc import mean_kl
from ebc_lab.training.process import set_up_torch
from ebc_lab.workloads.batches import Batches
from ebc_lab.workloads.corpus import locate
from ebc_lab.workloads.gpt import build, hidden_matrices
from ebc_lab.workloads.losses import token_losses

SHARES = (1.0, 0.3, 0.1, 0.03, 0.01)


def main(overrides: list[str]) -> None:
    fixed = ["stabilizer=none", "dtype=float32", "threads_per_run=1", "compile=off"]
    run = run_part(compose([*fixed, *overrides], study=False))
    set_up_torch(run)
    corpus = locate(run.data)
    model = build(run.model, len(corpus.vocabulary), run.seed)
    bases = optimizers.build(model, run.optimizer, hidden_matrices(model))
    batches = Batches(torch.from_numpy(corpus.tokens()["train"]), run.batch_size, run.model.context, run.seed)
    for step in range(run.steps + 1):
        if step == run.steps:
            # both start from the same W
            before = {n: p.detach().bfloat16().float() for n, p in model.named_parameters()}
            model.load_state_dict(before, strict=False)
        inputs, targets = batches.at(step)
        model.zero_grad()
        token_losses(model(inputs), targets).mean().backward()
        for base in bases:
            base.step()
    proposal = {n: p.detach() - before[n] for n, p in model.named_parameters()}

    twin = copy.deepcopy(model)

    @torch.no_grad()
    def logits(share: float, low: bool) -> torch.Tensor:
        for n, p in twin.named_parameters():
            moved = before[n] + share * proposal[n]
            p.copy_(moved.bfloat16().float() if low else moved)
        out: torch.Tensor = twin(inputs)
        return out

    z = logits(0.0, low=False)
    print(f"after {run.steps} steps at lr {run.optimizer.lr:g}, KL of W + c·dW in nats per token")
    print("     c      float32     bfloat16    ratio")
    for share in SHARES:
        exact, rounded = (float(mean_kl(z, logits(share, low))) for low in (False, True))
        ratio = exact / rounded if rounded > 0 else math.inf  # nothing is left of the update
        print(f"{share:6g} {exact:12.3g} {rounded:12.3g} {ratio:8.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
