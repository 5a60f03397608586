"""What a loss does to logits before its softmax, told from its gradient by them: a factor, another axis.

Off the labels the gradient of a cross-entropy of s·z is w·s·softmax(s·z), so that its logarithm is a line in
z of slope s in each row, whatever that row's weight w is. A sum of several such terms (a mixture of losses,
an entropy) bends the line: nothing is concluded from one that bends. Everything is computed on a sample, in
float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, CLASSES = 128, 1024  # of the sample, at most
APART = 0.1  # a factor is told from here on: |log s|
FAR = 0.5  # |log s| from which on it is told where labels may be smoothed
FLAT = 1.5  # a factor that soft targets only bound from below is told from here on
BETTER = 10.0  # how much better than another explanation one must fit
LOOSE = 0.2  # a typical residual of log g, at most: rounding of low precision is as large
EXACT = 0.1  # that of a loss with hard labels, in bfloat16
SMOOTHING = 0.35  # of a label, at most
TAIL = -3.0  # log-odds: where none is higher, a sigmoid is an exponential
BENT = 0.1  # a line's bend, at most, for each unit of (s - 1)²: a mixture of s = 1 and another s has more
BOTH = 0.05  # the share of a softmax over columns (or rows) from which on it is told
GRID = [k / 2 * math.log(2) for k in range(-14, 15)]  # of log s
OFFSETS = [-14.0, -10.0, -7.0, -5.0, -3.0, -1.5, 0.0, 1.5, 3.0, 5.0]
LABELS = 2048  # of the sample, at most, where labels are by themselves

Fit = TypeVar("Fit", bound=tuple[float, ...])  # how badly something fits, and what else is known of it


@dataclass(frozen=True)
class Sample:
    """Logits and gradient of some rows, both (n, V), float64."""

    z: Tensor
    g: Tensor
    there: Tensor  # where z is finite and g is not 0
    off: Tensor  # where neither label nor rounding is
    log_g: Tensor  # where off, of the gradient with each row's label below 0


def sample(z: Tensor, g: Tensor) -> Sample:
    """Some rows and classes of logits and gradient (..., V), which is finite and not 0 everywhere."""
    tiny = torch.finfo(g.dtype).tiny
    z, g = z.flatten(0, -2), g.flatten(0, -2)
    used = g.any(-1).nonzero()[:, 0]
    used = used[_spread(len(used), ROWS, used.device)]
    z, g = z[used], g[used]
    # a policy's row with a negative advantage is upside down: a label's element is the largest, and negative
    upright = -g.gather(-1, g.abs().argmax(-1, keepdim=True)).sign()
    classes = _spread(z.shape[-1], CLASSES, z.device)
    z, g = z[:, classes].cpu().double(), g[:, classes].cpu().double()
    upright = upright.cpu()
    off = z.isfinite() & (upright * g >= tiny)
    return Sample(z, g, z.isfinite() & (g != 0), off, torch.where(off, upright * g, 1.0).log())


def _spread(n: int, most: int, device: torch.device) -> Tensor:
    """`most` indices below n at most, evenly spaced."""
    return torch.linspace(0, n - 1, min(n, most), device=device).round().long()


# -- one softmax ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """log g = slope·z + bend/2·z² in each row, around its means. `error`: the bend's; `unlike`: the typical
    residual with the slope alone, `above` the largest; `unlike_one`: the typical one with a slope of 1."""

    slope: float
    bend: float
    error: float
    unlike: float
    above: float
    unlike_one: float

    @property
    def is_one_scale(self) -> bool:
        """Whether it is that of one softmax, of logits that are scaled."""
        if not self.slope > 0 or abs(math.log(self.slope)) < APART or self.unlike > LOOSE:
            return False
        straight = abs(self.bend) + 3 * self.error < BENT * (self.slope - 1) ** 2
        straight = straight and self.above < 1  # soft targets make g smaller alone
        return straight and self.unlike_one > BETTER * self.unlike


def line(s: Sample, among: Tensor | None = None) -> Line | None:
    """The line through the entries off the labels, or `among` others; None for too few of them."""
    among = s.off if among is None else among
    among = among & (among.sum(-1, keepdim=True) >= 3)
    freedom = int(among.sum()) - int(among.any(-1).sum()) - 2
    if freedom < 4:
        return None
    x, y = _centred(s.z, among), _centred(s.log_g, among)
    slope = (x * y).sum() / (x * x).sum()
    square = _centred(0.5 * x * x, among)
    square = square - x * ((x * square).sum() / (x * x).sum())
    rest = y - slope * x
    squares = (square * square).sum()
    if not squares > 0:  # so, too, where all x are 0
        return None
    bend = (rest * square).sum() / squares
    variance = (rest - bend * square).square().sum() / freedom
    of_entries = math.sqrt(int(among.sum()) / freedom)
    unlike, unlike_one = (_typical(r[among]) * of_entries for r in (rest, y - x))
    error = float((variance / squares).sqrt())
    return Line(float(slope), float(bend), error, unlike, float(rest.max()), unlike_one)


def scale(s: Sample) -> tuple[float, bool] | None:
    """The factor by which a loss multiplies logits before its softmax, and whether that is exact.

    It is for a cross-entropy, with or without label smoothing. Soft targets only bound it from below.
    """
    found = line(s)
    most = float(s.off.sum()) > 0.5 * float(s.there.sum())
    bounds = []
    if found is not None and most and found.is_one_scale:
        if abs(found.bend) <= max(10 * found.error, 1e-3 * (found.slope - 1) ** 2):
            return found.slope, found.unlike < EXACT
        bounds.append(found.slope)
    smoothed = _smoothed(s)
    if smoothed is not None:
        return smoothed, True
    bounds += _sharpened(s)
    return (max(bounds), False) if bounds else None


def _smoothed(s: Sample) -> float | None:
    """With label smoothing: off the label g is a·(exp(s·z) - b) in each row, b a small part of its mean."""
    labels = 2 if s.z.shape[-1] >= 8 else 1  # two where mixup has blended them
    lowest = s.g.masked_fill(~s.there, math.inf).topk(labels, largest=False).indices
    some = s.there.scatter(-1, lowest, False)
    some = some & (some.sum(-1, keepdim=True) >= 4)
    if int(some.sum()) < 16:
        return None

    def fitted(factor: float) -> tuple[float, float]:
        """How badly it fits, and the smoothing that it means."""
        p = (factor * s.z).softmax(-1)
        x, y = _centred(p, some), _centred(s.g, some)
        slope = (x * y).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True).clamp(min=1e-300)
        rest = torch.where(slope > 0, y - slope * x, y)
        unlike = (rest.norm(dim=-1) / y.norm(dim=-1).clamp(min=1e-300))[some.any(-1)].median()
        below = _mean(p, some) - _mean(s.g, some) / slope.clamp(min=1e-300)
        return float(unlike), s.z.shape[-1] * float(below[some.any(-1)].median())

    unscaled, _ = fitted(1.0)
    if unscaled < 1e-3:
        return None
    found, (least, smoothing) = _lowest(fitted)
    fits = least < 0.01 and unscaled > BETTER * least and -0.01 < smoothing < SMOOTHING
    return found if fits and abs(math.log(found)) > FAR else None


def _sharpened(s: Sample) -> list[float]:
    """At least how much a loss with soft targets that are sharper than softmax(z) multiplies logits; empty
    where that is not seen.

    Where logits are low such targets are nearly 0: the gradient is positive there, and its slope comes near s
    from below, the nearer the lower they are.
    """
    rank = s.z.masked_fill(~s.there, math.inf).argsort(-1).argsort(-1)
    low, lower = (s.there & (rank < part * s.there.sum(-1, keepdim=True)) for part in (0.3, 0.15))
    if int(lower.sum()) < 16 or float((low & ~s.off).sum()) > 0.05 * float(low.sum()):
        return []
    below, above = line(s, lower & s.off), line(s, low & ~lower & s.off)
    if below is None or above is None:
        return []
    clear = all(part.unlike_one > 3 * part.unlike for part in (below, above))
    rises = FLAT < above.slope < 1.1 * below.slope < 2 * FLAT * above.slope
    return [below.slope] if clear and rises else []


# -- labels by themselves ------------------------------------------------------------------------------------


def of_labels(z: Tensor, g: Tensor, *, shifts: bool) -> tuple[float, float] | None:
    """The factor s and the offset b with which g = w·s·sigmoid(s·z + b) off the labels, where g > 0, one w
    for all; z and g of one shape. `shifts`: whether b may be other than 0.

    None where another function of z fits as well.
    """
    off = (g > 0) & z.isfinite()
    some = _spread(int(off.sum()), LABELS, z.device)
    x, y = z[off][some].cpu().double(), g[off][some].cpu().double().log()
    if len(x) < 16:
        return None

    def rest(factor: float) -> Tensor:
        unexplained = y - F.logsigmoid(factor * x)
        return unexplained - unexplained.median()

    whole = _typical(y - y.median())
    found, (least,) = _lowest(lambda factor: (_typical(rest(factor)),))
    if least < LOOSE and BETTER * least < whole:
        if abs(math.log(found)) < APART:
            return 1.0, 0.0
        # what is left must not bend, as it does for another function of z
        around = x - x.mean()
        basis = torch.stack([torch.ones_like(x), around, 0.5 * around.square()], 1)
        bend = float(torch.linalg.lstsq(basis, rest(found)[:, None]).solution[2])
        straight = abs(bend) < BENT * (found - 1) ** 2 / 4
        if straight and _typical(rest(1.0)) > BETTER * least:
            return found, 0.0
    if not shifts:
        return None

    x, y = x[:: len(x) // 256 + 1], y[:: len(y) // 256 + 1]
    logs, offsets = torch.tensor(GRID, dtype=x.dtype), torch.tensor(OFFSETS, dtype=x.dtype)
    steps = torch.linspace(-1, 1, 11, dtype=x.dtype)
    for zoom in range(24):  # around the best of a grid in both
        at = torch.cartesian_prod(logs, offsets)
        unexplained = y - F.logsigmoid(at[:, :1].exp() * x + at[:, 1:])
        unlike = (unexplained - unexplained.median(-1, keepdim=True).values).abs().quantile(0.9, -1)
        log, offset = at[unlike.argmin()]
        logs, offsets = log + 0.4 * 0.6**zoom * steps, offset + 2.5 * 0.6**zoom * steps
    tail = float((log.exp() * x + offset).max()) < TAIL  # there a sigmoid is any exponential
    return None if tail or float(unlike.min()) >= 1e-3 * whole else (math.exp(log), float(offset))


def one_hot_labels(s: Sample) -> bool:
    """Whether the gradient, which sums to zero over the classes, is that of labels by themselves all the same
    and no softmax's."""
    straight = line(s)
    if straight is None:
        return False
    rest = (s.log_g - F.logsigmoid(s.z))[s.off]
    unlike = _typical(rest - rest.median())
    return unlike < LOOSE and min(straight.unlike_one, straight.unlike) > BETTER * unlike


