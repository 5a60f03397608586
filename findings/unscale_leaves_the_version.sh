#!/usr/bin/env bash
# GradScaler.unscale_ changes gradients in place and leaves their version counter where it was.
#
# Guess: an in-place operation adds 1 to a tensor's `_version`, as mul_ does, so whoever kept the number (autograd
# itself, for saved tensors) sees that the values are others now.
# Seen, torch 2.13.0 on a CPU: the values are a quarter of what they were, the version is the same; after
# `grad.mul_(1)` it is larger by one.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$place/venv/bin/python" - <<'PYTHON'
import torch

weight = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.SGD([weight], lr=0.1)
scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
scaler.scale(weight.sum()).backward()
gradient = weight.grad
values, version = gradient.tolist(), gradient._version
scaler.unscale_(optimizer)
print("torch", torch.__version__, "|", values, "->", gradient.tolist(), "| version", version, "->", gradient._version)
assert (values, gradient.tolist()) == ([4.0] * 3, [1.0] * 3)
assert gradient._version == version
gradient.mul_(1)
assert gradient._version == version + 1
PYTHON
