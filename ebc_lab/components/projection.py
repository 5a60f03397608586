"""Where the hidden matrices may be: a convex set (`spectral`) or a manifold (`stiefel`); and, of a model on
the sphere, its directions (`sphere`).

On a convex set the projection acts inside the proposal: dW becomes P(W + dW) - W, and W + c·dW lies in the
set for every c. A manifold is left by scaling, so the retraction acts on W + c·dW, after c is known.
`retracts` says which of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ebc_lab.config.parts.projection import ProjectionConfig


class Projection(Protocol):
    retracts: ClassVar[bool]  # whether it acts after the update was scaled

    def __call__(self) -> None:
        """Put the weights back, in place."""


def by_shape(matrices: Sequence[Tensor]) -> list[list[Tensor]]:
    """The matrices of one shape together, in their order, so that each list can be stacked."""
    shapes: dict[tuple[int, ...], list[Tensor]] = {}
    for m in matrices:
        shapes.setdefault(tuple(m.shape), []).append(m)
    return list(shapes.values())


def norm_bound(stack: Tensor, squarings: int = 5) -> Tensor:
    """An upper bound of each matrix's operator norm in `stack` (n, a, b), to a few per cent, without an SVD.

    ||W||_2 <= ||(W W^T)^(2^k)||_F^(1/2^(k+1)), each square normalised so that it cannot overflow. -> (n,)
    """
    gram = stack @ stack.mT if stack.shape[-2] <= stack.shape[-1] else stack.mT @ stack
    log_norm = torch.zeros(len(stack), dtype=torch.float64, device=stack.device)
    power = 1.0
    for _ in range(squarings):
        size = torch.linalg.matrix_norm(gram).clamp(min=1e-30)
        log_norm += size.double().log() * power
        gram = gram / size[:, None, None]
        gram = gram @ gram
        power /= 2
    log_norm += torch.linalg.matrix_norm(gram).clamp(min=1e-30).double().log() * power
    return (log_norm / 2).exp()


class Spectral:
    """Operator norm of each hidden matrix at most `bound` times its largest initial singular value.

    The exact (Frobenius-nearest) projection clips singular values. An SVD is made only for matrices that a
    cheap upper bound does not already clear. Sedghi, Gupta & Long, arXiv:1805.10408, clip singular values so.
    """

    retracts: ClassVar[bool] = False

    def __init__(self, matrices: Sequence[Tensor], bound: float):
        self.stacks = by_shape(matrices)
        self.matrices = [m for ms in self.stacks for m in ms]
        with torch.no_grad():
            norms = [torch.linalg.matrix_norm(torch.stack(ms), ord=2) for ms in self.stacks]
            self.limits = bound * torch.cat(norms) if norms else torch.empty(0)

    @torch.no_grad()
    def __call__(self) -> None:
        if not self.matrices:
            return
        bounds = torch.cat([norm_bound(torch.stack(ms)) for ms in self.stacks])
        suspect = bounds * (1 + 1e-4) > self.limits
        for i in suspect.nonzero().flatten().tolist():  # all that the host looks at
            matrix, limit = self.matrices[i], self.limits[i]
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            clipped = (u * s.clamp(max=limit)) @ vh
            matrix.copy_(torch.where(s[0] > limit, clipped, matrix))


def svd_polar(matrix: Tensor) -> Tensor:
    """U V^T of an SVD: the orthonormal matrix nearest to `matrix` (a, b), float32 or wider."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    polar: Tensor = u @ vh
    return polar


