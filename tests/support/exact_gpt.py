"""A small GPT of exact layers, its batches, and the golden values."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ebc_lab.verity import Grids, VerityAdam, VerityGPT, ops, weights_checksum

GOLDEN = json.loads((Path(__file__).parents[1] / "verity" / "golden.json").read_text())


def numbers(hexadecimal: list[str], *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of a golden list; of the shape given, else flat."""
    values = torch.tensor([float.fromhex(x) for x in hexadecimal], dtype=torch.float64)
    return values.to(dtype).view(shape or (-1,))


def gpt(device: str = "cpu") -> VerityGPT:
    return VerityGPT(11, 8, 16, 2, 2, torch.Generator().manual_seed(7)).to(device)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets, (4, 8) each."""
    generator = torch.Generator().manual_seed(8)
    rows = [torch.randint(0, 11, (4, 9), generator=generator) for _ in range(count)]
    return [(r[:, :-1], r[:, 1:]) for r in rows]


def trained(
    *,
    steps: int = 4,
    parts: int = 1,
    order: list[int] | None = None,
    grids: bool = True,
    spy: Callable[[float], None] = lambda loss: None,
    device: str = "cpu",
) -> str:
    """The checksum of a small GPT after some steps; `order`: of the rows; `parts`: of each batch."""
    model = gpt(device)
    optimizer = VerityAdam(model.parameters(), lr=0.01)
    sums = Grids(model) if grids else None
    for x, y in batches(steps):
        rows = order or list(range(len(x)))
        x, y = x[rows].to(device), y[rows].to(device)
        finished = False
        while not finished:
            optimizer.zero_grad()
            losses = [
                ops.cross_entropy(model(a), b) for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True)
            ]
            for loss in losses:
                loss.backward()
            finished = sums is None or sums.finish(x.numel())
        spy(float(torch.stack(losses).detach().sum()))
        optimizer.step()
    return weights_checksum(model)
