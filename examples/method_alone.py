"""Thirty steps of the method, as a user would write them.

`make package` runs this where torch is installed and nothing else that the lab needs, and checks it with
mypy --strict against the installed package.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ebc_lab.ebc
from ebc_lab.ebc import ClipSettings, EllipsotopeClip, StepStats, attach

STEPS = 30
TARGET_KL = 1e-3


def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same small language model and optimizer at every call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64))
    return model, torch.optim.Adam(model.parameters(), lr=1e-2)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Tokens and targets: each token is followed by its successor."""
    torch.manual_seed(1)
    tokens = torch.randint(64, (STEPS, 16, 40))
    return [(rows, (rows + 1) % 64) for rows in tokens]


def wrapped() -> tuple[nn.Module, StepStats]:
    """Trained by `EllipsotopeClip.step`."""
    model, base = fresh()
    optimizer = EllipsotopeClip(model, base, settings=ClipSettings(target_kl=TARGET_KL), probe_sequences=8)
    for tokens, targets in batches():
        logits: Tensor = model(tokens)
        cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        stats = optimizer.step(tokens, logits)
        optimizer.zero_grad()
    return model, stats


def attached() -> tuple[nn.Module, StepStats | None]:
    """Trained by its own optimizer, to which the method is attached."""
    model, optimizer = fresh()
    ebc = attach(model, optimizer, target_kl=TARGET_KL, probe_sequences=8)
    for tokens, targets in batches():
        logits: Tensor = model(tokens)
        cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, ebc.last


def main() -> None:
    model, stats = wrapped()
    same, last = attached()
    c = float(stats.clip_coefficient)
    assert 0 < c < 1, c
    assert last is not None
    assert float(last.clip_coefficient) == c
    for a, b in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    print(f"{STEPS} steps, c = {c:.3f}, from {ebc_lab.ebc.__file__}")


if __name__ == "__main__":
    main()
