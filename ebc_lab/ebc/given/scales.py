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


@dataclass(frozen=True)
class Sample:
    """Logits and gradient of some rows, both (n, V), float64, the gradient as it is and with each row's label
    below 0; `off`: where neither label nor rounding is."""

    z: Tensor
    as_it_is: Tensor
    g: Tensor
    finite: Tensor  # where z is, which is 0 elsewhere
    off: Tensor

    @property
    def log_g(self) -> Tensor:
        return torch.where(self.off, self.g, 1.0).log()


def sample(z: Tensor, g: Tensor) -> Sample | None:
    """Some rows and classes of logits and gradient (..., V); None where no row has a gradient."""
    tiny = torch.finfo(g.dtype).tiny
    z, g = z.flatten(0, -2), g.flatten(0, -2)
    used = (g.any(-1) & g.isfinite().all(-1)).nonzero()[:, 0]
    if not len(used):
        return None
    used = used[_spread(len(used), ROWS, used.device)]
    z, g = z[used], g[used]
    # a policy's row with a negative advantage is upside down: a label's element is the largest, and negative
    upright = -g.gather(-1, g.abs().argmax(-1, keepdim=True)).sign()
    classes = _spread(z.shape[-1], CLASSES, z.device)
    z, g = z[:, classes].cpu().double(), g[:, classes].cpu().double()
    upright = upright.cpu()
    finite = z.isfinite()
    return Sample(torch.where(finite, z, 0.0), g, upright * g, finite, finite & (upright * g >= tiny))


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
    xx = float((x * x).sum())
    if not xx > 0:
        return None
    slope = float((x * y).sum()) / xx
    square = _centred(0.5 * x * x, among)
    square = square - x * (float((x * square).sum()) / xx)
    rest = y - slope * x
    squares = float((square * square).sum())
    if not squares > 0:
        return None
    bend = float((rest * square).sum()) / squares
    variance = float((rest - bend * square)[among].square().sum()) / freedom
    of_entries = math.sqrt(int(among.sum()) / freedom)
    return Line(
        slope,
        bend,
        math.sqrt(variance / squares),
        _typical(rest[among]) * of_entries,
        float(rest.max()),
        _typical((y - x)[among]) * of_entries,
    )


def scale(s: Sample) -> tuple[float, bool] | None:
    """The factor by which a loss multiplies logits before its softmax, and whether that is exact.

    It is for a cross-entropy, with or without label smoothing. Soft targets only bound it from below.
    """
    found = line(s)
    most = float(s.off.sum()) > 0.5 * float(((s.g != 0) & s.finite).sum())
    told = found is not None and most and found.is_one_scale
    if found is not None and told and abs(found.bend) <= max(10 * found.error, 1e-3 * (found.slope - 1) ** 2):
        return found.slope, found.unlike < EXACT
    smoothed = _smoothed(s)
    if smoothed is not None:
        return smoothed, True
    least = _sharpened(s)
    if found is not None and told:
        least = max(found.slope, least or 0.0)
    return None if least is None else (least, False)


def _smoothed(s: Sample) -> float | None:
    """With label smoothing: off the label g is a·(exp(s·z) - b) in each row, b a small part of its mean."""
    labels = 2 if s.z.shape[-1] >= 8 else 1  # two where mixup has blended them
    some = s.finite & (s.as_it_is != 0)
    lowest = s.as_it_is.masked_fill(~some, math.inf).topk(labels, largest=False).indices
    some = some.scatter(-1, lowest, False)
    some = some & (some.sum(-1, keepdim=True) >= 4)
    if int(some.sum()) < 16:
        return None

    def fitted(factor: float) -> tuple[float, float]:
        """How badly it fits, and the smoothing that it means."""
        p = (factor * s.z).masked_fill(~s.finite, -math.inf).softmax(-1)
        x, y = _centred(p, some), _centred(s.as_it_is, some)
        slope = (x * y).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True).clamp(min=1e-300)
        size = y.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-300)
        rest = torch.where(slope > 0, (y - slope * x) / size, 1.0)
        below = torch.where(some, p - s.as_it_is / slope.clamp(min=1e-300), 0.0).sum(-1) / some.sum(-1).clamp(
            min=1
        )
        rows = some.any(-1)
        return float(rest.square().sum(-1)[rows].median().sqrt()), s.z.shape[-1] * float(below[rows].median())

    if fitted(1.0)[0] < 1e-3:
        return None
    found, least = _lowest(lambda factor: fitted(factor)[0])
    fits = least < 0.01 and fitted(1.0)[0] > BETTER * least and -0.01 < fitted(found)[1] < SMOOTHING
    return found if fits and abs(math.log(found)) > FAR else None


