"""A model with its tokenizer, as programs use the two: text that goes on, and the states of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..generate import Sampling, written
from ..model import EnergyModel, log_area

MOST_TOKENS = 4096  # of an answer, and of a text whose states are asked for
MOST_STEPS = 10_000  # of a chain
SEEDS = 2**63


class TokenizerLike(Protocol):
    """Text to token ids and back; raises what it likes for a text that has none."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Writing:
    """The choices by which a text goes on. Raises ValueError for what is out of range."""

    tokens: int = 200
    temperature: float = 0.8  # of the choice among the next tokens; 0: the likeliest
    top_k: int = 0  # only the k likeliest are chosen from; 0: all
    langevin_steps: int = 20  # of a latent's chain; 0: settle only
    langevin_temperature: float = 1.0  # of that chain; 0: settle only
    seed: int = 0

    def __post_init__(self) -> None:
        _within("tokens", self.tokens, 0, MOST_TOKENS)
        _within("top_k", self.top_k, 0, SEEDS)
        _within("langevin_steps", self.langevin_steps, 0, MOST_STEPS)
        _within("seed", self.seed, 0, SEEDS - 1)
        _within("temperature", self.temperature, 0, 1e6, (int, float))
        _within("langevin_temperature", self.langevin_temperature, 0, 1e6, (int, float))


def _within(name: str, value: float, low: int, high: float, kinds: tuple[type, ...] = (int,)) -> None:
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{name} must be a {'number' if float in kinds else 'whole number'}, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must lie between {low} and {high:.10g}, not be {value}")


@dataclass(frozen=True, eq=False)
class Writer:
    """A model and its tokenizer."""

    model: EnergyModel
    tokenizer: TokenizerLike
    context: int  # tokens that the model looks back on, as in its training
    # of a latent; its steps and temperature are those of each `Writing`
    sampling: Sampling = field(default_factory=Sampling)

    def continued(self, prompt: str, writing: Writing, stop: Sequence[str] = ()) -> str:
        """Continue the prompt, up to the first of the words in `stop`; the same for the same seed.

        Raises ValueError for an empty prompt or stop word and for a chain that leaves the finite numbers,
        and what the tokenizer raises.
        """
        if "" in stop:
            raise ValueError("a stop word needs one character at least")
        sampling = replace(
            self.sampling, steps=writing.langevin_steps, temperature=writing.langevin_temperature
        )
        ids: list[int] = []
        further = written(
            self.model,
            self.tokenizer.encode(prompt),
            writing.tokens,
            context=self.context,
            temperature=writing.temperature,
            top_k=writing.top_k,
            sampling=sampling,
            seed=writing.seed,
        )
        for token in further:
            ids.append(token)
            if stop:
                text = self.tokenizer.decode(ids)
                ends = [text.index(word) for word in stop if word in text]
                if ends:
                    return text[: min(ends)]
        return self.tokenizer.decode(ids)

    @torch.no_grad()
    def states(self, text: str) -> tuple[Tensor, Tensor]:
        """Encode a text's L tokens as states (L, n) and contexts (L, 3, n), in windows of the context.

        Raises ValueError for a text of no tokens, or of too many.
        """
        ids = self.tokenizer.encode(text)
        if not 1 <= len(ids) <= MOST_TOKENS:
            raise ValueError(f"a text must have 1 to {MOST_TOKENS} tokens, not {len(ids)}")
        self.model.eval()
        tokens = torch.tensor(ids, device=self.model.embeddings.device)
        parts = [self.model.encode(window[None]) for window in torch.split(tokens, self.context)]
        return torch.cat([states for states, _ in parts]), torch.cat([contexts for _, contexts in parts])

    @torch.no_grad()
    def energies(self, text: str) -> tuple[Tensor, Tensor | None]:
        """Return E(s | contexts) of each token's state, and what the splats alone give it less what the
        uniform law would, nats, (L,) each; None without splats."""
        states, contexts = self.states(text)
        splats = None
        if self.model.store is not None:
            splats = self.model.splat_energy(states) - log_area(self.model.settings.n)
        return self.model.energy(states, contexts), splats
