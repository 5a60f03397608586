"""A language model whose state lives on the unit sphere: encoder, energy, decoder, and what is minimised.

* tokens -> unit embeddings -> `encoder` -> a state s and three contexts (local, medium, global), causal
* one step down the energy from s, tied to its contexts and drawn to its nearest splats -> the settled state
* [settled; s] -> `decoder` -> logits. This path is deterministic: it is trained, audited and evaluated
* the splats follow the states by likelihood (`mle`), their score by denoising score matching, and the decoder
  meets states settled from noise, as Langevin dynamics gives them; s is detached in the first two

The energy runs in float32 outside autocast; encoder and decoder follow it (docs/ebm.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decoder import Decoder, Routing, balance_loss, router_z_loss
from .denoising import LEVELS, add_noise, r_squared, score_target, widen
from .energy import Energy, stiffness
from .soc import Pile
from .sphere import normalise, project
from .store import SplatStore
from .vmf import log_peak, mean_cosine

MEMORIES = (0.8, 0.95)  # decay per token of the medium and of the global context
FADES = 0.7  # of the window's matrices, per token
TETHERS = (10.0, 1.0, 1.0)  # of local, medium and global context, at first
PAIRS = 8
PAIR_SCALE = 0.05  # standard deviation of their weights at first

Blocks = Callable[[], nn.Module]  # makes causal blocks: (B·T, width), B -> (B·T, width)


@dataclass(frozen=True)
class ModelSettings:
    """Sizes and parts of a model; `width` and `context` are those of transformer blocks."""

    vocabulary: int
    n: int = 64
    splats: int = 1000
    neighbours: int = 16
    encoder: str = "window"
    decoder: str = "moe"
    window: int = 8
    hidden: int = 192
    experts: int = 4
    active: int = 2
    width: int = 128
    context: int = 64
    index: str = "exact"
    adapt: str = "statistics"
    kappa_min: float = 1.0
    kappa_max: float = 50.0
    levels: Sequence[float] = field(default=LEVELS)
    soc: bool = True
    soc_threshold: float = 2.0
    soc_conserved: float = 0.8


@dataclass(frozen=True, eq=False)
class Kept:
    """The state that one forward leaves for the losses, over M = B·T tokens."""

    rows: int  # B
    states: Tensor  # s, (M, n)
    contexts: Tensor  # (M, 3, n)
    settled: Tensor  # (M, n)
    neighbours: Tensor  # the K splats that act on each, (M, K) int64; K may be 0
    dropped_mass: Tensor  # the others' mean responsibility, 0-dim
    routing: Routing | None  # of the experts


class WindowEncoder(nn.Module):
    """sum_{j < m} M_j e_{t-j}, (B, T, n): at first the identity, then fading rotations.

    The context of the log-bilinear model (Mnih & Hinton 2007).
    """

    def __init__(self, n: int, window: int):
        super().__init__()
        matrices = [torch.eye(n)]
        for j in range(1, window):
            q, r = torch.linalg.qr(torch.randn(n, n))
            matrices.append(FADES**j * (q * r.diagonal().sign()))
        self.mix = nn.ParameterList([nn.Parameter(matrix) for matrix in matrices])

    def forward(self, e: Tensor) -> Tensor:
        T, m = e.shape[1], len(self.mix)
        padded = F.pad(e, (0, 0, m - 1, 0))
        shifted = torch.cat([padded[:, m - 1 - j : m - 1 - j + T] for j in range(m)], -1)  # (B, T, m·n)
        return F.linear(shifted, torch.cat(list(self.mix), 1))


class CausalBlocks(nn.Module):
    """Transformer blocks with learned positions between two linear maps: (B, T, a) -> (B, T, b)."""

    def __init__(self, inputs: int, width: int, outputs: int, context: int, blocks: Blocks):
        super().__init__()
        self.into = nn.Linear(inputs, width, bias=False)
        self.positions = nn.Embedding(context, width)
        nn.init.normal_(self.positions.weight, 0.0, 0.02)
        self.blocks = blocks()
        self.norm = nn.LayerNorm(width, bias=False)
        self.out = nn.Linear(width, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        x = self.into(x) + self.positions.weight[:T]
        rows: Tensor = self.out(self.norm(self.blocks(x.flatten(0, 1), B)))
        return rows.view(B, T, -1)


class EnergyModel(nn.Module):
    """Tokens (B, T) -> logits (B, T, V), once its `store` has splats: `store.grow` puts them among states.

    Args:
        embeddings: initial ones, (V, n), unit rows; random directions without.
        blocks: makes the blocks of a transformer encoder or decoder, where there is one.
    Raises:
        ValueError: an unknown encoder or decoder, or one of transformer blocks without `blocks`.
    """

    def __init__(
        self, settings: ModelSettings, embeddings: Tensor | None = None, blocks: Blocks | None = None
    ):
        super().__init__()
        self.settings = settings
        n, V = settings.n, settings.vocabulary
        self.embeddings = nn.Parameter(
            normalise(torch.randn(V, n)) if embeddings is None else embeddings.clone()
        )
        self.encoder = _encoder(settings, blocks)
        self.store = None
        if settings.splats:
            limits = (settings.kappa_min, settings.kappa_max)
            self.store = SplatStore(
                settings.splats, n, settings.index, settings.neighbours, *limits, settings.adapt
            )
        self.pile: Pile | None = None
        if settings.splats and settings.soc:
            self.pile = Pile(n, threshold=settings.soc_threshold, conserved=settings.soc_conserved)
        self.log_tether = nn.Parameter(torch.tensor(TETHERS).log())
        self.pair_a = nn.Parameter(normalise(torch.randn(PAIRS, n)))
        self.pair_b = nn.Parameter(normalise(torch.randn(PAIRS, n)))
        self.pair_weight = nn.Parameter(PAIR_SCALE * torch.randn(PAIRS))
        self.gains = nn.Parameter(torch.ones(len(settings.levels)))
        self.decoder = _decoder(settings, blocks)

    @property
    def pointwise(self) -> bool:
        """Tell whether a token's logits depend on its own state alone."""
        return isinstance(self.decoder, Decoder)

    @property
    def tables(self) -> list[nn.Parameter]:
        """Parameters whose rows are places that come and go: no optimizer should mix them."""
        return [] if self.store is None else [self.store.mu]

    # -- the deterministic path ------------------------------------------------------------------------------

    def forward(self, tokens: Tensor) -> Tensor:
        return self.detailed(tokens)[0]

    def detailed(self, tokens: Tensor) -> tuple[Tensor, Kept]:
        """Return the logits, the same bits as a call's, and what the losses need."""
        B = len(tokens)
        states, contexts = self.encode(tokens)
        with torch.autocast(states.device.type, enabled=False):
            energy = self.under(contexts)
            near, dropped = energy.near(states)
            settled = energy.settle(states, near=near)
        logits, routing = self.decode(settled, states, B)
        return logits.view(*tokens.shape, -1), Kept(B, states, contexts, settled, near, dropped, routing)

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode tokens (B, T) as states (B·T, n) and contexts (B·T, 3, n), float32 unit vectors."""
        e = normalise(self.embeddings)[tokens]  # (B, T, n)
        states = normalise(self.encoder(e))
        with torch.autocast(e.device.type, enabled=False):
            wide = [normalise(_decayed(e, memory)) for memory in MEMORIES]
            contexts = torch.stack([states, *wide], 2)
        return states.flatten(0, 1), contexts.flatten(0, 1)

    def decode(self, settled: Tensor, states: Tensor, rows: int) -> tuple[Tensor, Routing | None]:
        """Decode settled states and the states they came from, (M, n) each, of `rows` sequences: (M, V)."""
        u = math.sqrt(self.settings.n) * torch.cat([settled, states], -1)
        if isinstance(self.decoder, Decoder):
            logits, routing = self.decoder(u)
            return logits, routing
        return self.decoder(u.view(rows, -1, u.shape[-1])).flatten(0, 1), None

    # -- the energy ------------------------------------------------------------------------------------------

    def under(self, contexts: Tensor | None) -> Energy:
        """Return the energy of states under contexts (M, 3, n); without contexts, of splats and pairs."""
        tether = None if contexts is None else self.log_tether.exp()
        a, b = normalise(self.pair_a), normalise(self.pair_b)
        return Energy(self.store, contexts, tether, a, b, self.pair_weight)

    def splat_energy(self, x: Tensor, near: Tensor | None = None) -> Tensor:
        """Return -ln of the splats' density at x (M, n), nats, (M,). ValueError without splats."""
        if self.store is None:
            raise ValueError("a model without splats has no energy of them")
        return Energy(self.store).total(x, near)

    def energy(self, x: Tensor, contexts: Tensor) -> Tensor:
        """Return E(x | contexts) in nats, (M,)."""
        return self.under(contexts).total(x)

    def settle(self, x: Tensor, contexts: Tensor, steps: int = 1) -> Tensor:
        """Return x after `steps` that never raise E, (M, n)."""
        return self.under(contexts).settle(x, steps)

    def stiffness(self) -> float:
        """Bound the largest curvature of E, for the sampler's step."""
        kappa = self.log_tether.new_zeros(1)
        if self.store is not None:
            self.store.check_filled()
            kappa = self.store.kappa()[self.store.active]
        return stiffness(kappa, self.log_tether.exp(), self.pair_weight, self.settings.n)

    # -- the score at a noise level --------------------------------------------------------------------------

    def widened(self) -> tuple[Tensor, Tensor]:
        """Return the splats' kappa seen through each noise level, and their normalisers, (levels, N) each."""
        assert self.store is not None
        kappa = self.store.kappa()
        widened = torch.stack([widen(kappa, sigma) for sigma in self.settings.levels])
        return widened, log_peak(self.settings.n, (self.settings.n - 1) * widened.double())

    def score_at(self, x: Tensor, level: int, kappa: Tensor, peak: Tensor) -> Tensor:
        """Return the score at x (M, n) of states seen through noise; kappa, peak: a level's of `widened`."""
        assert self.store is not None
        near, _ = self.store.best(x.detach(), self.store.neighbours, kappa.detach(), peak.detach())
        terms = self.under(None).terms(x, near)
        # a product of two coordinates loses the noise's mean cosine twice
        left = mean_cosine(1 / self.settings.levels[level] ** 2) ** 2
        seen = replace(terms, kappa=kappa[near], omega=left * self.pair_weight, log_peak=peak[near])
        return self.gains[level] * project(x, seen.pull(x))


