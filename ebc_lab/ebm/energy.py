"""The energy of a state on the sphere, its pull and score in closed form, and settling (docs/ebm.md).

p(x) is proportional to exp(-E / T) with respect to the sphere's surface; E, in nats, is the sum of
* splats: -ln sum_k pi_k vMF(x; mu_k, kappa_k (n - 1)), a normalised mixture of bumps;
* geometric: -(n - 1) sum_l t_l c_l.x, which ties x to the contexts c_l (local, medium, global);
* compositional: -(n - 1) sum_i omega_i (a_i.x)(b_i.x), which a sum of bumps cannot say.

x is (..., n) with unit rows. Splats are shared, mu (N, n), alpha and kappa (N,), or gathered for each point,
mu (..., K, n), alpha and kappa (..., K); the log shares of gathered splats among ALL splats, `log_pi`, must
come from the caller: without them the K given are taken for the whole mixture. contexts is (..., 3, n),
tether (3,), a and b (P, n) with unit rows, omega (P,). kappa is per degree of freedom, the raw concentration
kappa (n - 1). Nothing here uses autograd, and all of it has derivatives in both modes. Half precision is
computed in float32 and autocast is off: bfloat16 is wrong by about 100 nats at n = 640.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from . import vmf
from .sphere import dot, norm, project, widened

CHUNK = 2**26  # numbers gathered at a time


def splat_logits(
    x: Tensor, mu: Tensor, log_pi: Tensor, kappa: Tensor, log_peak: Tensor | None = None
) -> Tensor:
    """Return ln pi_k + ln vMF(x; mu_k, kappa_k (n - 1)) of every splat, (M, N), or (M, K) for gathered ones.

    ln pi + log_peak - kappa (n - 1) (1 - mu.x), with the first two added in float64.
    """
    n = x.shape[-1]
    if n != mu.shape[-1]:
        raise ValueError(f"splats of {mu.shape[-1]} dimensions cannot hold points of {n}")
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(widened(x).dtype, widened(mu).dtype)
        x, mu = x.to(dtype), mu.to(dtype)
        raw = (n - 1) * widened(kappa)
        peak = vmf.log_peak(n, raw) if log_peak is None else log_peak
        offset = (log_pi.double() + peak).to(dtype)
        if mu.dim() == 2:
            less_one = linear(x, mu, x.new_full((len(mu),), -1.0))  # mu.x - 1
        else:
            less_one = _GatheredDot.apply(mu, x) - 1  # type: ignore[no-untyped-call]
        return torch.addcmul(offset, raw.to(dtype), less_one)


def _dot(mu: Tensor, x: Tensor) -> Tensor:
    return torch.matmul(x.unsqueeze(-2), mu.transpose(-1, -2)).squeeze(-2)


def _sum(weights: Tensor, mu: Tensor) -> Tensor:
    return torch.matmul(weights.unsqueeze(-2), mu).squeeze(-2)


class _Product(torch.autograd.Function):
    """A product of two tensors, of which both are saved."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


