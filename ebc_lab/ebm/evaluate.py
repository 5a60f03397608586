"""Measurements of a model on held-out text, and the n-gram models that its loss is held against
(docs/ebm.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .denoising import matched_r2
from .embeddings import token_ids
from .generate import Sampling, draw
from .model import EnergyModel, ModelSettings, level_name, log_area, noised_scores
from .soc import novelty
from .sphere import distance

TREND_OVER = 10  # evaluations
TREND_T = 2.0
STEADY = 0.05  # of the mean: a larger residual deviation is fluctuating

Tokens = NDArray[np.int64]
Floats = NDArray[np.float64]


def ngram_baselines(train: ArrayLike, test: ArrayLike, vocabulary: int) -> tuple[float, float]:
    """Return the unigram's and the bigram's nats per token on test[1:], with all counts from `train`.

    The unigram is add-one over the V tokens. The bigram is Witten and Bell's (1991, method C) over that
    unigram: p(w | v) = (c(v, w) + T(v)·p(w)) / (c(v) + T(v)), T(v) the number of tokens seen to follow v; the
    unigram itself where none did. Both are token ids (L,). Raises ValueError for ids outside [0, V), an empty
    `train` or a `test` of fewer than two tokens.
    """
    known = token_ids("train", train, vocabulary, least=1)
    asked = token_ids("test", test, vocabulary, least=2)
    unigram = (np.bincount(known, minlength=vocabulary) + 1) / (len(known) + vocabulary)
    before, after = asked[:-1], asked[1:]

    pairs, counts = np.unique(known[:-1] * vocabulary + known[1:], return_counts=True)
    seen = np.bincount(known[:-1], minlength=vocabulary)  # c(v), as the first of a pair
    followers = np.bincount(pairs // vocabulary, minlength=vocabulary)  # T(v)
    together = _counts_of(before * vocabulary + after, pairs, counts)
    total = seen[before] + followers[before]
    mixed = (together + followers[before] * unigram[after]) / np.maximum(total, 1)
    bigram = np.where(total > 0, mixed, unigram[after])
    return float(-np.log(unigram[after]).mean()), float(-np.log(bigram).mean())


def _counts_of(asked: Tokens, pairs: Tokens, counts: Tokens) -> Tokens:
    """Return how often each asked pair was seen; `pairs` is sorted and may be empty."""
    if not len(pairs):
        return np.zeros_like(asked)
    place = np.minimum(np.searchsorted(pairs, asked), len(pairs) - 1)
    return np.where(pairs[place] == asked, counts[place], 0)


# -- what a model knows of held-out states -------------------------------------------------------------------


class LevelScore(NamedTuple):
    """The share of the score explained at a noise level, over held-out states."""

    sigma: float  # radians
    r2: float
    se: float  # its standard error over states
    matched: float  # what states spread like their own splats would give


@torch.no_grad()
def score_quality(
    model: EnergyModel, states: Tensor, generator: torch.Generator, noise: str = "vmf"
) -> list[LevelScore]:
    """Measure R² of the score at every level over states (M, n), noised once. ValueError without splats."""
    if model.store is None:
        raise ValueError("a model without splats has no score of its states")
    widths = model.store.width()[model.store.nearest(states, 1)[:, 0]].double()
    levels = []
    for sigma, _, exact, own in noised_scores(model, states, noise, generator):
        target, score = exact.double(), own.double()
        gained = (score * (2 * target - score)).sum(-1)
        size = target.square().sum(-1)
        r2 = gained.sum() / size.sum()
        se = (gained - r2 * size).std() / (size.mean() * math.sqrt(len(states)))
        levels.append(LevelScore(sigma, float(r2), float(se), float(matched_r2(widths, sigma).mean())))
    return levels


def held_out_names(settings: ModelSettings) -> tuple[str, ...]:
    """Name the figures of `held_out`."""
    if not settings.splats:
        return ("state_spread",)
    kinds = ("r2", "r2_se", "matched")
    levels = [f"{kind}_{level_name(sigma)}" for sigma in settings.levels for kind in kinds]
    shares = ("splat_coverage", "winners", "state_coverage", "kappa_at_limit")
    return ("state_spread", "energy", *shares, "kappa_median", *levels)


@torch.no_grad()
def held_out(
    model: EnergyModel, tokens: Tensor, generator: torch.Generator, noise: str = "vmf"
) -> dict[str, float]:
    """Measure the states of held-out tokens (B, T), by the names of `held_out_names`."""
    states, _ = model.encode(tokens)
    figures = {"state_spread": 1 - float(torch.linalg.vector_norm(states.mean(0)))}
    store = model.store
    if store is None:
        return figures
    winner = store.nearest(states, 1)[:, 0]
    angle = distance(states, store.directions()[winner])
    width = store.width()
    in_use = width[store.active]
    at_limit = (in_use <= store.kappa_min) | (in_use >= store.kappa_max)
    figures |= {
        "energy": float(model.splat_energy(states).mean()) - log_area(store.n),
        "splat_coverage": store.coverage(),
        "winners": len(set(winner.tolist())) / len(store),
        "state_coverage": float((novelty(angle, width[winner], store.n) == 0).float().mean()),
        "kappa_at_limit": float(at_limit.float().mean()),
        "kappa_median": float(in_use.median()),
    }
    for level in score_quality(model, states, generator, noise):
        name = level_name(level.sigma)
        figures |= {f"r2_{name}": level.r2, f"r2_se_{name}": level.se, f"matched_{name}": level.matched}
    return figures


@torch.no_grad()
def sampled_loss(
    model: EnergyModel,
    inputs: Tensor,
    targets: Tensor,
    sampling: Sampling,
    generator: torch.Generator,
    samples: int = 8,
) -> dict[str, float]:
    """Return losses in nats per token of inputs and targets (B, T): `settled`, without chance, and `sampled`.

    The latter is an upper bound of that of p(w) = E[p(w | x)]: it takes the logarithm of a mean over
    `samples` latents (Burda, Grosse & Salakhutdinov, arXiv:1509.00519).
    """
    B = len(inputs)
    states, contexts = model.encode(inputs)
    chosen = targets.flatten()

    def log_likelihood(latents: Tensor) -> Tensor:
        logits, _ = model.decode(latents, states, B)
        return -F.cross_entropy(logits.double(), chosen, reduction="none")

    settled = log_likelihood(model.settle(states, contexts))
    drawn = [log_likelihood(draw(model, states, contexts, sampling, generator)) for _ in range(samples)]
    mixed = torch.logsumexp(torch.stack(drawn), 0) - math.log(samples)
    return {"settled": -float(settled.mean()), "sampled": -float(mixed.mean())}


def energy_trend(energies: Sequence[float]) -> str:
    """Call energies decreasing, increasing, fluctuating or stable, by least squares over the last ten of
    them; unknown below three."""
    y = np.asarray(energies[-TREND_OVER:], dtype=float)
    if len(y) < 3 or not np.isfinite(y).all():
        return "unknown"
    at = np.arange(len(y)) - (len(y) - 1) / 2
    change = y - y[0]  # no rounding where nothing changes
    slope = float(at @ change / (at @ at))
    residual = change - change.mean() - slope * at
    deviation = math.sqrt(float(residual @ residual) / (len(y) - 2))
    if abs(slope) > TREND_T * deviation / math.sqrt(float(at @ at)) and slope != 0:
        return "decreasing" if slope < 0 else "increasing"
    return "fluctuating" if deviation > STEADY * abs(y.mean()) else "stable"