def _encoder(settings: ModelSettings, blocks: Blocks | None) -> nn.Module:
    if settings.encoder == "window":
        return WindowEncoder(settings.n, settings.window)
    if settings.encoder == "transformer":
        return _between("encoder", settings.n, settings.n, settings, blocks)
    raise ValueError(f"encoder={settings.encoder!r} is unknown; it takes window or transformer")


def _decoder(settings: ModelSettings, blocks: Blocks | None) -> nn.Module:
    inputs, V = 2 * settings.n, settings.vocabulary
    if settings.decoder == "moe":
        return Decoder(inputs, settings.hidden, V, experts=settings.experts, active=settings.active)
    if settings.decoder == "transformer":
        return _between("decoder", inputs, V, settings, blocks)
    raise ValueError(f"decoder={settings.decoder!r} is unknown; it takes moe or transformer")


def _between(
    part: str, inputs: int, outputs: int, settings: ModelSettings, blocks: Blocks | None
) -> nn.Module:
    if blocks is None:
        raise ValueError(f"{part}='transformer' needs `blocks`, which makes its blocks")
    return CausalBlocks(inputs, settings.width, outputs, settings.context, blocks)


def _decayed(e: Tensor, memory: float) -> Tensor:
    """Return sum_{j <= t} memory^(t-j) e_j along the sequence, (B, T, n)."""
    at = torch.arange(e.shape[1], device=e.device)
    lag = at[:, None] - at
    weights = torch.where(lag >= 0, memory ** lag.clamp(min=0).to(e.dtype), 0.0)
    return weights @ e


