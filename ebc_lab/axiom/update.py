"""The update of one tensor: factored second moments, low-rank momentum, streak, gain, step (docs/axiom.md).

A tensor of two or more dimensions whose sides m = shape[0] and n = the rest are both at least 2 is treated as
a matrix (m, n), anything else as a vector. All arithmetic and all state are float32, whatever the weights
are. Nothing here looks at another tensor: that is why an update inside backward changes no bit.

The factored moments and the clip are Adafactor's (Shazeer & Stern, arXiv:1804.04235); one step of subspace
iteration from the last factors is also how PowerSGD compresses gradients (Vogels, Karimireddy & Jaggi,
arXiv:1905.13727).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**22  # elements that are worked on at a time: 16 MiB of float32
EPSILON = 1e-30  # added to squared gradients
SMALLEST_SIZE = 1e-3  # of a tensor's rms under `relative`
LONGEST_STREAK = 8  # steps
GOLDEN_RATIO = 1.6180339887498949

State = dict[str, Any]
Shape = torch.Size | tuple[int, ...]
Part = tuple[slice, slice]  # rows and columns of a matrix
WHOLE: Part = (slice(None), slice(None))


@dataclass(frozen=True)
class Rule:
    """The settings of a step, as `AXIOM` takes them; `lr_scale` multiplies the update before its limit."""

    lr: float
    weight_decay: float
    streak_boost: float
    snr_floor: float
    rank: int
    momentum_weight: float
    relative: bool
    beta1: float
    rms_limit: float
    lr_scale: float = 1.0


def sides(shape: Shape) -> tuple[int, int] | None:
    """Return (m, n) of a tensor that is treated as a matrix; None of a vector."""
    if len(shape) < 2:
        return None
    m = shape[0]
    n = math.prod(shape[1:])
    return (m, n) if min(m, n) >= 2 else None


def state_shapes(shape: Shape, rank: int) -> dict[str, tuple[int, ...]]:
    """Map name to shape of each float32 tensor of the state of a tensor of this shape.

    `left` and `right` are the transposes of P and Q: on a CPU their products with x are several times faster.
    """
    matrix = sides(shape)
    if matrix is None:
        flat = (math.prod(shape),)
        return {"square": flat, "mean": flat} if rank else {"square": flat}
    m, n = matrix
    moments: dict[str, tuple[int, ...]] = {"row": (m,), "col": (n,)}
    r = min(rank, m, n)
    return moments | {"left": (r, m), "right": (r, n)} if rank else moments


def state_bytes(shape: Shape, rank: int) -> int:
    """Count the bytes of the tensors of that state."""
    return 4 * sum(math.prod(s) for s in state_shapes(shape, rank).values())


def compression(parameters: int, state: int, gradients: int) -> dict[str, float]:
    """Divide AdamW's bytes, 8 of float32 moments and 4 of gradient a weight, by so many bytes of each."""
    return {
        "state_compression": 8 * parameters / max(state, 1),
        "gradient_compression": 4 * parameters / max(gradients, 1),
        "total_compression": 12 * parameters / max(state + gradients, 1),
    }


def new_state(p: Tensor, rank: int) -> State:
    """Make the state of a parameter before its first step: zeros."""
    shapes = state_shapes(p.shape, rank)
    zeros = {name: torch.zeros(shape, device=p.device) for name, shape in shapes.items()}
    return {"step": 0, "streak": 0, **zeros}


def beta2_at(t: int) -> float:
    """Return the decay of the second moments at a parameter's step t, counted from 1."""
    return min(0.999, 1 - math.pow(t, -0.8))


