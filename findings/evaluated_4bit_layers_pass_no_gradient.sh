#!/usr/bin/env bash
# On a CPU one evaluation in eval mode leaves a 4-bit layer of bitsandbytes without a gradient for what lies before it,
# also after train(), and nothing says so: adapters in front of it stop training.
#
# Guess: Linear4bit computes alike in both modes, or takes back in train() what eval() prepared.
# Seen, bitsandbytes 0.50.2 with torch 2.13.0 (CPU build, a processor with AVX-512 and bfloat16 products): two low-rank
# matrices before a frozen Linear4bit get a gradient; so they do after a forward without gradients in train mode. After
# eval(), one such forward and train() their .grad stays None, and backward() raises nothing, since a path around
# the adapters is left.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 bitsandbytes==0.50.2
"$place/venv/bin/python" -W ignore - <<'PYTHON'
from pathlib import Path

import bitsandbytes
import torch
from torch import nn

assert "avx512_bf16" in Path("/proc/cpuinfo").read_text(), "seen on processors with avx512_bf16 alone"
torch.manual_seed(0)
adapter = nn.Sequential(nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False))
frozen = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32).requires_grad_(False)
layer = nn.Sequential(adapter, frozen).to("cpu")  # packs the weight
head = nn.Linear(64, 1)
x = torch.randn(8, 64)


def gradient() -> float | None:
    layer.zero_grad()
    head(x + layer(x)).square().mean().backward()
    seen = adapter[0].weight.grad
    return None if seen is None else float(seen.norm())


print("torch", torch.__version__, "bitsandbytes", bitsandbytes.__version__)
first = gradient()
with torch.no_grad():
    layer(x)
second = gradient()
layer.eval()
with torch.no_grad():
    layer(x)
layer.train()
third = gradient()
print("gradient of an adapter at first", first, "after no_grad in train mode", second, "after eval()", third)
assert first is not None and first > 0 and second == first
assert third is None
PYTHON