# -- what is minimised ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossWeights:
    """Weights of the parts beside the cross-entropy; a part of weight 0 is not computed."""

    mle: float = 1.0
    score: float = 0.1
    noised: float = 0.25
    balance: float = 0.01
    z: float = 0.001


@dataclass(frozen=True, eq=False)
class Draws:
    """The draws of a step's losses."""

    scored: Tensor  # which tokens' states are noised and scored, at every level, (S,) int64
    noised: Tensor  # whose states the decoder meets settled from noise, (S',) int64; whole rows for blocks
    generator: torch.Generator
    noise: str = "vmf"


@dataclass(frozen=True, eq=False)
class Scored:
    """Noised states at every level, and the model's scores of them: (S, n) each, detached."""

    x: list[Tensor]
    scores: list[Tensor]


class Objective(NamedTuple):
    """The total, 0-dim, its parts detached by name (`loss` is the mean cross-entropy, nats per token), and
    what was scored."""

    total: Tensor
    parts: dict[str, Tensor]
    scored: Scored | None


def objective(
    model: EnergyModel, logits: Tensor, targets: Tensor, forward: Kept, weights: LossWeights, draws: Draws
) -> Objective:
    """Compute what is minimised: logits (B, T, V), targets (B, T), and the forward as `detailed` left it."""
    scored = None
    total = loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    parts = {"loss": loss.detach(), "dropped_mass": forward.dropped_mass.detach()}
    n = model.settings.n

    def add(name: str, weight: float, part: Tensor) -> None:
        nonlocal total
        total = total + weight * part
        parts[name] = part.detach()

    if model.store is not None and weights.mle:
        energy = model.splat_energy(forward.states.detach(), forward.neighbours).mean()
        add("loss_mle", weights.mle, energy / (n - 1))
        parts["energy"] = energy.detach() - log_area(n)
    if model.store is not None and weights.score:
        explained, scored = explained_by_level(model, forward.states[draws.scored].detach(), draws)
        add("loss_dsm", weights.score, 1 - torch.stack(explained).mean())
        parts |= {r2_column(s): r2.detach() for s, r2 in zip(model.settings.levels, explained, strict=True)}
    if weights.noised:
        add("loss_noised", weights.noised, noised_loss(model, forward, targets, draws))
    if forward.routing is not None:
        routing = forward.routing
        add("balance", weights.balance, balance_loss(routing.indices, routing.probabilities))
        add("router_z", weights.z, router_z_loss(routing.logits))
        parts |= expert_loads(routing)
    parts["loss_total"] = total.detach()
    return Objective(total, parts, scored)