class _GatheredDot(_Product):
    """mu_k.x for gathered splats.

    The gradient is an elementwise product: torch's own, a batch of outer products, takes thrice as long on
    a CPU.
    """

    @staticmethod
    def forward(mu: Tensor, x: Tensor) -> Tensor:
        return _dot(mu, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        mu, x = ctx.saved_tensors
        return grads[0].unsqueeze(-1) * x.unsqueeze(-2), _sum(grads[0], mu)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _along(_dot, ctx.saved_tensors, tangents)


class _GatheredSum(_Product):
    """sum_k w_k mu_k for gathered splats, with the gradient as in `_GatheredDot`."""

    @staticmethod
    def forward(weights: Tensor, mu: Tensor) -> Tensor:
        return _sum(weights, mu)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        weights, mu = ctx.saved_tensors
        return _dot(mu, grads[0]), weights.unsqueeze(-1) * grads[0].unsqueeze(-2)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _along(_sum, ctx.saved_tensors, tangents)


def _along(product: Callable[[Tensor, Tensor], Tensor], factors: Any, tangents: Any) -> Tensor:
    """Return the derivative of a product along the tangents of its factors, None where one is fixed."""
    pairs = zip(tangents, factors, strict=True)
    first, second = (torch.zeros_like(factor) if tangent is None else tangent for tangent, factor in pairs)
    return product(first, factors[1]) + product(factors[0], second)


@dataclass(frozen=True, eq=False)
class Terms:
    """The tensors of one energy E(x), in the shapes above; parts whose tensors are None are left out.

    Where many points, or many steps, share them, `prepared()` takes the splats' normalisers once.
    """

    mu: Tensor
    alpha: Tensor | None
    kappa: Tensor
    contexts: Tensor | None = None
    tether: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    omega: Tensor | None = None
    log_pi: Tensor | None = None
    log_peak: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.contexts is None) != (self.tether is None):
            raise ValueError("contexts and tether come together: give both or neither")
        pairs = (self.a is None, self.b is None, self.omega is None)
        if any(pairs) and not all(pairs):
            raise ValueError("a, b and omega come together: give all three or none")

    def prepared(self) -> Terms:
        """Return the same terms with `log_pi` and `log_peak` filled in."""
        n = self.mu.shape[-1]
        peak = vmf.log_peak(n, (n - 1) * widened(self.kappa)) if self.log_peak is None else self.log_peak
        return replace(self, log_pi=self.shares(), log_peak=peak)

    def shares(self) -> Tensor:
        """Return ln pi: `log_pi` where there is one, else ln(alpha / sum alpha)."""
        if self.log_pi is not None:
            return self.log_pi
        if self.alpha is None:
            raise ValueError("the splats' shares are missing: give alpha or log_pi")
        logs = torch.log(widened(self.alpha))
        return logs - torch.logsumexp(logs, -1, keepdim=True)

    def logits(self, x: Tensor) -> Tensor:
        """Return `splat_logits`; their softmax is the probability of each splat given x."""
        return splat_logits(x, self.mu, self.shares(), self.kappa, self.log_peak)

    def total(self, x: Tensor) -> Tensor:
        """Return E(x) in nats, (M,): -ln sum_k pi_k vMF(x; mu_k, kappa_k (n - 1)) and the other parts."""
        some = self.mu.shape[-2] > 0
        energy = -torch.logsumexp(self.logits(x), -1) if some else widened(x).new_zeros(x.shape[:-1])
        if self.contexts is not None and self.tether is not None:
            energy = energy + geometric_energy(x, self.contexts, self.tether)
        if self.a is not None and self.b is not None and self.omega is not None:
            energy = energy + compositional_energy(x, self.a, self.b, self.omega)
        return energy

    def pull(self, x: Tensor) -> Tensor:
        """Return -grad E in R^n, (M, n): sum r_k kappa_k (n-1) mu_k + (n-1) sum t_l c_l + the pairs' pull."""
        n = x.shape[-1]
        logits = self.logits(x)
        with torch.autocast(x.device.type, enabled=False):
            weights = torch.softmax(logits, -1) * ((n - 1) * self.kappa).to(logits.dtype)
            weighted = torch.matmul if self.mu.dim() == 2 else _GatheredSum.apply
            pull: Tensor = weighted(weights, self.mu.to(logits.dtype))
            if self.contexts is not None and self.tether is not None:
                pull = pull + (n - 1) * _tethered(self.contexts, self.tether)
            if self.a is not None and self.b is not None and self.omega is not None:
                pull = pull + _pair_pull(x.to(logits.dtype), self.a, self.b, self.omega)
            return pull

    def score(self, x: Tensor) -> Tensor:
        """Return -grad E on the sphere, (M, n): the pull's part tangent at x."""
        return project(x, self.pull(x))

    def settle(self, x: Tensor, steps: int = 1) -> Tensor:
        """Return x after `steps` of x <- normalise(pull(x) + (n - 1) sum|omega| x), (M, n).

        The shift adds a constant to -E on the sphere and makes it convex, so no step raises E: each maximises
        the tangent plane that lies below it (Journée et al., arXiv:0811.4724). Where the sum vanishes the
        point stays.
        """
        terms = self.prepared()
        n = x.shape[-1]
        shift = 0.0 if self.omega is None else (n - 1) * widened(self.omega).abs().sum()
        for _ in range(steps):
            moved = terms.pull(x) + shift * widened(x)
            length = norm(moved)
            still = length == 0
            x = torch.where(still, x, moved / torch.where(still, 1.0, length))
        return x


# -- the parts beside the splats -----------------------------------------------------------------------------


def geometric_energy(x: Tensor, contexts: Tensor, tether: Tensor) -> Tensor:
    """Return -(n - 1) sum_l t_l c_l.x, (M,); contexts (..., 3, n), tether (3,) over 0."""
    return -(x.shape[-1] - 1) * dot(_tethered(contexts, tether), widened(x)).squeeze(-1)


