"""`python -m ebc_lab.verity`: does this machine compute the bits that every other one does, and how fast?

Prints the checks of the platform, the engines, the checksums of a small GPT after four steps beside the known
ones, and the time of a larger one's step over that of a plain float32 step. Exit code 1 where something
differs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Grids, VerityAdam, VerityError, VerityGPT, check_platform, ops, use_engine, weights_checksum
from .engine import why_not_native
from .model import Block

KNOWN = {"weights": "3cde5d9cc2a3841b", "grids": "425673c39789c10e", "whole": "dbc889018df71deb"}
STEPS = 4
SHAPE = {"vocabulary": 65, "context": 64, "width": 128, "blocks": 3, "heads": 4}  # of the timed GPT
SEQUENCES = 16
ROUNDS = 7
WARM = 2  # steps before them
Step = Callable[[], None]


def small_gpt(device: str) -> VerityGPT:
    """Make a GPT of 11 tokens, 8 of them a sequence, 2 blocks of 16 features and 2 heads."""
    return VerityGPT(11, 8, 16, 2, 2, torch.Generator().manual_seed(7)).to(device)


def trained(mode: str, device: str) -> str:
    """Return the checksum of the small GPT after four steps; mode: `grids` or `whole`."""
    model = small_gpt(device)
    optimizer = VerityAdam(model.parameters(), lr=0.01)
    grids = Grids(model) if mode == "grids" else None
    generator = torch.Generator().manual_seed(8)
    for _ in range(STEPS):
        rows = torch.randint(0, 11, (4, 9), generator=generator).to(device)
        finished = False
        while not finished:
            optimizer.zero_grad()
            ops.cross_entropy(model(rows[:, :-1]), rows[:, 1:]).backward()
            finished = grids is None or grids.finish(rows[:, 1:].numel())
        optimizer.step()
    return weights_checksum(model)


def differing(device: str) -> str | None:
    """Return the first checksum that is not the known one, in words; None where all are."""
    for name, known in KNOWN.items():
        checksum = weights_checksum(small_gpt(device)) if name == "weights" else trained(name, device)
        if checksum != known:
            return f"{name}: {checksum} instead of {known}"
    return None


# -- speed ---------------------------------------------------------------------------------------------------


def plain_logits(model: VerityGPT, tokens: Tensor) -> Tensor:
    """Return what the model's weights give by torch's own operations, in the weights' precision."""
    B, T = tokens.shape
    x = model.token_embedding.weight[tokens] + model.position_embedding.weight[:T]
    for b in model.blocks:
        assert isinstance(b, Block)
        y = F.layer_norm(x, x.shape[-1:], b.attention_norm.weight)
        q, k, v = (F.linear(y, p.weight).view(B, T, b.heads, -1).transpose(1, 2) for p in (b.q, b.k, b.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + F.linear(y, b.o.weight)
        y = F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], b.mlp_norm.weight), b.mlp_in.weight))
        x = x + F.linear(y, b.mlp_out.weight)
    return F.linear(F.layer_norm(x, x.shape[-1:], model.norm.weight), model.head.weight)


def _stepping(kind: str, device: str) -> Step:
    """Make a step of the larger GPT, `plain` or with an engine."""
    model = VerityGPT(**SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    generator = torch.Generator().manual_seed(0)
    exact = kind != "plain"
    optimizer: torch.optim.Optimizer
    optimizer = VerityAdam(model.parameters()) if exact else torch.optim.Adam(model.parameters(), fused=True)
    grids = Grids(model) if exact else None
    shape = SEQUENCES, SHAPE["context"] + 1

    def step() -> None:
        rows = torch.randint(0, SHAPE["vocabulary"], shape, generator=generator).to(device)
        x, y = rows[:, :-1], rows[:, 1:]
        optimizer.zero_grad()
        if grids is None:
            F.cross_entropy(plain_logits(model, x).flatten(0, 1), y.flatten()).backward()
        else:
            use_engine(kind)
            finished = False
            while not finished:
                ops.cross_entropy(model(x), y).backward()
                finished = grids.finish(y.numel())
        optimizer.step()
        if device != "cpu":
            torch.cuda.synchronize()

    return step


def speeds(kinds: Sequence[str], device: str, rounds: int) -> dict[str, tuple[float, float]]:
    """Return by kind the median seconds of a step, and over a plain one's; all kinds take turns."""
    steps = {kind: _stepping(kind, device) for kind in kinds}
    took: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(WARM + rounds):
        for kind, step in steps.items():
            start = time.perf_counter()
            step()
            took[kind].append(time.perf_counter() - start)
    medians = {}
    for kind, seconds in took.items():
        ratios = [exact / plain for exact, plain in zip(seconds[WARM:], took["plain"][WARM:], strict=True)]
        medians[kind] = statistics.median(seconds[WARM:]), statistics.median(ratios)
    return medians


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and time this machine -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m ebc_lab.verity", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed steps of each kind")
    options = parser.parse_args(arguments)
    device = options.device
    instructions = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {instructions}, {torch.get_num_threads()} threads")
    try:
        check_platform(device)
    except VerityError as error:
        print(error)
        return 1
    print(f"platform {device}: ok")
    engines = ["eager"]
    why = "it is for the CPU" if device != "cpu" else why_not_native()
    if why:
        print(f"engine c: not available: {why}")
    else:
        engines.append("c")
    code = 0
    for engine in engines:
        use_engine(engine)
        wrong = differing(device)
        print(f"engine {engine}: checksums {'ok' if wrong is None else 'differ, ' + wrong}")
        code = code if wrong is None else 1
    for kind, (seconds, ratio) in speeds(["plain", *engines], device, options.rounds).items():
        print(f"{kind}: {1e3 * seconds:.1f} ms a step, {ratio:.2f} times plain float32")
    return code


if __name__ == "__main__":
    sys.exit(main())