def log_area(n: int) -> float:
    """Return ln of the surface of S^(n-1): the energy of the uniform law."""
    return math.log(2) + n / 2 * math.log(math.pi) - math.lgamma(n / 2)


def r2_column(sigma: float) -> str:
    """Name the column of the share of the score explained at a level: `r2_0p05`."""
    return f"r2_{level_name(sigma)}"


def level_name(sigma: float) -> str:
    """Write a noise level for the name of a column, to its last digit: `0p05`."""
    return np.format_float_positional(sigma, trim="-").replace(".", "p")


def expert_loads(routing: Routing) -> dict[str, Tensor]:
    """Return the share of (token, place) pairs that each expert has, `load_0` and so on, and as `load_max`
    the largest share of tokens that have one expert as their first."""
    experts = range(routing.probabilities.shape[-1])
    loads = {f"load_{e}": (routing.indices == e).float().mean() for e in experts}
    first = torch.stack([(routing.indices[:, 0] == e).float().mean() for e in experts])
    return {**loads, "load_max": first.max()}


def noised_scores(
    model: EnergyModel, states: Tensor, noise: str, generator: torch.Generator
) -> Iterator[tuple[float, Tensor, Tensor, Tensor]]:
    """Yield for each level: sigma, states (S, n) noised by it, the score of that noise, and the model's."""
    kappas, peaks = model.widened()
    for level, sigma in enumerate(model.settings.levels):
        x = add_noise(states, sigma, noise, generator=generator)
        target = score_target(x, states, sigma, noise)
        yield sigma, x, target, model.score_at(x, level, kappas[level], peaks[level])


def explained_by_level(model: EnergyModel, states: Tensor, draws: Draws) -> tuple[list[Tensor], Scored]:
    """Return R² of the model's score of noised states (S, n), 0-dim for each level, and what was scored."""
    explained = []
    scored = Scored([], [])
    for _, x, target, score in noised_scores(model, states, draws.noise, draws.generator):
        explained.append(r_squared(score, target))
        scored.x.append(x)
        scored.scores.append(score.detach())
    return explained, scored


@torch.no_grad()
def score_shift(model: EnergyModel, scored: Scored) -> Tensor:
    """Return the rms of the scores' change since then over their rms, mean over the levels, 0-dim."""
    kappas, peaks = model.widened()
    shares = []
    for level, (x, before) in enumerate(zip(scored.x, scored.scores, strict=True)):
        now = model.score_at(x, level, kappas[level], peaks[level])
        shares.append((now - before).square().sum().sqrt() / before.square().sum().sqrt())
    return torch.stack(shares).mean()


def noised_loss(model: EnergyModel, forward: Kept, targets: Tensor, draws: Draws) -> Tensor:
    """Return the cross-entropy of tokens decoded from states settled from a noised start, levels in turn."""
    states = forward.states[draws.noised]
    levels = torch.tensor(model.settings.levels, device=states.device)
    sigma = levels[torch.arange(len(states), device=levels.device) % len(levels)]
    start = add_noise(states.detach(), sigma, draws.noise, generator=draws.generator)
    settled = model.settle(start, forward.contexts[draws.noised])
    rows = max(1, len(states) * forward.rows // len(forward.states))
    logits, _ = model.decode(settled, states, rows)
    return F.cross_entropy(logits.float(), targets.flatten()[draws.noised])
