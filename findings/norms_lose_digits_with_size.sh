#!/usr/bin/env bash
# On a CPU the norm of a float32 tensor is off by more the larger it is, where its sum is exact to seven digits.
#
# Guess: get_total_norm, vector_norm and what is made of them agree with float64 to 1e-5, as sum() does, which adds in
# pairs.
# Seen, torch 2.13.0, one thread, a matrix as large as GPT-2's token embedding (50257 x 768): the 2-norm of normal
# numbers is 0.3% too small, the 1-norm 10%; x.square().sum().sqrt() and x.abs().sum() have seven digits. Equal
# numbers are worse: at a million elements the 1-norm is 1% too large. A few running totals take in one element after
# another, and what is far below a total's last digit is lost. clip_grad_norm_, normalize, pairwise_distance and
# cosine_similarity use these norms: the cosine of a tensor with itself is not 1. A dtype of float64 in vector_norm
# mends it.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$place/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.linalg import vector_norm
from torch.nn import functional as F
from torch.nn.utils import get_total_norm

torch.set_num_threads(1)
print("torch", torch.__version__)
torch.manual_seed(0)
for name, x in (
    ("a million times 0.1", torch.full((1000, 1000), 0.1)),
    ("50257 x 768 normal numbers", torch.randn(50257, 768)),
):
    flat = x.flatten()
    two, one = vector_norm(x, dtype=torch.float64), vector_norm(x, 1, dtype=torch.float64)
    off = {
        "vector_norm": vector_norm(x) / two - 1,
        "get_total_norm": get_total_norm([x]) / two - 1,
        "square().sum().sqrt()": x.square().sum().sqrt() / two - 1,
        "vector_norm of order 1": vector_norm(x, 1) / one - 1,
        "abs().sum()": x.abs().sum() / one - 1,
        "norm of normalize": vector_norm(F.normalize(flat, dim=0), dtype=torch.float64) - 1,
        "cosine with itself": F.cosine_similarity(flat, flat, dim=0) - 1,
    }
    print(name, {what: f"{float(value):.1e}" for what, value in off.items()})
    assert abs(off["square().sum().sqrt()"]) < 2e-6 and abs(off["abs().sum()"]) < 2e-6
    assert abs(off["vector_norm"]) > 2e-4 and off["vector_norm"] == off["get_total_norm"]
    assert abs(off["vector_norm of order 1"]) > 5e-3
    assert abs(off["norm of normalize"]) > 2e-4
    assert abs(off["cosine with itself"]) > 2e-4
PYTHON