def compositional_energy(x: Tensor, a: Tensor, b: Tensor, omega: Tensor) -> Tensor:
    """Return -(n - 1) sum_i omega_i (a_i.x)(b_i.x), (M,); a, b (P, n) with unit rows, omega (P,)."""
    with torch.autocast(x.device.type, enabled=False):
        x = widened(x)
        products = linear(x, a.to(x.dtype)) * linear(x, b.to(x.dtype))
        return -(x.shape[-1] - 1) * torch.matmul(products, omega.to(x.dtype))


def _tethered(contexts: Tensor, tether: Tensor) -> Tensor:
    """Return sum_l t_l c_l, (..., n)."""
    return (widened(tether).unsqueeze(-1) * widened(contexts)).sum(-2)


def _pair_pull(x: Tensor, a: Tensor, b: Tensor, omega: Tensor) -> Tensor:
    """Return (n - 1) sum_i omega_i [(b_i.x) a_i + (a_i.x) b_i], (..., n)."""
    n = x.shape[-1]
    a, b, weights = a.to(x.dtype), b.to(x.dtype), (n - 1) * omega.to(x.dtype)
    return torch.matmul(weights * linear(x, b), a) + torch.matmul(weights * linear(x, a), b)


def stiffness(kappa: Tensor, tether: Tensor | None, omega: Tensor | None, n: int) -> float:
    """Bound E's largest curvature, for the sampler's step: (n - 1) (max kappa + sum t_l + sum|omega_i|)."""
    curvature = kappa.detach().max().double()
    if tether is not None:
        curvature = curvature + tether.detach().double().sum()
    if omega is not None:
        curvature = curvature + omega.detach().double().abs().sum()
    return (n - 1) * float(curvature)


# -- a store's energy ----------------------------------------------------------------------------------------


class Splats(Protocol):
    """A store of splats, as far as `Energy` reads one."""

    neighbours: int

    def best(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]: ...

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Energy:
    """E with the splats of a store, summed over the K best of each point, or without any.

    Points are (M, n), contexts (M, 3, n) or (3, n). `near` are the K splats that act on each, (M, K), as
    `near(x)` finds them, which every method does anew at every step where they are not given. At most 2^26
    numbers are gathered at a time; where that takes several chunks, backward gathers them again instead of
    keeping them.
    """

    store: Splats | None
    contexts: Tensor | None = None
    tether: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    omega: Tensor | None = None

    def near(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Find the splats that act on x, int64 (M, K), and the mean mass of those left out, NaN where an
        index cannot tell."""
        if self.store is None:
            return torch.empty(len(x), 0, dtype=torch.int64, device=x.device), x.new_zeros(())
        return self.store.best(x.detach(), self.store.neighbours)

    def total(self, x: Tensor, near: Tensor | None = None) -> Tensor:
        return self._in_chunks(Terms.total, x, near)

    def score(self, x: Tensor, near: Tensor | None = None) -> Tensor:
        return self._in_chunks(Terms.score, x, near)

    def settle(self, x: Tensor, steps: int = 1, near: Tensor | None = None) -> Tensor:
        for _ in range(steps):
            x = self._in_chunks(Terms.settle, x, near)
        return x

    def _in_chunks(self, method: Callable[[Terms, Tensor], Tensor], x: Tensor, near: Tensor | None) -> Tensor:
        def computed(x: Tensor, near: Tensor, contexts: Tensor | None) -> Tensor:
            return method(self.terms(x, near, contexts), x)

        indices = self.near(x)[0] if near is None else near
        rows = max(1, CHUNK // max(1, indices.shape[-1] * x.shape[-1]))
        if len(x) <= rows:
            return computed(x, indices, self.contexts)
        results = []
        for start in range(0, len(x), rows):
            at = slice(start, start + rows)
            contexts = self.contexts
            if contexts is not None and contexts.dim() == 3:
                contexts = contexts[at]
            arguments = (x[at], indices[at], contexts)
            results.append(checkpoint(computed, *arguments, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(results)

    def terms(self, x: Tensor, near: Tensor, contexts: Tensor | None = None) -> Terms:
        """Return the tensors of the energy of points whose splats are `near`."""
        if self.store is None:
            nothing = widened(x).new_empty(near.shape)  # (M, 0)
            splats = (nothing.unsqueeze(-1).expand(*near.shape, x.shape[-1]), nothing, nothing, nothing)
        else:
            splats = self.store.gather(near)
        mu, log_pi, kappa, log_peak = splats
        return Terms(mu, None, kappa, contexts, self.tether, self.a, self.b, self.omega, log_pi, log_peak)