# -- two softmaxes of one square -----------------------------------------------------------------------------


def rows_and_columns(z: Tensor, g: Tensor) -> tuple[float, float] | None:
    """The share of the softmax over columns, and the factor of both, in a loss of a softmax over the rows and
    one over the columns of logits (N, N), of which `g` may hold the leading rows alone.

    None where the softmax over rows explains as much.
    """
    if z.ndim != 2 or z.shape[0] != z.shape[1] or len(z) < 4:
        return None
    rows = min(len(g), ROWS)
    z, g = z.cpu().double(), g[:rows].cpu().double()
    off = (g > 0) & z[:rows].isfinite()
    if float(off.double().mean()) < 0.5:
        return None

    def fitted(factor: float) -> tuple[float, float, float]:
        """How badly a·rows + b·columns fits, a, b."""
        softmaxes = (factor * z[:rows]).softmax(1), (factor * z).softmax(0)[:rows]
        parts = torch.stack([p[off] / g[off] for p in softmaxes], 1)
        shares = torch.linalg.lstsq(parts, torch.ones_like(parts[:, :1])).solution
        return _typical(parts @ shares - 1), *shares[:, 0].tolist()

    factor, fit = 1.0, fitted(1.0)
    if fit[0] > 1e-3 and len(z) <= CLASSES:
        factor, fit = _lowest(fitted)
    unlike, a, b = fit
    straight = line(sample(z[:rows], g))
    better = not straight or straight.unlike > 3 * unlike
    positive = a > -0.02 * (a + b) and b > BOTH * (a + b) > 0
    return (b / (a + b), factor) if unlike < 0.03 and better and positive else None


