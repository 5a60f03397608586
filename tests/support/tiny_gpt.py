"""Fixtures: the golden values, and a real but tiny GPT with batches of the small text to train it on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebc_lab.config.parts.model import ModelConfig
from ebc_lab.workloads.gpt import build


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    return json.loads((Path(__file__).parents[1] / "ebc/golden.json").read_text())


@pytest.fixture(scope="session")
def own_golden() -> dict[str, Any]:
    """What `golden` lacks; the file says how it was made."""
    return json.loads((Path(__file__).parents[1] / "ebc/golden_own.json").read_text())


@pytest.fixture(scope="session")
def alphabet(small_text: str) -> list[str]:
    return sorted(set(small_text))


@pytest.fixture
def make_gpt(alphabet: list[str]) -> Callable[..., nn.Module]:
    """make_gpt(dtype=..., dropout=...) -> a GPT of 2 blocks, width and context 16, the same weights."""

    def make(dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
        config = ModelConfig(**{"blocks": 2, "width": 16, "heads": 2, "context": 16, **settings})
        return build(config, len(alphabet), seed=0).to(dtype)

    return make


@pytest.fixture
def batches(small_text: str, alphabet: list[str]) -> Callable[..., list[Tensor]]:
    """batches(n, rows=8) -> n batches of (rows, 17) characters: 16 to read, the next 16 to predict."""
    index = {c: i for i, c in enumerate(alphabet)}
    ids = torch.tensor([index[c] for c in small_text])

    def draw(n: int, rows: int = 8, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(ids) - 17, (n, rows), generator=generator)
        return [ids[s[:, None] + torch.arange(17)] for s in starts]

    return draw


@pytest.fixture
def backward() -> Callable[..., Tensor]:
    """backward(model, batch) -> the training logits; gradients are in place afterwards."""

    def run(model: nn.Module, batch: Tensor) -> Tensor:
        model.zero_grad()
        logits = model(batch[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        return logits

    return run


@pytest.fixture
def train(backward: Callable[..., Tensor]) -> Callable[..., list[Any]]:
    """train(model, optimizer, batches) -> what each step returned."""

    def run(model: nn.Module, optimizer: Any, data: list[Tensor]) -> list[Any]:
        results = []
        for batch in data:
            logits = backward(model, batch)
            results.append(optimizer.step(batch[:, :-1], logits))
        return results

    return run


@pytest.fixture
def make_bases() -> Callable[[str, nn.Module], list[torch.optim.Optimizer]]:
    """make_bases(name, model) -> the plain optimizers of its parameters; `muon` has two."""

    def make(name: str, model: nn.Module) -> list[torch.optim.Optimizer]:
        parameters = list(model.parameters())
        if name == "muon":
            hidden = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
            rest = [p for p in parameters if not any(p is h for h in hidden)]
            return [torch.optim.Muon(hidden, lr=0.02), torch.optim.Adam(rest, lr=0.02)]
        kinds = {
            "adam": lambda: torch.optim.Adam(parameters, lr=0.02, fused=True),
            "adamw": lambda: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1),
            "sgd": lambda: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
        }
        return [kinds[name]()]

    return make


@pytest.fixture
def weights_of() -> Callable[[nn.Module], list[Tensor]]:
    return lambda model: [p.detach().clone() for p in model.parameters()]
