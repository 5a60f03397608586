#!/usr/bin/env bash
# torch_optimizer's SGDW does not shrink weights: it subtracts lr * weight_decay from every one, so negative ones
# grow.
#
# Guess: each step multiplies a weight by 1 - lr * weight_decay, as timm's and pytorch_optimizer's SGDW do.
# Seen, torch_optimizer 0.3.0: with gradients of zero, lr 0.1 and weight_decay 0.1, a thousand steps take -1, 0 and 1
# to -11, -10 and -9. The others take them to -4e-5, 0 and 4e-5.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 torch_optimizer==0.3.0 pytorch_optimizer==4.1.0
"$place/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import pytorch_optimizer
import torch
import torch_optimizer
from torch import nn

print({name: version(name) for name in ("torch", "torch_optimizer", "pytorch_optimizer")})


def after(made, **options):
    weight = nn.Parameter(torch.tensor([-1.0, 0.0, 1.0]))
    optimizer = made([weight], lr=0.1, weight_decay=0.1, **options)
    for _ in range(1000):
        weight.grad = torch.zeros(3)
        optimizer.step()
    print(made.__module__, weight.tolist())
    return weight.detach()


shrunk = torch.tensor([-1.0, 0.0, 1.0]) * 0.99**1000
torch.testing.assert_close(after(pytorch_optimizer.SGDW, weight_decouple=True), shrunk, rtol=1e-3, atol=1e-9)
torch.testing.assert_close(after(torch.optim.SGD), shrunk, rtol=1e-3, atol=1e-9)
torch.testing.assert_close(after(torch_optimizer.SGDW), torch.tensor([-11.0, -10.0, -9.0]), rtol=1e-3, atol=1e-3)
PYTHON
