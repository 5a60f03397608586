"""The page's models and the familiar names, as typed in the first minute: one checksum of each model,
whatever the split, the order of rows, the threads, the engine, the instructions, and a stop in between."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from package import FENCE
from torch.nn import functional as F

from ebc_lab import verity
from ebc_lab.verity import VerityAdam, ops, use_engine
from ebc_lab.verity.engine import why_not_native

PAGE = (Path(__file__).parents[2] / "docs" / "verity.md").read_text()
CODE = "\n".join(body for kind, body in FENCE.findall(PAGE) if kind == "python")
STATED = re.findall(r"print\(.+\) +# ([0-9a-f]{16})$", CODE, re.MULTILINE)


@pytest.fixture(scope="module")
def page():
    """What the page's code defines and prints, by its names and `printed`."""
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(CODE, names)
    return {**names, "printed": printed.getvalue().split()}


@pytest.mark.thorough
def test_the_page_prints_what_it_says_and_the_familiar_names_are_where_they_are_looked_for(page):
    assert page["printed"][1:] == STATED
    assert len(set(STATED)) == 2
    for name in ("VerityAdam", "VLALinear", "VLALayerNorm", "VLARMSNorm", "VLAConv2d", "VLASiLU"):
        assert getattr(ops, name) is getattr(verity, name)
    assert verity.Verity is VerityAdam


@pytest.mark.thorough
def test_other_instructions_give_the_pages_checksums():
    environment = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[1:] == STATED


@pytest.mark.thorough
@pytest.mark.parametrize(("kind", "which"), [("Llama", 0), ("CNN", 1)])
@pytest.mark.parametrize(
    ("engine", "parts", "threads", "order"),
    [("eager", 1, 1, [3, 1, 0, 2, 7, 6, 4, 5]), ("eager", 4, 1, None), ("c", 2, 2, None)],
)
def test_neither_split_nor_order_nor_threads_nor_engine_changes_a_bit(
    page, kind, which, engine, parts, threads, order
):
    if engine == "c" and why_not_native():
        pytest.skip(why_not_native())
    rows = order or list(range(8))
    batches = [(x[rows], y[rows]) for x, y in page["text" if kind == "Llama" else "images"]]
    use_engine(engine)
    torch.set_num_threads(threads)
    try:
        assert page["train"](page["begun"](page[kind]()), batches, parts) == STATED[which]
    finally:
        torch.set_num_threads(1)
        use_engine("auto")


def test_threads_change_no_bit_of_what_torch_shares_among_them():
    """Tensors of more than 32,768 numbers, below which one thread does all."""

    def bits(threads):
        torch.set_num_threads(threads)
        x = torch.randn(2, 8, 72, 72, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = ops.VLAAvgPool2d(2)(ops.silu(ops.VLARMSNorm(72)(x)))
        y = ops.rotary(y.view(8 * 36, 72), 8, 2)
        y.backward(torch.ones_like(y))
        return y.detach(), x.grad

    use_engine("eager")
    try:
        assert all(map(torch.equal, bits(1), bits(2)))
    finally:
        torch.set_num_threads(1)
        use_engine("auto")


def turned(x, heads):
    """Rotary positions by torch's own cosine and sine, (B, T, heads·D) -> (B, heads, T, D) float64."""
    B, T, width = x.shape
    half = width // heads // 2
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x.view(B, T, heads, 2, half).permute(3, 0, 2, 1, 4)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def llama(model, w, tokens):
    """The page's Llama in float64, by torch's own operations."""
    B, T = tokens.shape
    x = w["embedding.weight"][tokens]
    for i, block in enumerate(model.blocks):
        at = f"blocks.{i}."
        p = {name.removeprefix(at): t for name, t in w.items() if name.startswith(at)}
        y = F.rms_norm(x, x.shape[-1:], p["norm.weight"], 1e-6)
        q, k = turned(y @ p["q.weight"].t(), block.heads), turned(y @ p["k.weight"].t(), block.kv_heads)
        v = (y @ p["v.weight"].t()).view(B, T, block.kv_heads, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + y.transpose(1, 2).flatten(2) @ p["o.weight"].t()
        y = F.rms_norm(x, x.shape[-1:], p["mlp_norm.weight"], 1e-6)
        x = x + (F.silu(y @ p["gate.weight"].t()) * (y @ p["up.weight"].t())) @ p["down.weight"].t()
    return F.rms_norm(x, x.shape[-1:], w["norm.weight"], 1e-6) @ w["head.weight"].t()


@pytest.mark.usefixtures("engine")
def test_gradients_of_the_llama_are_within_1e_5_of_float64(page):
    model = page["begun"](page["Llama"]())
    x, y = page["text"][0]
    ops.cross_entropy(model(x), y).backward()
    wide = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    F.cross_entropy(llama(model, wide, x).flatten(0, -2), y.flatten(), reduction="sum").backward()
    for name, p in model.named_parameters():
        assert (p.grad - wide[name].grad).norm() < 1e-5 * wide[name].grad.norm(), name
