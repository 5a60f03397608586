"""The energy-based model again, as a slow plain transcription of docs/ebm.md: the tests compare the fast path
with it.

float64, one token at a time. Every pull is the negative gradient of an energy that is written out, every
target of a score that of the noise's own log density, every Bessel function its power series. It imports
nothing of `ebc_lab` but types, and reads of a model its parameters and buffers, by their names; the blocks
of a transformer, which are no part of that library, are called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ebc_lab.ebm.model import Draws, LossWeights, ModelSettings


# -- functions of one vector ---------------------------------------------------------------------------------


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum().sqrt()


def tangent(x: Tensor, v: Tensor) -> Tensor:
    """The part of v that is orthogonal to the unit vector x."""
    return v - (x @ v) * x


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    centred = x - x.mean()
    return weight * centred / (centred.square().mean() + 1e-5).sqrt()


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def mean_cosine(kappa: Tensor | float) -> Tensor:
    kappa = torch.as_tensor(kappa, dtype=torch.float64)
    return 2 * kappa / (1 + (1 + 4 * kappa**2).sqrt())


def log_density_factor(n: int, raw: Tensor) -> Tensor:
    """ln C_n(K) of vMF densities C_n(K) exp(K mu.x), by I_v(K) = sum_m (K/2)^(2m+v) / (m! Gamma(m+v+1))."""
    order = n / 2 - 1
    m = torch.arange(2 * int(raw.detach().max()) + 200, dtype=torch.float64)
    factorials = torch.lgamma(m + 1) + torch.lgamma(m + order + 1)
    log_bessel = ((2 * m + order) * (raw / 2).log().unsqueeze(-1) - factorials).logsumexp(-1)
    return order * raw.log() - n / 2 * math.log(2 * math.pi) - log_bessel


def noise_log_density(x: Tensor, y: Tensor, sigma: float, kind: str) -> Tensor:
    """Of a noisy point x around y with respect to the sphere's surface, up to a constant, 0-dim."""
    n = len(x)
    if kind == "vmf":
        return (n - 1) / sigma**2 * (x @ y)
    angle = torch.arccos(x @ y)
    # a Gaussian of the tangent vector, over the volume element (sin t / t)^(n - 2)
    return -(n - 1) / sigma**2 * angle**2 / 2 - (n - 2) * (angle.sin() / angle).log()


def score_target(x: Tensor, y: Tensor, sigma: float, kind: str) -> Tensor:
    """The gradient of the above on the sphere at x, (n,)."""
    with torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        [slope] = torch.autograd.grad(noise_log_density(point, y.detach(), sigma, kind), point)
    return tangent(x, slope)


@dataclass(frozen=True, eq=False)
class Seen:
    """The splats as they are, or as they look through noise: N concentrations per degree of freedom, ln C_n,
    and what is left of the pairs' part."""

    kappa: Tensor
    log_factor: Tensor
    pairs: float


@dataclass(frozen=True, eq=False)
class Routed:
    """Of one token: the router's logits (E,), and the chosen experts, the likeliest first."""

    logits: Tensor
    chosen: Sequence[int]


# -- the model -----------------------------------------------------------------------------------------------


