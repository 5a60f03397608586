#!/usr/bin/env bash
# bitsandbytes' Adam decouples its weight decay: with any `weight_decay` it is its AdamW, to the last bit.
#
# Guess: as in torch, and as in bitsandbytes' own SGD, RMSprop and Adagrad, Adam adds the decay to the gradient, and
# the name with the W is there for the other one.
# Seen, bitsandbytes 0.50.2 with torch 2.13.0 on a CPU: with weight_decay=0.1 Adam32bit ends with AdamW32bit's bits,
# 2e-7 from torch's AdamW and 3% of the way from torch's Adam; Adam8bit ends with AdamW8bit's. Its SGD, RMSprop and
# Adagrad add the decay to the gradient as torch's do. Whoever takes the 8-bit Adam in place of torch's Adam compares
# two kinds of decay.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
"$place/venv/bin/python" -W ignore - <<'PYTHON'
import bitsandbytes
import torch
from bitsandbytes import optim as bnb
from torch import nn, optim

torch.set_num_threads(1)
print("torch", torch.__version__, "bitsandbytes", bitsandbytes.__version__)
SHAPE = (64, 80)


def way(made, decay, **options):
    torch.manual_seed(0)
    start = torch.randn(SHAPE) / 10
    weight = nn.Parameter(start.clone())
    optimizer = made([weight], lr=0.01, weight_decay=decay, **options)
    draws = torch.Generator().manual_seed(1)
    for _ in range(20):
        weight.grad = torch.randn(SHAPE, generator=draws)
        optimizer.step()
    return weight.detach() - start


def apart(first, second):
    return float((first - second).norm() / second.norm())


assert apart(way(bnb.Adam32bit, 0.0), way(optim.Adam, 0.0)) < 1e-5
adam, adamw = way(bnb.Adam32bit, 0.1), way(bnb.AdamW32bit, 0.1)
from_adam, from_adamw = apart(adam, way(optim.Adam, 0.1)), apart(adam, way(optim.AdamW, 0.1))
print(f"Adam32bit, decay 0.1: {from_adam:.0e} from torch's Adam, {from_adamw:.0e} from torch's AdamW")
print("the bits of AdamW32bit:", torch.equal(adam, adamw))
eight = torch.equal(way(bnb.Adam8bit, 0.1), way(bnb.AdamW8bit, 0.1))
print("Adam8bit has the bits of AdamW8bit:", eight)
assert torch.equal(adam, adamw) and eight
assert from_adamw < 1e-5 < 5e-3 < from_adam
for ours, theirs, options in (
    (bnb.SGD32bit, optim.SGD, {"momentum": 0.9}),
    (bnb.RMSprop32bit, optim.RMSprop, {}),
    (bnb.Adagrad32bit, optim.Adagrad, {}),
):
    far = apart(way(ours, 0.1, **options), way(theirs, 0.1, **options))
    print(f"{ours.__name__}, decay 0.1: {far:.0e} from torch's")
    assert far < 1e-5
PYTHON
