#!/usr/bin/env bash
# torch_optimizer's RAdam steps every group of parameters at the rate of the first.
#
# Guess: a group with lr = 0 stays where it is, as in torch.
# Seen, torch_optimizer 0.3.0: each step keeps its length, the rate in it, in a table by the step's number, for all
# groups; the second group finds the first one's there. With rates of 0.01 and 0 both move by the same amount. A
# layer-wise rate, a frozen head or a rate of its own for embeddings is without effect, and nothing says so. torch's
# and timm's RAdam take each group's own.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 torch_optimizer==0.3.0
"$place/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
import torch_optimizer
from torch import nn

print({name: version(name) for name in ("torch", "torch_optimizer")})


def ways(made, first, second):
    groups = [{"params": [nn.Parameter(torch.zeros(3))], "lr": lr} for lr in (first, second)]
    optimizer = made(groups)
    for _ in range(20):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(3)
        optimizer.step()
    seen = [float(group["params"][0].detach()[0]) for group in optimizer.param_groups]
    print(f"{made.__module__}: rates {first} and {second}, ways {seen}")
    return seen


one, other = ways(torch.optim.RAdam, 0.01, 0.0)
assert one < 0 and other == 0
one, other = ways(torch_optimizer.RAdam, 0.01, 0.0)
assert one < 0 and other == one
one, other = ways(torch_optimizer.RAdam, 0.0, 0.01)
assert one == other == 0
PYTHON