@torch.no_grad()
def update(
    p: Tensor, g: Tensor, state: State, rule: Rule, *, scale: float = 1.0, watch: bool = False
) -> Tensor | None:
    """Move `p` by one step, and its state, with at most 64 MiB beside `g`, which stays as it is: autograd may
    need its memory for another tensor. A tensor that is not contiguous is copied, too.

    Args:
        p: the parameter, any floating dtype.
        g: its gradient, finite.
        scale: multiplies the gradient (a limit of its norm).
        watch: whether <g, dW> is measured.
    Returns:
        <g, dW>, 0-dim, of what is watched.
    """
    state["step"] += 1
    matrix = sides(p.shape)
    w = p.detach() if p.is_contiguous() else p.contiguous()
    shape = matrix or (1, p.numel())
    gradient = Gradient(g.contiguous().view(shape), scale, watch)
    if matrix is None:
        _vector(w.view(shape), gradient, state, rule)
    else:
        _matrix(w.view(shape), gradient, state, rule)
    if not p.is_contiguous():
        p.copy_(w)
    return torch.stack(gradient.slopes).sum() if watch else None


def _matrix(w: Tensor, g: Gradient, state: State, rule: Rule) -> None:
    fresh = 1 - beta2_at(state["step"])
    row = state["row"]
    col = state["col"]
    of_rows, of_columns = g.mean_squares()
    row.lerp_(of_rows, fresh)
    col.lerp_(of_columns, fresh)
    g.normalise((row / row.mean()).rsqrt_(), col)
    if rule.rank:
        _with_momentum(w, g, state, rule)
    else:
        square, *norms = numbers(g.square(), *_norms(w, rule))
        g.move(w, _length(w, square, norms, rule), rule)


def _with_momentum(w: Tensor, x: Gradient, state: State, rule: Rule) -> None:
    """Take the step of a matrix and of its momentum P·Q^T, from x; `left` is P^T, `right` Q^T."""
    left = state["left"]
    right = state["right"]
    # the old momentum's action on Q, transposed, and the power of its rows
    onto = (right @ right.T) @ left
    power = (onto * left).sum(0)
    first = state["step"] == 1
    seen = x.seen_through(_first_basis(right) if first else right)
    looks = (x.square(), (seen * left).sum(), power.sum())
    square, agreement, total, *norms = numbers(*looks, *_norms(w, rule))
    weight = rule.momentum_weight
    length = _length(w, square + 2 * weight * agreement + weight**2 * total, norms, rule)
    gain: Tensor | None = None
    if not first:
        length *= _boost(state, agreement, rule)
        gain = _gain(power, total, rule)
    # one step of subspace iteration on the new momentum, which is never formed
    basis = torch.linalg.qr(onto.mul_(rule.beta1).add_(seen, alpha=1 - rule.beta1).T).Q.T.contiguous()
    turned = basis @ left.T
    onto_basis = x.onto(basis)
    x.move(w, length, rule, gain=gain, momentum=(left, right))
    left.copy_(basis)
    right.copy_(torch.addmm(onto_basis, turned, right, beta=1 - rule.beta1, alpha=rule.beta1))


def _vector(w: Tensor, g: Gradient, state: State, rule: Rule) -> None:
    t = state["step"]
    square = state["square"]
    for (_, at), squares in g.squares():
        square[at].lerp_(squares[0].add_(EPSILON), 1 - beta2_at(t))
    g.normalise(None, square)
    if not rule.rank:
        square_of_x, *norms = numbers(g.square(), *_norms(w, rule))
        g.move(w, _length(w, square_of_x, norms, rule), rule)
        return
    mean = state["mean"]
    agreements = []
    for (_, at), x in g:
        agreements.append(torch.dot(x[0], mean[at]))
        mean[at].lerp_(x[0], 1 - rule.beta1)
    corrected = 1 / (1 - rule.beta1**t)
    size, *rest = numbers(torch.linalg.vector_norm(mean), *agreements, *_norms(w, rule))
    agreed = rest[: len(agreements)]
    length = _length(w, (size * corrected) ** 2, rest[len(agreements) :], rule)
    if t > 1:
        length *= _boost(state, sum(agreed), rule)
    for part in g.parts:
        g.step(w, part, mean[None, part[1]], length * corrected, rule)


