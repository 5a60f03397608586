#!/usr/bin/env bash
# Under autocast torch.linalg.vecdot answers float32 vectors in bfloat16, while torch.dot and torch.vdot do not.
#
# Guess: autocast casts what becomes a matrix product (linear, matmul, einsum). A sum of products along one axis, as
# torch.dot and (x * y).sum(-1), stays float32; vecdot, documented as that sum, is in no list of autocast's operations.
# Seen, torch 2.13.0 on a CPU: linalg.vecdot calls matmul, which is cast: its result is bfloat16 and off by up to 0.4%
# of the sum's largest term. torch.dot, torch.vdot, (x * y).sum(-1) and cosine_similarity stay float32. Complex vectors,
# which matmul cannot cast, stay complex64.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$place/venv/bin/python" -W ignore - <<'PYTHON'
import torch

print("torch", torch.__version__)
torch.manual_seed(0)
x, y = torch.randn(4, 300), torch.randn(4, 300)
true = (x.double() * y.double()).sum(-1)
ways = {
    "torch.linalg.vecdot": lambda: torch.linalg.vecdot(x, y),
    "(x * y).sum(-1)": lambda: (x * y).sum(-1),
    "torch.dot": lambda: torch.stack([torch.dot(a, b) for a, b in zip(x, y)]),
    "torch.vdot": lambda: torch.stack([torch.vdot(a, b) for a, b in zip(x, y)]),
    "of complex vectors": lambda: torch.linalg.vecdot(x + 0j, y + 0j),
}
with torch.autocast("cpu", torch.bfloat16):
    found = {name: way() for name, way in ways.items()}
for name, value in found.items():
    off = float((value - true).abs().max() / true.abs().max())
    print(f"{name}: {value.dtype}, off by {off:.1e}")
assert found.pop("torch.linalg.vecdot").dtype == torch.bfloat16
assert found.pop("of complex vectors").dtype == torch.complex64
assert {value.dtype for value in found.values()} == {torch.float32}
PYTHON