def newton_schulz_polar(stack: Tensor, iterations: int = 12) -> tuple[Tensor, Tensor]:
    """The polar factors of `stack` (n, a, b), float32 or wider, by X <- 1.5 X - 0.5 X X^T X.

    The iteration takes a singular value x to 1.5 x - 0.5 x^3: towards 1 for 0 < x < sqrt(3), a small one by a
    factor 1.5 at a time, and close to 1 the error is squared. So a matrix whose largest may be above 1.2 is
    divided by its bound first, which changes no polar factor, and the iterations end with the first whose
    squared error is below rounding: twelve bring values from 0.03 of the largest up to 1 (Higham 1986, whose
    Newton iteration this replaces by one without inverses).

    Returns: the factors (n, a, b), and max|X^T X - I| on the short side (n,): an upper estimate where they
    ended early.
    """
    bound = norm_bound(stack)
    x = stack / torch.where(bound > 1.2, bound, 1.0).to(stack)[:, None, None]
    flip = x.shape[-2] > x.shape[-1]
    x = x.mT if flip else x  # (n, short, long)
    eye = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    tolerance = math.sqrt(torch.finfo(x.dtype).eps)
    residual = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        gram = x @ x.mT
        # the Frobenius norm: no singular value is further from 1
        residual = torch.linalg.matrix_norm(gram - eye)
        x = torch.baddbmm(x, gram, x, beta=1.5, alpha=-0.5)
        if bool((residual <= tolerance).all()):
            break
    else:
        residual = (x @ x.mT - eye).abs().amax((-2, -1))
    return (x.mT if flip else x), residual


class Stiefel:
    """Each hidden matrix W (a, b) on its Stiefel manifold: singular values s = ||W_0||_F / sqrt(min(a, b)).

    The initial weights are put there when this is made, with their Frobenius norm kept; a call retracts W to
    s times its polar factor, the nearest point of the manifold, which agrees with W + t·xi to first order in
    t for tangent xi (Absil & Malick 2012). A matrix on which Newton-Schulz does not converge, being nearly
    singular, gets an SVD. Low-precision weights are computed in float32.
    """

    retracts: ClassVar[bool] = True

    @torch.no_grad()
    def __init__(self, matrices: Sequence[Tensor]):
        self.stacks = by_shape(matrices)
        self.sizes = []  # s of each matrix, (n, 1, 1)
        for ms in self.stacks:
            stack = _at_least_float32(ms)
            s = torch.linalg.matrix_norm(stack, keepdim=True) / math.sqrt(min(stack.shape[1:]))
            self.sizes.append(s)
            torch._foreach_copy_(ms, list(s * svd_polar(stack)))

    @torch.no_grad()
    def __call__(self) -> None:
        for matrices, s in zip(self.stacks, self.sizes, strict=True):
            stack = _at_least_float32(matrices)
            polar, residual = newton_schulz_polar(stack / s)
            # non-finite weights are the caller's to refuse
            unconverged = ~(residual <= 1e-3) & stack.isfinite().all(-1).all(-1)
            for i in unconverged.nonzero().flatten().tolist():
                polar[i] = svd_polar(stack[i])
            torch._foreach_copy_(matrices, list(s * polar))


def _at_least_float32(matrices: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(matrices)).to(torch.promote_types(matrices[0].dtype, torch.float32))


class Sphere:
    """Each row of these parameters a unit vector, as which it is put when this is made; a zero row stays.

    Loshchilov et al., arXiv:2410.01131, keep the vectors of all of a transformer's matrices so.
    """

    retracts: ClassVar[bool] = True

    def __init__(self, directions: Sequence[Tensor]):
        self.directions = directions
        self()

    @torch.no_grad()
    def __call__(self) -> None:
        for rows in self.directions:
            rows.div_(torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=1e-30))


Build = Callable[[Sequence[Tensor], Sequence[Tensor], ProjectionConfig], Projection | None]
PROJECTIONS: dict[str, Build] = {
    "none": lambda matrices, directions, config: None,
    "spectral": lambda matrices, directions, config: Spectral(matrices, config.bound),
    "stiefel": lambda matrices, directions, config: Stiefel(matrices),
    "sphere": lambda matrices, directions, config: Sphere(directions),
}


def build(
    matrices: Sequence[Tensor], config: ProjectionConfig, directions: Sequence[Tensor] = ()
) -> Projection | None:
    """The projection of a model's hidden matrices, or of the parameters whose rows are directions, built
    while they hold their initial values; or None.

    `stiefel` and `sphere` move them onto their manifold, so build whatever copies the weights after them.
    """
    return PROJECTIONS[config.name](matrices, directions, config)