# -- what they share -----------------------------------------------------------------------------------------


def _centred(x: Tensor, among: Tensor) -> Tensor:
    """x minus its mean among some entries of each row; 0 at the others."""
    return torch.where(among, x - _mean(x, among), 0.0)


def _mean(x: Tensor, among: Tensor) -> Tensor:
    """The mean among some entries of each row, (n, 1); 0 without any."""
    return torch.where(among, x, 0.0).sum(-1, keepdim=True) / among.sum(-1, keepdim=True).clamp(min=1)


def _typical(rest: Tensor) -> float:
    """The size that nine residuals in ten do not exceed."""
    return float(rest.abs().quantile(0.9))


def _lowest(fitted: Callable[[float], Fit]) -> tuple[float, Fit]:
    """The factor at which the first number of `fitted` is least, between the points beside the best of a
    grid, and what is fitted there."""
    best = min(GRID, key=lambda log: fitted(math.exp(log))[0])
    low, high = best - GRID[1] + GRID[0], best + GRID[1] - GRID[0]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(28):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if fitted(math.exp(left))[0] < fitted(math.exp(right))[0]:
            high = right
        else:
            low = left
    factor = math.exp((low + high) / 2)
    return factor, fitted(factor)


def written(factor: float, offset: float = 0.0) -> str:
    """`z` times a factor, as somebody would write it: 30 * z, z / 0.07; and an offset."""
    if abs(offset) > 0.01:
        return f"{written(factor)} {'-' if offset < 0 else '+'} {abs(offset):.3g}"
    ways = [(factor, "{} * z"), (1 / factor, "z / {}")]
    for digits in (1, 2, 3):
        for value, how in ways if factor > 1 else reversed(ways):
            text = f"{float(f'{value:.{digits}g}'):g}"
            if digits == 3 or abs(float(text) / value - 1) < 1e-3:
                return how.format(text)
    raise AssertionError("three digits are enough")
