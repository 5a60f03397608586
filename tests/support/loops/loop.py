"""`Loop`: a small training loop shaped like a public one; `played` trains it under EBC and measures the KL.

The measuring is code of its own, so that EBC is not judged by itself: a loop says with `log_p` what its model
predicts, and after each step these predictions on another batch are compared at the weights before the step
and after it. Everything else that a step changes (the running means of a batch-norm) is as it is after it at
both, since EBC answers for the weights alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ebc_lab.ebc import attach

OTHERS = 10_000  # the numbers of the batches that the KL is measured on, and no loop trains on
LIMITED = 0.999  # a step with a smaller c was clipped


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One training loop, as somebody else would write it.

    Args:
        name: of what it is shaped like.
        like: what is special about it.
        build: the model, from a seed of its own.
        optimizers: those that the loop steps.
        batch: number -> batch; the same for the same number.
        step: the user's code (model, optimizers, batch, carried): forward, loss, backward, one step.
            `carried` is what the loop itself hands from step to step: a recurrent state, the number of the
            step, a GradScaler's state.
        log_p: (model, batch) -> the predictions that count, log-probabilities in float64, (N, V).
        options: what `attach` needs beside `target_kl`.
        target_kl: nats per token, so far below the natural KL that most steps are clipped.
        refused: what `attach` says without options, a regular expression; None: it does not refuse.
        quick: whether it is one of those that `make test` plays.
    """

    name: str
    like: str
    build: Callable[[], nn.Module]
    optimizers: Callable[[nn.Module], list[Optimizer]]
    batch: Callable[[int], Any]
    step: Callable[[nn.Module, list[Optimizer], Any, dict[str, Any]], None]
    log_p: Callable[[nn.Module, Any], Tensor]
    target_kl: float
    options: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    quick: bool = False


class Training:
    """A loop that is being trained; without a target, without EBC."""

    def __init__(self, loop: Loop, target_kl: float | None = None, options: dict[str, Any] | None = None):
        self.loop = loop
        self.model = loop.build()
        self.optimizers = loop.optimizers(self.model)
        self.carried: dict[str, Any] = {}
        self.number = 0
        self.ebc = None
        if target_kl is not None:
            given = loop.options if options is None else options
            self.ebc = attach(self.model, self.optimizers, target_kl=target_kl, **given)

    def step(self) -> None:
        self.loop.step(self.model, self.optimizers, self.loop.batch(self.number), self.carried)
        self.number += 1

    def steps(self, count: int) -> Training:
        for _ in range(count):
            self.step()
        return self

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint of this loop holds."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "carried": self.carried,
            "number": self.number,
            "random": torch.get_rng_state(),
        }
        return copy.deepcopy(state)

    def resume(self, state: dict[str, Any]) -> Training:
        state = copy.deepcopy(state)
        self.model.load_state_dict(state["model"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        self.carried = state["carried"]
        self.number = state["number"]
        torch.set_rng_state(state["random"])
        return self


@dataclass(frozen=True)
class Played:
    """`ratios`: KL on another batch over the target; `c`: the clip coefficient; both for each step."""

    ratios: list[float]
    c: list[float]

    def limited(self, start: int) -> list[float]:
        """Return the ratios of the clipped steps from the `start`-th on."""
        return [r for r, c in zip(self.ratios[start:], self.c[start:], strict=True) if c < LIMITED]


def played(loop: Loop, steps: int) -> Played:
    """Train a loop under EBC."""
    training = Training(loop, loop.target_kl)
    ratios = []
    c = []
    for i in range(steps):
        before = training.weights()
        training.step()
        assert training.ebc is not None
        assert training.ebc.last is not None
        c.append(float(training.ebc.last.clip_coefficient))
        ratios.append(moved(loop, training.model, before, loop.batch(OTHERS + i)) / loop.target_kl)
    return Played(ratios, c)


def moved(loop: Loop, model: nn.Module, before: dict[str, Tensor], batch: Any) -> float:
    """KL of the predictions at the weights `before` to those of now, on a batch; nats per token."""
    own = dict(model.named_parameters())
    with undisturbed(model):
        log_q = loop.log_p(model, batch)
        now = {name: p.clone() for name, p in own.items()}
        for name, p in own.items():
            p.copy_(before[name])
        log_p = loop.log_p(model, batch)
        for name, p in own.items():
            p.copy_(now[name])
    p = log_p.exp()
    assert log_p.dtype == torch.float64
    assert log_p.ndim == 2
    assert torch.allclose(p.sum(1), torch.ones(len(p), dtype=p.dtype))
    return float(torch.where(p > 0, p * (log_p - log_q), 0).sum(1).mean())


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards modes and random numbers are where they were."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
