#!/usr/bin/env bash
# pytorch_optimizer's Ranger goes up the gradient in its first five steps, and its slow weights begin from there.
#
# Guess: as torch_optimizer's Ranger and torch's RAdam, which take momentum's step while the variance is unknown, or
# as RAdam of the same package, which takes none.
# Seen, pytorch_optimizer 4.1.0: where the rectification is not defined, RAdam's helper answers with a rate of -lr,
# which RAdam itself takes for "no step" and Ranger multiplies the momentum by. On a sum of squares the loss rises by
# a fifth in five steps, and is above its start until the hundredth; torch_optimizer 0.3.0's falls by a fifth.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 pytorch_optimizer==4.1.0 torch_optimizer==0.3.0
"$place/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import pytorch_optimizer
import torch
import torch_optimizer
from torch import nn

print({name: version(name) for name in ("torch", "pytorch_optimizer", "torch_optimizer")})


def losses(made):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 6))
    optimizer = made([weight], lr=0.01)
    seen = []
    for _ in range(201):
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        optimizer.step()
        seen.append(float(loss))
    print(f"{made.__module__}: loss {seen[0]:.1f}, after 5 steps {seen[5]:.1f}, 50 {seen[50]:.1f}, 200 {seen[200]:.1f}")
    return seen


for made in (torch_optimizer.Ranger, torch.optim.RAdam):
    seen = losses(made)
    assert seen[5] < 0.9 * seen[0]
seen = losses(pytorch_optimizer.RAdam)
assert seen[5] <= seen[0]
seen = losses(pytorch_optimizer.Ranger)
assert all(later > sooner for sooner, later in zip(seen[:5], seen[1:6]))
assert seen[5] > 1.1 * seen[0] and seen[50] > seen[0]
PYTHON
