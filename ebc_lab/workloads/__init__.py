"""What a run trains: a model with its data and its loss. Importing this package loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from ebc_lab.config.schema import RunConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Workload(Protocol):
    """All that training knows of what it trains."""

    tokens: dict[str, Tensor]  # each split's, (n,) int64, on the run's device
    vocabulary: int  # V
    capturable: bool  # whether a step may become a CUDA graph: nothing in it is drawn on the host

    def build(self) -> nn.Module:
        """The model, tokens (B, T) -> logits (B, T, V), on the CPU, with weights from the seed alone."""

    def forward(self, called: nn.Module, inputs: Tensor) -> Tensor:
        """Tokens (B, T) -> logits (B, T, V) in the run's precision; `called` is the model, maybe compiled."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """What is minimised, 0-dim, nats per token; targets (B, T)."""

    def matrices(self, model: nn.Module) -> list[nn.Parameter]:
        """The hidden matrices, for Muon and the projections."""


def _gpt(run: RunConfig, device: torch.device) -> Workload:
    from .corpus import check_length, locate
    from .gpt import GPTWorkload

    corpus = locate(run.data, quiet=True)
    check_length(corpus, run.model.context)
    return GPTWorkload(run, corpus, device)


WORKLOADS: dict[str, Callable[[RunConfig, torch.device], Workload]] = {"gpt": _gpt}


def load(run: RunConfig, device: torch.device) -> Workload:
    """The workload that a run names, with its text read, checked and tokenised. Raises UserError."""
    return WORKLOADS[run.model.name](run, device)
