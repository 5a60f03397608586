"""Latents drawn by Langevin dynamics from a model's energy, and text written with them (docs/ebm.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .langevin import SAMPLERS, langevin, original_chain
from .model import EnergyModel


@dataclass(frozen=True)
class Sampling:
    """A latent's chain; `step` and `friction` are in units of its stiffest oscillation, see `langevin`.

    Raises ValueError for an unknown sampler, a step from 2 on (unstable), fewer than 0 steps, a friction of 0
    or below and a temperature below 0.
    """

    sampler: str = "baoab"
    steps: int = 20
    step: float = 0.25
    friction: float = 1.0
    temperature: float = 1.0  # 0: settle only

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler={self.sampler!r} is unknown; it takes {', '.join(SAMPLERS)}")
        if not 0 < self.step < 2:
            raise ValueError(f"a chain of step {self.step} is unstable: take one between 0 and 2")
        if not self.temperature >= 0:
            raise ValueError(f"a temperature must be at least 0, not {self.temperature}")
        if self.steps < 0 or not self.friction > 0:
            raise ValueError(
                f"a chain needs 0 steps or more and a friction over 0, not {self.steps} and {self.friction}"
            )


@torch.no_grad()
def draw(
    model: EnergyModel, states: Tensor, contexts: Tensor, sampling: Sampling, generator: torch.Generator
) -> Tensor:
    """Draw a latent for each state (M, n) under its contexts (M, 3, n): the end of a chain from it, settled.

    ValueError, naming the step, where energy or score is not finite.
    """
    energy, temperature = model.under(contexts), sampling.temperature
    if temperature == 0 or sampling.steps == 0:
        return energy.settle(states)
    if sampling.sampler == "original":
        chain = original_chain(energy.score, states, temperature=temperature, generator=generator)
    else:
        chain = langevin(
            energy.total,
            energy.score,
            states,
            steps=sampling.steps,
            stiffness=model.stiffness(),
            step=sampling.step,
            friction=sampling.friction,
            temperature=temperature,
            adjusted=sampling.sampler == "adjusted",
            generator=generator,
        )
    return energy.settle(chain.x)


@torch.no_grad()
def written(
    model: EnergyModel,
    prompt: Sequence[int],
    count: int,
    *,
    context: int,
    temperature: float = 0.8,
    top_k: int = 0,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yield `count` further tokens after `prompt`, one by one; the same for the same seed.

    Latents and tokens have chance of their own: other chains leave the tokens the same luck.

    Args:
        context: tokens that the model looks back on, as in its training.
        temperature: of the choice among the next tokens; 0: the likeliest.
        top_k: only the k likeliest are chosen from; 0: all.
        sampling: of the latent; None: settled, without chance.
    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, a count or top_k below 0, a temperature
            below 0.
    """
    V = model.settings.vocabulary
    if not prompt:
        raise ValueError("a prompt needs one token at least")
    if not all(0 <= token < V for token in prompt):
        raise ValueError(f"a token of the prompt lies outside the vocabulary of {V}")
    if count < 0 or top_k < 0:
        raise ValueError(f"the number of tokens and top_k must be at least 0, not {count} and {top_k}")
    if not temperature >= 0:
        raise ValueError(f"a temperature must be at least 0, not {temperature}")
    sampling = sampling or Sampling(temperature=0.0)
    device = model.embeddings.device
    of_latents, of_tokens = (torch.Generator(device).manual_seed(s) for s in (-1 - seed, seed))
    tokens = list(prompt)
    model.eval()
    for _ in range(count):
        logits = _next(model, torch.tensor([tokens[-context:]], device=device), sampling, of_latents)
        tokens.append(_chosen(logits, temperature, top_k, of_tokens))
        yield tokens[-1]


def _next(model: EnergyModel, tokens: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Return logits (V,) of the token after `tokens` (1, T); earlier positions are settled without chance."""
    states, contexts = model.encode(tokens)
    latest = draw(model, states[-1:], contexts[-1:], sampling, generator)
    if model.pointwise:
        return model.decode(latest, states[-1:], 1)[0][-1]
    settled = torch.cat([model.settle(states[:-1], contexts[:-1]), latest])
    return model.decode(settled, states, 1)[0][-1]


def _chosen(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.float() / temperature
    if 0 < top_k < len(logits):
        least = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
