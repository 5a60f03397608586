#!/usr/bin/env bash
# On a CPU torch's fused optimizers pair a weight's elements with its gradient's and its state's as they lie in
# memory: where the layouts differ, each weight takes the step of another, in silence.
#
# Guess: a tensor's layout is no part of its value, so plain, foreach and fused steps agree for any of them.
# Seen, torch 2.13.0 and 2.14.1: plain and foreach do. Fused Adam, AdamW, SGD and Adagrad do not, in two places that
# nobody writes by hand. A checkpoint of a contiguous model, loaded into the same model in channels_last: the state
# keeps the layout it was saved in. And a convolution over channels_last images, whose gradient from
# torch.autograd.grad (or torch.func.grad) is channels_last, put into `.grad`; backward() itself copies the weight's.
# Adam's weights end further from where they should be than those are from zero.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$place/venv/bin/python" -W ignore - <<'PYTHON'
import copy

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW

torch.set_num_threads(1)
print("torch", torch.__version__)
LAST = torch.channels_last


def trained(made, options, other, how):
    """The weight after a few steps, with or without another layout on the way."""
    torch.manual_seed(0)
    layer, images = nn.Conv2d(8, 6, 3), torch.randn(4, 8, 8, 8)
    if how == "gradient" and other:
        images = images.to(memory_format=LAST)
    optimizer = made(layer.parameters(), lr=0.01, **options)
    for step in range(10):
        if how == "checkpoint" and step == 5:
            kept = copy.deepcopy(optimizer.state_dict())
            if other:
                layer = layer.to(memory_format=LAST)
            optimizer = made(layer.parameters(), lr=0.01, **options)
            optimizer.load_state_dict(kept)
        optimizer.zero_grad()
        loss = layer(images).square().mean()
        if how == "gradient":
            for p, g in zip(layer.parameters(), torch.autograd.grad(loss, list(layer.parameters()))):
                p.grad = g
        else:
            loss.backward()
        optimizer.step()
    return layer.weight.detach().contiguous()


for how in ("checkpoint", "gradient"):
    for made in (Adam, AdamW, SGD, Adagrad):
        options = {"momentum": 0.9} if made is SGD else {}
        for way in ({"foreach": False}, {"foreach": True}, {"fused": True}):
            same, other = (trained(made, options | way, other, how) for other in (False, True))
            apart = float((same - other).norm() / same.norm())
            print(f"{how}: {made.__name__} {way}: the weights are {apart:.1e} of their norm apart")
            assert (apart > 0.01) == ("fused" in way), apart
            assert "fused" in way or apart < 1e-5
PYTHON