class Gradient:
    """A gradient g of a matrix (m, n), or of a vector (1, n), by parts; after `normalise` x in its place.

    x of a single part is kept, and that of a larger tensor computed again at each use, so that there is never
    a copy of all of it.
    """

    def __init__(self, g: Tensor, scale: float, watch: bool):
        self.g = g
        self.scale = scale
        self.watch = watch
        self.slopes: list[Tensor] = []  # <g, dW> of each part, 0-dim, with `watch`
        self.parts = parts(*g.shape)
        self.x: Tensor | None = None
        self.down: Tensor | None = None
        self.columns = torch.empty(0)

    def squares(self) -> Iterator[tuple[Part, Tensor]]:
        """Yield g², by parts."""
        for at in self.parts:
            part = cut(self.g, at).float()
            yield at, part * part if self.scale == 1 else (part * self.scale).square_()

    def mean_squares(self) -> tuple[Tensor, Tensor]:
        """Return the means of g² + epsilon over rows, (m,), and over columns, (n,)."""
        m, n = self.g.shape
        of_rows = self.g.new_zeros(m, dtype=torch.float32)
        of_columns = self.g.new_zeros(n, dtype=torch.float32)
        for (rows, columns), squares in self.squares():
            of_rows[rows] += squares.sum(1)
            of_columns[columns] += squares.sum(0)
        return of_rows.div_(n).add_(EPSILON), of_columns.div_(m).add_(EPSILON)

    def normalise(self, down: Tensor | None, columns: Tensor) -> None:
        """Make x = g·down/sqrt(columns) from here on, with factors (m,), or none, and second moments (n,)."""
        self.down = down
        self.columns = columns
        if self.parts == [WHOLE]:
            self.x = self._normalised(WHOLE)

    def _normalised(self, at: Part) -> Tensor:
        across = self.columns[at[1]].rsqrt()
        if self.scale != 1:
            across *= self.scale
        x = cut(self.g, at).float() * across
        return x if self.down is None else x.mul_(self.down[at[0], None])

    def __iter__(self) -> Iterator[tuple[Part, Tensor]]:
        """Yield x, by parts, float32."""
        for at in self.parts:
            yield at, self._normalised(at) if self.x is None else cut(self.x, at)

    def square(self) -> Tensor:
        """Return ||x||², 0-dim."""
        squares = [torch.linalg.vector_norm(x).square() for _, x in self]
        return squares[0] if len(squares) == 1 else torch.stack(squares).sum()

    def seen_through(self, basis: Tensor) -> Tensor:
        """Return basis·x^T, (r, m), of a basis (r, n)."""
        product = basis.new_zeros(len(basis), self.g.shape[0])
        for (rows, columns), x in self:
            product[:, rows] += basis[:, columns] @ x.T
        return product

    def onto(self, basis: Tensor) -> Tensor:
        """Return basis·x, (r, n), of a basis (r, m)."""
        product = basis.new_zeros(len(basis), self.g.shape[1])
        for (rows, columns), x in self:
            product[:, columns] += basis[:, rows] @ x
        return product

    def move(
        self,
        w: Tensor,
        length: float,
        rule: Rule,
        gain: Tensor | None = None,
        momentum: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """W <- (1 - lr·weight_decay)·W - length·gain·(x + momentum_weight·left^T·right); uses x up.

        gain: (m,); momentum: (r, m) and (r, n).
        """
        for at, x in self:
            u = x
            if momentum is not None and rule.momentum_weight:
                left, right = momentum
                u = u.addmm_(left[:, at[0]].T, right[:, at[1]], alpha=rule.momentum_weight)
            if gain is not None:
                u = u.mul_(gain[at[0], None])
            self.step(w, at, u, length, rule)

    def step(self, w: Tensor, at: Part, u: Tensor, length: float, rule: Rule) -> None:
        """W <- (1 - lr·weight_decay)·W - length·u of a part."""
        part = cut(w, at)
        before = part.clone() if self.watch else None
        _move(part, u, length, rule)
        if before is not None:
            wide = torch.float64 if w.dtype == torch.float64 else torch.float32
            moved = (part - before).flatten().to(wide)
            self.slopes.append(torch.dot(cut(self.g, at).flatten().to(wide), moved))


# -- numbers -------------------------------------------------------------------------------------------------


def numbers(*tensors: Tensor) -> list[float]:
    """Read 0-dim tensors on the host at once."""
    if tensors[0].is_cuda:
        return [float(x) for x in torch.stack(tensors).tolist()]
    return [float(x) for x in tensors]


def _first_basis(right: Tensor) -> Tensor:
    """Return Omega^T, (r, n): what x is seen through before there is a momentum."""
    r, n = right.shape
    j = torch.arange(1, n + 1, dtype=torch.float64, device=right.device)
    k = torch.arange(1, r + 1, dtype=torch.float64, device=right.device)
    return (0.5 + GOLDEN_RATIO * j * k[:, None]).cos().float()


def _boost(state: State, agreement: float, rule: Rule) -> float:
    """Return the factor on a tensor whose gradient has agreed with its momentum for a `streak` of steps."""
    state["streak"] = state["streak"] + 1 if agreement > 0 else 0
    steps: int = min(state["streak"], LONGEST_STREAK)
    return 1 + (rule.streak_boost - 1) * steps / LONGEST_STREAK


def _gain(power: Tensor, total: float, rule: Rule) -> Tensor | None:
    """Return the factor on each row, (m,), from the power of the momentum in it, which sums to `total`."""
    if rule.snr_floor == 1 or not total > 0:
        return None
    share = power * (len(power) / total)
    return share.clamp_(min=0).sqrt_().clamp_(rule.snr_floor, 1)


def _norms(w: Tensor, rule: Rule) -> list[Tensor]:
    """Return the norms of a tensor's parts, 0-dim each, where its size counts."""
    if not rule.relative:
        return []
    return [torch.linalg.vector_norm(cut(w, at), dtype=torch.float32) for at in parts(*w.shape)]


def _length(w: Tensor, square: float, norms: Sequence[float], rule: Rule) -> float:
    """Return lr·kappa·lr_scale, over the limit of the rms of an update whose squares sum to `square`.

    `norms`: what `_norms` returned, read.
    """
    rms = rule.lr_scale * math.sqrt(max(square, 0.0) / w.numel())
    length = rule.lr * rule.lr_scale / max(1.0, rms / rule.rms_limit)
    if not rule.relative:
        return length
    size = math.hypot(*norms) / math.sqrt(w.numel())
    return length * max(SMALLEST_SIZE, size)


def _move(w: Tensor, u: Tensor, length: float, rule: Rule) -> None:
    """W <- (1 - lr·weight_decay)·W - length·u, rounded once."""
    keep = 1 - rule.lr * rule.weight_decay
    if w.element_size() >= 4:
        if keep != 1:
            w.mul_(keep)
        w.add_(u, alpha=-length)
    else:
        w.copy_(w.float().mul_(keep).add_(u, alpha=-length))


def parts(m: int, n: int) -> list[Part]:
    """Cut a matrix (m, n) into parts of at most `CHUNK` elements: whole rows, where a row is not longer."""
    if m * n <= CHUNK:
        return [WHOLE]
    columns = min(n, CHUNK)
    rows = max(1, CHUNK // columns)
    return [
        (slice(i, i + rows), slice(j, j + columns)) for i in range(0, m, rows) for j in range(0, n, columns)
    ]


def cut(matrix: Tensor, at: Part) -> Tensor:
    """Return the part of a matrix (m, n)."""
    return matrix if at is WHOLE else matrix[at]