def _sharpened(s: Sample) -> float | None:
    """At least how much a loss with soft targets that are sharper than softmax(z) multiplies logits.

    Where logits are low such targets are nearly 0: the gradient is positive there, and its slope comes near s
    from below, the nearer the lower they are.
    """
    finite = s.finite & (s.g != 0)
    count = finite.sum(-1, keepdim=True)
    rank = s.z.masked_fill(~finite, math.inf).argsort(-1).argsort(-1)
    low, lower = (finite & (rank < part * count) for part in (0.3, 0.15))
    if int(lower.sum()) < 16 or float((low & ~s.off).sum()) > 0.05 * float(low.sum()):
        return None
    below, above = line(s, lower & s.off), line(s, low & ~lower & s.off)
    if below is None or above is None:
        return None
    clear = all(part.unlike_one > 3 * part.unlike for part in (below, above))
    rises = FLAT < above.slope < 1.1 * below.slope < 2 * FLAT * above.slope
    return below.slope if clear and rises else None


# -- labels by themselves ------------------------------------------------------------------------------------


def of_labels(z: Tensor, g: Tensor, off: Tensor, *, shifts: bool) -> tuple[float, float] | None:
    """The factor s and the offset b with which g = w·s·sigmoid(s·z + b) where `off` the labels, one w for
    all; float64. `shifts`: whether b may be other than 0.

    None where another function of z fits as well.
    """
    x, y = z[off], torch.where(off, g, 1.0).log()[off]
    some = _spread(len(x), LABELS, x.device)
    x, y = x[some], y[some]
    if len(x) < 16:
        return None

    def rest(factor: float, offset: float = 0.0) -> Tensor:
        unexplained = y - F.logsigmoid(factor * x + offset)
        return unexplained - unexplained.median()

    whole = _typical(y - y.median())
    found, least = _lowest(lambda factor: _typical(rest(factor)))
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
    if z.ndim != 2 or z.shape[0] != z.shape[1] or len(z) < 4 or not g.isfinite().all():
        return None
    if len(g) == len(z):
        columns = sample(z.T, g.T)
        found = columns and line(columns)
        if found and found.slope > 0 and found.unlike < 1e-3:
            return 1.0, found.slope
    rows = min(len(g), ROWS)
    z, g = z.cpu().double(), g[:rows].cpu().double()
    off = (g > 0) & z[:rows].isfinite()
    if float(off.double().mean()) < 0.5:
        return None
    known = g[off]

    def fitted(factor: float) -> tuple[float, float, float]:
        """How badly a·rows + b·columns fits, a, b."""
        x = factor * z
        by_row, by_column = x[:rows].softmax(1)[off] / known, x.softmax(0)[:rows][off] / known
        aa, ab, bb = by_row @ by_row, by_row @ by_column, by_column @ by_column
        inverse = 1 / (aa * bb - ab * ab).clamp(min=1e-300)
        a = (bb * by_row.sum() - ab * by_column.sum()) * inverse
        b = (aa * by_column.sum() - ab * by_row.sum()) * inverse
        return _typical(a * by_row + b * by_column - 1), float(a), float(b)

    factor = 1.0
    if fitted(factor)[0] > 1e-3 and len(z) <= CLASSES:
        factor = _lowest(lambda f: fitted(f)[0])[0]
    unlike, a, b = fitted(factor)
    of_rows = sample(z[:rows], g)
    straight = of_rows and line(of_rows)
    better = not straight or straight.unlike > 3 * unlike
    positive = a > -0.02 * (a + b) and b > BOTH * (a + b) > 0
    return (b / (a + b), factor) if unlike < 0.03 and better and positive else None


# -- what they share -----------------------------------------------------------------------------------------


def _centred(x: Tensor, among: Tensor) -> Tensor:
    """x minus its mean among some entries of each row; 0 at the others."""
    x = torch.where(among, x, 0.0)
    mean = x.sum(-1, keepdim=True) / among.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(among, x - mean, 0.0)


def _typical(rest: Tensor) -> float:
    """The size that nine residuals in ten do not exceed."""
    return float(rest.abs().quantile(0.9)) if rest.numel() < 2**23 else float(rest.abs().mean())


def _lowest(unlike: Callable[[float], float]) -> tuple[float, float]:
    """The factor at which `unlike` is least, and that least value."""
    factor = math.exp(_least(lambda log: unlike(math.exp(log)), GRID))
    return factor, unlike(factor)


def _least(unlike: Callable[[float], float], grid: list[float]) -> float:
    """Where `unlike` is least, between the points beside the best of a grid."""
    values = [unlike(at) for at in grid]
    best = min(range(len(grid)), key=values.__getitem__)
    low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(28):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if unlike(left) < unlike(right):
            high = right
        else:
            low = left
    return (low + high) / 2


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
