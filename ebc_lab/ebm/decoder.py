"""The mixture-of-experts decoder: from a settled state to the logits of the next token (docs/ebm.md).

u + Σ g_e·expert_e(norm(u)) over the `active` most probable of `experts` experts, then norm and head.

* an expert is two matrices with a GELU between them, without biases
* gates are the chosen experts' probabilities, renormalised (Shazeer et al., arXiv:1701.06538); they carry the
  gradient to the router
* no token is dropped: rows are sorted by expert, each expert takes its own in one matrix product, and their
  results are put back. Both moves are permutations, so that forward and backward have the same bits each time
* the router works in float32 under autocast, because a rounded logit sends a token elsewhere
* a GPU waits for the host once in a forward: for the rows of each expert
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROUTER_SCALE = 0.02  # standard deviation of the router's first weights: nearly equal probabilities


class Routing(NamedTuple):
    """The routes of M tokens; `logits` and `probabilities` are (M, E), `gates` and `indices` (M, active)."""

    logits: Tensor
    gates: Tensor
    indices: Tensor
    probabilities: Tensor


def route(logits: Tensor, active: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the router's logits (M, E) into gates and int64 indices (M, active), and probabilities (M, E).

    `indices` lists the experts by falling probability, of equal ones the lower number first. `gates` are
    their probabilities divided by the sum; `probabilities` is the whole softmax. Raises ValueError unless
    1 <= active <= E.
    """
    if logits.ndim != 2:
        raise ValueError(
            f"the router's logits must be (tokens, experts), not {tuple(logits.shape)}: flatten them."
        )
    if not 1 <= active <= logits.shape[1]:
        raise ValueError(
            f"active={active} of {logits.shape[1]} experts is impossible: choose 1 to {logits.shape[1]}."
        )
    indices = logits.detach().argsort(dim=-1, descending=True, stable=True)[:, :active]
    # a softmax over the chosen is their probabilities divided by the sum, without underflow
    return logits.gather(1, indices).softmax(-1), indices, logits.softmax(-1)


def balance_loss(indices: Tensor, probabilities: Tensor) -> Tensor:
    """Return E·Σ_e f_e·P_e of one layer, 0-dim: 1 when balanced, E when one expert takes everything.

    f_e is expert e's share of all places in `indices` (M, active), P_e the mean over tokens of its
    probability in the whole softmax (M, E). The gradient flows through P alone. Fedus, Zoph & Shazeer,
    arXiv:2101.03961, equation 4, with places for tokens. Raises ValueError for no tokens.
    """
    if not indices.numel():
        raise ValueError("no token was routed, so there is no balance: give at least one.")
    experts = probabilities.shape[1]
    shares = _places(indices, experts).to(probabilities.dtype) / indices.numel()
    return experts * (shares * probabilities.mean(0)).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """Return the mean of (ln Σ_e exp z_e)² over tokens, 0-dim: keeps the router's logits (M, E) small.

    Zoph et al., arXiv:2202.08906, equation 5. Raises ValueError for no tokens.
    """
    if not logits.numel():
        raise ValueError("no token was routed, so there is no z loss: give at least one.")
    return logits.logsumexp(-1).square().mean()


def _places(indices: Tensor, experts: int) -> Tensor:
    """Count the places that went to each expert, (E,) int64; unlike bincount, a GPU does not wait for it."""
    return (indices.reshape(-1, 1) == torch.arange(experts, device=indices.device)).sum(0)


class Expert(nn.Module):
    """down(GELU(up(x))), (M, w) -> (M, w)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(x)))
        return y


class MixtureOfExperts(nn.Module):
    """`experts` experts of which each token sees `active`: u (M, w) -> (y (M, w), Routing).

    With one expert it is that expert alone: its gate is 1 and the router has no gradient. Raises ValueError
    unless 1 <= active <= experts.
    """

    def __init__(self, width_in: int, hidden: int, experts: int = 4, active: int = 2):
        super().__init__()
        if not 1 <= active <= experts:
            raise ValueError(
                f"active={active} of experts={experts} is impossible: choose 1 <= active <= experts."
            )
        if min(width_in, hidden) < 1:
            raise ValueError(f"width {width_in} and hidden {hidden} must both be at least 1.")
        self.active = active
        self.router = nn.Linear(width_in, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width_in, hidden) for _ in range(experts))
        nn.init.normal_(self.router.weight, 0.0, ROUTER_SCALE)

    def forward(self, u: Tensor) -> tuple[Tensor, Routing]:
        routing = self.routed(u)
        tokens, width = u.shape
        flat = routing.indices.reshape(-1)  # (M·active,), the places of a token side by side
        # rows sorted by expert, each expert's own in one product, and the results put back
        order = flat.argsort(stable=True)
        rows = u[:, None].expand(-1, self.active, -1).reshape(-1, width).index_select(0, order)
        parts = torch.split(rows, _places(flat, len(self.experts)).tolist())
        results = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        placed = results.index_select(0, order.argsort()).view(tokens, self.active, width)
        return (routing.gates[..., None] * placed).sum(1), routing

    def routed(self, u: Tensor) -> Routing:
        """Choose the experts of the tokens u (M, w), in float32 unless u is float64."""
        if u.ndim != 2 or u.shape[1] != self.router.in_features:
            raise ValueError(
                f"the experts take (tokens, {self.router.in_features}), not {tuple(u.shape)}: flatten it."
            )
        with torch.autocast(u.device.type, enabled=False):
            logits: Tensor = self.router(u if u.dtype == torch.float64 else u.float())
        return Routing(logits, *route(logits, self.active))


class Decoder(nn.Module):
    """u (M, w) -> (logits (M, V), Routing): v = u + moe(norm(u)), then head(last_norm(v))."""

    def __init__(self, width: int, hidden: int, vocabulary: int, experts: int = 4, active: int = 2):
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.moe = MixtureOfExperts(width, hidden, experts, active)
        self.last_norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, u: Tensor) -> tuple[Tensor, Routing]:
        change, routing = self.moe(self.norm(u))
        logits: Tensor = self.head(self.last_norm(u + change))
        return logits, routing