class Reference:
    """The same function of tokens and noise as `model`, at its weights; all results float64.

    `kappa_divisor`: of a curriculum of temperatures.
    """

    def __init__(self, model: nn.Module, settings: ModelSettings, kappa_divisor: float = 1.0):
        self.settings = settings
        self.modules = dict(model.named_modules())
        self.weights: dict[str, Tensor] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.weights[name] = tensor.double() if tensor.is_floating_point() else tensor
        self.tether = self.weights["log_tether"].exp()
        self.a = _unit_rows(self.weights["pair_a"])
        self.b = _unit_rows(self.weights["pair_b"])
        self.omega = self.weights["pair_weight"]
        if settings.splats:
            self.in_use = self.weights["store.active"].nonzero().flatten()
            self.mu = _unit_rows(self.weights["store.mu"][self.in_use])
            self.log_share = self._log_share()
            kappa = self._width() / kappa_divisor
            self.plain = self._seen(kappa, 1.0)
            self.levels = [self._through(kappa, sigma) for sigma in settings.levels]

    # -- splats ----------------------------------------------------------------------------------------------

    def _log_share(self) -> Tensor:
        """ln of each splat's share of alpha, (N,)."""
        if self.settings.adapt == "gradient":
            alpha = self.weights["store.log_alpha"][self.in_use].exp()
        else:
            alpha = self.weights["store.alpha"][self.in_use]
        return (alpha / alpha.sum()).log()

    def _width(self) -> Tensor:
        if self.settings.adapt == "gradient":
            kappa = self.weights["store.log_kappa"][self.in_use].exp()
        else:
            kappa = self.weights["store.concentration"][self.in_use]
        return kappa.clamp(self.settings.kappa_min, self.settings.kappa_max)

    def _seen(self, kappa: Tensor, pairs: float) -> Seen:
        return Seen(kappa, log_density_factor(self.settings.n, (self.settings.n - 1) * kappa), pairs)

    def _through(self, kappa: Tensor, sigma: float) -> Seen:
        """Seen through noise: mean cosines multiply, and a product of two coordinates has two of them."""
        kept = mean_cosine(1 / sigma**2)
        cosine = mean_cosine(kappa) * kept
        return self._seen(cosine / (1 - cosine**2), float(kept) ** 2)

    def splat_logits(self, x: Tensor, seen: Seen) -> Tensor:
        """ln of each splat's share times its density at x, (N,)."""
        raw = (self.settings.n - 1) * seen.kappa
        return self.log_share + seen.log_factor + raw * (self.mu @ x)

    def acting(self, x: Tensor, seen: Seen) -> Tensor:
        """The splats with the largest logits at x, the largest first, (K,)."""
        order = self.splat_logits(x.detach(), seen).detach().argsort(descending=True)
        return order[: self.settings.neighbours]

    def dropped_mass(self, x: Tensor) -> Tensor:
        """The responsibility of all other splats, 0-dim."""
        shares = self.splat_logits(x.detach(), self.plain).softmax(0)
        return 1 - shares[self.acting(x, self.plain)].sum()

    # -- the energy ------------------------------------------------------------------------------------------

    def splat_energy(self, x: Tensor) -> Tensor:
        """In nats, 0-dim."""
        return -self.splat_logits(x, self.plain)[self.acting(x, self.plain)].logsumexp(0)

    def energy(self, x: Tensor, contexts: Tensor | None, at: Tensor | None = None) -> Tensor:
        """E of x (n,) under its contexts (3, n), 0-dim; `at`: where the splats that act are chosen."""
        seen = self.plain if self.settings.splats else None
        return self._energy(x, contexts, x if at is None else at, seen)

    def _energy(self, x: Tensor, contexts: Tensor | None, at: Tensor, seen: Seen | None) -> Tensor:
        n = self.settings.n
        energy = x.new_zeros(())
        if seen is not None:
            energy = energy - self.splat_logits(x, seen)[self.acting(at, seen)].logsumexp(0)
        if contexts is not None:
            for tether, context in zip(self.tether, contexts, strict=True):
                energy = energy - (n - 1) * tether * (context @ x)
        for omega, a, b in zip(self.omega, self.a, self.b, strict=True):
            left = 1.0 if seen is None else seen.pairs
            energy = energy - (n - 1) * left * omega * (a @ x) * (b @ x)
        return energy

    def _pull(self, x: Tensor, contexts: Tensor | None, seen: Seen | None) -> Tensor:
        """-dE/dx in R^n by autograd, itself with a derivative, (n,)."""
        with torch.enable_grad():
            point = x.clone() if x.requires_grad else x.clone().requires_grad_()
            energy = self._energy(point, contexts, x, seen)
            [slope] = torch.autograd.grad(energy, point, create_graph=True)
        return -slope

    def score(self, x: Tensor, contexts: Tensor) -> Tensor:
        return tangent(x, self._pull(x, contexts, self.plain if self.settings.splats else None))

    def score_at(self, x: Tensor, level: int) -> Tensor:
        """The score of states seen through noise of a level, (n,)."""
        return self.weights["gains"][level] * tangent(x, self._pull(x, None, self.levels[level]))

    def settle(self, x: Tensor, contexts: Tensor, steps: int = 1) -> Tensor:
        shift = (self.settings.n - 1) * self.omega.abs().sum()
        for _ in range(steps):
            pull = self._pull(x, contexts, self.plain if self.settings.splats else None)
            x = unit(pull + shift * x)
        return x

    # -- encoder and decoder ---------------------------------------------------------------------------------

    def encode(self, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Tokens (B, T) -> the states (n,) and contexts (3, n) of all of them, row after row."""
        states: list[Tensor] = []
        contexts: list[Tensor] = []
        for row in tokens.tolist():
            e = [unit(self.weights["embeddings"][token]) for token in row]
            for t, state in enumerate(self._states(e)):
                states.append(state)
                contexts.append(torch.stack([state, _decayed(e, t, 0.8), _decayed(e, t, 0.95)]))
        return states, contexts

    def _states(self, e: list[Tensor]) -> list[Tensor]:
        if self.settings.encoder == "transformer":
            return [unit(x) for x in self._causal("encoder", torch.stack(e))]
        states = []
        for t in range(len(e)):
            mixed = torch.zeros_like(e[0])
            for j in range(min(self.settings.window, t + 1)):
                mixed = mixed + self.weights[f"encoder.mix.{j}"] @ e[t - j]
            states.append(unit(mixed))
        return states

    def _causal(self, part: str, x: Tensor) -> Tensor:
        """Transformer blocks over one row, (T, a) -> (T, b)."""
        x = x @ self.weights[f"{part}.into.weight"].T
        x = x + self.weights[f"{part}.positions.weight"][: len(x)]
        x = self.modules[f"{part}.blocks"](x, 1)
        normed = [layer_norm(row, self.weights[f"{part}.norm.weight"]) for row in x]
        return torch.stack(normed) @ self.weights[f"{part}.out.weight"].T

    def decode(
        self, settled: Sequence[Tensor], states: Sequence[Tensor], rows: int
    ) -> tuple[list[Tensor], list[Routed]]:
        """The logits (V,) of all tokens, and where a mixture of experts sent them."""
        u = []
        for x, s in zip(settled, states, strict=True):
            u.append(math.sqrt(self.settings.n) * torch.cat([x, s]))
        if self.settings.decoder == "transformer":
            length = len(u) // rows
            pieces = [torch.stack(u[i * length : (i + 1) * length]) for i in range(rows)]
            return [z for piece in pieces for z in self._causal("decoder", piece)], []
        found = [self._experts(x) for x in u]
        return [z for z, _ in found], [routed for _, routed in found]

    def _experts(self, u: Tensor) -> tuple[Tensor, Routed]:
        """u + the chosen experts' results by their renormalised probabilities, then norm and head."""
        w = self.weights
        h = layer_norm(u, w["decoder.norm.weight"])
        logits = w["decoder.moe.router.weight"] @ h
        likeliest = sorted(range(len(logits)), key=lambda e: -float(logits.detach()[e]))
        chosen = likeliest[: self.settings.active]
        probability = logits.softmax(0)
        whole = probability[chosen].sum()
        v = u
        for e in chosen:
            up, down = w[f"decoder.moe.experts.{e}.up.weight"], w[f"decoder.moe.experts.{e}.down.weight"]
            v = v + probability[e] / whole * (down @ gelu(up @ h))
        head = w["decoder.head.weight"] @ layer_norm(v, w["decoder.last_norm.weight"])
        return head, Routed(logits, chosen)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        states, contexts = self.encode(tokens)
        settled = [self.settle(s, c) for s, c in zip(states, contexts, strict=True)]
        logits, _ = self.decode(settled, states, len(tokens))
        return torch.stack(logits).view(*tokens.shape, -1)

    # -- what is minimised -----------------------------------------------------------------------------------

    def objective(
        self, tokens: Tensor, targets: Tensor, weights: LossWeights, draws: Draws, noisy: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total and its parts, 0-dim, by the names of their columns; `dsm_<i>` is the loss of a level.

        `noisy`: the points that stand for the states drawn, (S, n) at each level, and (S', n) that settle.
        """
        states, contexts = self.encode(tokens)
        settled = [self.settle(s, c) for s, c in zip(states, contexts, strict=True)]
        logits, routed = self.decode(settled, states, len(tokens))
        correct = targets.flatten().tolist()
        parts = {"loss": _cross_entropy(logits, correct)}
        total = parts["loss"]
        if self.settings.splats:
            fixed = [s.detach() for s in states]
            parts["dropped_mass"] = _mean([self.dropped_mass(s) for s in fixed])
            energy = _mean([self.splat_energy(s) for s in fixed])
            parts["energy"] = energy - _log_area(self.settings.n)
            parts["loss_mle"] = energy / (self.settings.n - 1)
            parts |= self._score_losses(fixed, draws, noisy)
            total = total + weights.mle * parts["loss_mle"] + weights.score * parts["loss_dsm"]
        parts["loss_noised"] = self._noised(states, contexts, correct, draws, noisy[-1], len(tokens))
        total = total + weights.noised * parts["loss_noised"]
        if routed:
            parts |= _routing_losses(routed, self.settings.experts)
            total = total + weights.balance * parts["balance"] + weights.z * parts["router_z"]
        return total, parts | {"loss_total": total}

    def _score_losses(
        self, states: Sequence[Tensor], draws: Draws, noisy: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Of each level the squared error of the score over the squared target, and their mean."""
        parts: dict[str, Tensor] = {}
        for level, sigma in enumerate(self.settings.levels):
            wrong = torch.zeros((), dtype=torch.float64)
            size = torch.zeros((), dtype=torch.float64)
            for i, x in zip(draws.scored, noisy[level].double(), strict=True):
                target = score_target(x, states[i], sigma, draws.noise)
                wrong = wrong + (self.score_at(x, level) - target).square().sum()
                size = size + target.square().sum()
            parts[f"dsm_{level}"] = wrong / size
        return parts | {"loss_dsm": _mean(list(parts.values()))}

    def _noised(
        self,
        states: Sequence[Tensor],
        contexts: Sequence[Tensor],
        correct: Sequence[int],
        draws: Draws,
        starts: Tensor,
        rows: int,
    ) -> Tensor:
        """Cross-entropy of tokens decoded from states that settled from a noised start."""
        settled = []
        noised = draws.noised.tolist()
        for i, start in zip(noised, starts.double(), strict=True):
            settled.append(self.settle(start, contexts[i]))
        whole_rows = max(1, len(noised) * rows // len(states))
        logits, _ = self.decode(settled, [states[i] for i in noised], whole_rows)
        return _cross_entropy(logits, [correct[i] for i in noised])


# -- sums over tokens ----------------------------------------------------------------------------------------


def _unit_rows(rows: Tensor) -> Tensor:
    return torch.stack([unit(row) for row in rows])


def _decayed(e: Sequence[Tensor], t: int, memory: float) -> Tensor:
    """What a fading memory holds of the tokens up to t, (n,)."""
    held = torch.zeros_like(e[0])
    for j in range(t + 1):
        held = memory * held + e[j]
    return unit(held)


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


def _cross_entropy(logits: Sequence[Tensor], correct: Sequence[int]) -> Tensor:
    pairs = zip(logits, correct, strict=True)
    return _mean([z.logsumexp(0) - z[y] for z, y in pairs])


def _log_area(n: int) -> float:
    """ln of the sphere's surface: the energy of the uniform law."""
    return math.log(2 * math.pi ** (n / 2) / math.gamma(n / 2))


def _routing_losses(routed: Sequence[Routed], experts: int) -> Mapping[str, Tensor]:
    """Balance, squared log-partition, each expert's share of all places, and the largest of first ones."""
    places = [e for token in routed for e in token.chosen]
    parts = {"router_z": _mean([token.logits.logsumexp(0) ** 2 for token in routed])}
    balance = torch.zeros((), dtype=torch.float64)
    for e in range(experts):
        share = places.count(e) / len(places)
        balance = balance + experts * share * _mean([token.logits.softmax(0)[e] for token in routed])
        parts[f"load_{e}"] = torch.tensor(share, dtype=torch.float64)
    first = [token.chosen[0] for token in routed]
    largest = max(first.count(e) for e in range(experts)) / len(first)
    return parts | {"balance": balance, "load_max": torch.tensor(largest, dtype=torch.float64)}
