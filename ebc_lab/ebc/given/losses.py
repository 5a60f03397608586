"""What a loss makes of a model's output, told from its values and from the loss's gradient by it.

A softmax does not see what is added to all classes of a token. So the gradient of every loss that is made of
one (cross-entropy, label smoothing, distillation, a policy's) sums to zero over the classes, which tells the
axis they are. That of a cross-entropy for each label by itself is s·(sigmoid(z) - y), y 0 or 1, with one s.
What the loss does to the logits before that is told in `scales`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..logits import token_mean
from . import scales

SUMS_TO_ZERO = 0.02  # |sum over the classes| of a softmax's gradient, at most, for each unit of its elements
UNLIKE_SOFTMAX = 0.1  # from here on a loss is told to be another one's: what lies between may be a z-loss
LEFT_OUT = 0.05  # of a softmax, what classes without a gradient have at least where the loss leaves them out
MEANT = 0.02  # of a gradient's size, what a softmax among several has at least
SURE = 16  # numbers that all lie in [0, 1] are hardly logits
LOOKED_AT = 1024  # tokens at most
LABELS_OF = "logits_of=lambda z: torch.stack([torch.zeros_like(z), z], -1)"
SIGMOID_OF = "logits_of=lambda p: torch.stack([(1 - p).log(), p.log()], -1)"
LEARNT = " (where the factor is learnt, multiply by the parameter itself, as model.scale.exp() * z)"


@dataclass(frozen=True)
class Gradient:
    """The loss's gradient by the logits of one forward, (B, ..., V): its leading rows."""

    rows: Tensor
    mass: float  # the sum of its elements' sizes in all rows
    known: Tensor | None = None  # (V,): the classes that it is known of, where some are constants; None: all

    @property
    def usable(self) -> bool:
        return 0 < self.mass < math.inf and bool(self.rows.any())

    def __add__(self, other: Gradient) -> Gradient:
        """That of two backward passes."""
        return Gradient(self.rows + other.rows, self.mass + other.mass, self.known)


def gradient_of(logits: Tensor, output: Tensor, by_output: Tensor) -> Gradient | None:
    """The gradient by `logits`, a view of `output`, from that by `output`; rows first. None where the logits
    show other elements of that memory too."""
    if logits.shape != output.shape or logits.stride() != output.stride():
        alike = torch.empty_strided(
            output.shape, output.stride(), dtype=by_output.dtype, device=by_output.device
        )
        offset = logits.storage_offset() - output.storage_offset()
        try:
            by_output = alike.copy_(by_output).as_strided(logits.shape, logits.stride(), offset)
        except RuntimeError:  # they reach beyond the output
            return None
    return of_rows(by_output, leading_rows(logits))


def of_rows(whole: Tensor, rows: int) -> Gradient:
    """The gradient of which `whole` holds all rows, rows first."""
    return Gradient(whole[:rows].detach().clone(), float(whole.abs().sum(dtype=torch.float32)))


def leading_rows(logits: Tensor) -> int:
    """How many rows of logits (B, ..., V) hold about `LOOKED_AT` tokens, one at least."""
    return max(1, LOOKED_AT * max(1, len(logits)) // max(1, logits[..., 0].numel()))


def refusal(z: Tensor, gradient: Gradient | None) -> str | None:
    """Why logits (B, ..., V) are not what EBC takes them for, and the remedy; None where they may be."""
    g = None
    last = z.ndim - 1
    if gradient is not None and gradient.usable:
        if gradient.known is not None:
            return _scaled_pair(z, gradient)
        if two := scales.rows_and_columns(z, gradient.rows):
            return _columns(*two, len(z))
        g = gradient.rows.float()
    z = z[: leading_rows(z) if g is None else len(g)].float()
    if gradient is not None and g is not None and unbalanced(g, last) <= SUMS_TO_ZERO:
        if z.shape[-1] == 2:
            return _scaled_pair(z, gradient)
        return _several(g) or _left_out(z, g) or _softmaxs(z, gradient.rows)
    axes = [axis for axis in (last, *range(1, last)) if z.shape[axis] > 1]
    if _pairs_of_probabilities(z):
        return (
            "the second of two logits, beside a 0, is a probability in every row: for a model that ends in a "
            f"sigmoid give {SIGMOID_OF}."
        )
    probabilities = _between(z) and (g is not None or _differ(z))
    for axis in axes:
        if probabilities and _is(z.sum(axis), 1):
            log = "torch.log" if axis == last else f"lambda p: p.movedim({axis}, -1).log()"
            return f"the model returns probabilities, and EBC takes logits: give logits_of={log}."
        if _is(z.logsumexp(axis), 0):
            return None if axis == last else _other_axis(axis, z)
    if g is None:
        return None
    for axis in axes[1:]:
        if unbalanced(g, axis) <= SUMS_TO_ZERO:
            return _other_axis(axis, z)
    if bool((z >= 0).all()) and _all_alike(g):
        return (
            "this is the loss of each position, and not logits: let the model return the logits too, and say "
            "where they are, logits_of=lambda output: …."
        )
    if probabilities and unbalanced(g, last) > UNLIKE_SOFTMAX:
        return f"the model returns probabilities, one for each label: give {SIGMOID_OF}."
    if _labels_by_themselves(z, g):
        return _labels(z)
    found = scales.of_labels(z, g, shifts=True)
    return None if found is None else _labels(z, *found)


def _left_out(z: Tensor, g: Tensor) -> str | None:
    """What is said where the loss leaves classes out of its softmax: no gradient at all comes to them."""
    used = g.any(-1)
    p = z.softmax(-1)[used]
    without = g[used] == 0
    some = without & (p > 1e-3)  # a smaller one may have a gradient that is 0 in low precision
    mass = float((p * some).sum(-1).mean())
    if not mass > LEFT_OUT:
        return None
    kept = ~without.all(0)  # where the same ones are left out everywhere
    count = int(kept.sum())
    if count < len(kept) and bool(kept[:count].all()):
        remedy = f"z[..., :{count}]"
    else:
        remedy = "z.masked_fill(mask, -torch.inf), with the mask that the loss uses"
    return (
        f"no gradient comes to classes that hold {mass:.0%} of the softmax of these logits: the loss leaves "
        f"them out, and EBC does not: give logits_of=lambda z: {remedy}."
    )


def _softmaxs(z: Tensor, g: Tensor) -> str | None:
    """What is said of logits (B, ..., V) by which the gradient `g` sums to zero over the classes."""
    some = scales.sample(z, g)
    if scales.one_hot_labels(some):
        return _labels(z)
    found = scales.scale(some)
    if found is None:
        return None
    factor, exact = found
    written = scales.written(factor if exact else float(f"{factor:.2g}"))
    about = "" if exact else ", or about that, with the loss's own number"
    return (
        f"the loss takes the softmax of {written}, z being these logits, and EBC that of z: give "
        f"logits_of=lambda z: {written}{about}{LEARNT}."
    )


def _scaled_pair(z: Tensor, gradient: Gradient) -> str | None:
    """What is said of two classes, whose gradient may be known by one of them alone."""
    if z.shape[-1] != 2:
        return None
    shifts = gradient.known is not None
    of = 0 if gradient.known is not None and not gradient.known[1] else 1
    z = z[: len(gradient.rows)].double()
    found = scales.of_labels(z[..., of] - z[..., 1 - of], gradient.rows[..., of], shifts=shifts)
    if found is None or found == (1.0, 0.0):
        return None
    written = scales.written(*found)
    if shifts:
        return (
            f"these two logits are a constant and z, and the loss takes {written} for z: let logits_of take "
            f"that for z{LEARNT}."
        )
    return (
        f"the loss takes the softmax of {written}, z being these two logits, and EBC that of z: let "
        f"logits_of return {written}{LEARNT}."
    )


def _labels(z: Tensor, factor: float = 1.0, offset: float = 0.0) -> str:
    plain = (factor, offset) == (1.0, 0.0)
    remedy = LABELS_OF if plain else LABELS_OF.replace(", z]", f", {scales.written(factor, offset)}]")
    return (
        f"the loss takes each of the {z.shape[-1]} outputs for a label of its own, and EBC would take "
        f"them for the classes of one softmax: give {remedy}{'' if plain else LEARNT}."
    )


def _columns(share: float, factor: float, size: int) -> str:
    """What is said of a softmax over the rows of a square, the batch's."""
    z = "z" if abs(math.log(factor)) < 2 * scales.APART else f"({scales.written(factor)})"
    what, remedy = "beside that of each row, and EBC that of the rows alone", f"torch.stack([{z}, {z}.T], 1)"
    if share > 1 - scales.BOTH:
        what, remedy = "and EBC that of each row", f"{z}.T"
    return (
        f"the loss takes the softmax of each column of these logits, {what}: give logits_of=lambda z: "
        f"{remedy}, z being these logits, and probe_sequences={size}, and all rows choose c"
        f"{'' if z == 'z' else LEARNT}."
    )


def doubt(gradient: Gradient, log_probabilities: bool) -> str | None:
    """What is said of a loss that is no softmax's, where nothing tells what it is."""
    imbalance = unbalanced(gradient.rows.float(), gradient.rows.ndim - 1)
    if log_probabilities or gradient.known is not None or imbalance <= UNLIKE_SOFTMAX:
        return None
    return (
        "the loss is not one of a softmax over the last axis of the model's output (its gradient sums to "
        f"{imbalance:.0%} of its size there, not to zero): EBC bounds the KL of that softmax, which training "
        f"does not use. For labels that are each 0 or 1 give {LABELS_OF}; a regression has no such KL."
    )


def unbalanced(g: Tensor, axis: int) -> float:
    """The size of a gradient's sums over an axis for each unit of its elements' size: 0 for a softmax's."""
    size = float(g.abs().sum())
    return float(g.sum(axis).abs().sum()) / size if size > 0 else 0.0


def are_probabilities(z: Tensor) -> bool:
    """Whether what should be logits (B, ..., V) has been through a softmax."""
    z = z[: leading_rows(z)].float()
    return _between(z) and _differ(z) and _is(z.sum(-1), 1)


def are_log_probabilities(z: Tensor) -> bool:
    """Whether logits (B, ..., V) are normalised already."""
    return _is(z[: leading_rows(z)].float().logsumexp(-1), 0)


def share_of(idle: Tensor, mask: Tensor | None) -> float:
    """The share of the positions that count which are `idle`, of the leading rows; NaN where none counts."""
    return float(token_mean(idle.float(), None if mask is None else mask[: len(idle)]))


def _between(z: Tensor) -> bool:
    return bool((z >= 0).all()) and bool((z <= 1.001).all())


def _differ(z: Tensor) -> bool:
    """Whether not all rows are alike, as those of a saturated classifier are."""
    return not bool((z == z[:1]).all())


def _is(values: Tensor, wanted: float) -> bool:
    """Up to the rounding of low precision."""
    return bool(((values - wanted).abs() < 0.01).all())


def _several(g: Tensor) -> str | None:
    """What is said where the last axis holds several softmaxes: the gradient sums to zero over each."""
    size = g.abs().flatten(0, -2).sum(0)
    mass = float(size.sum())
    below = size.cumsum(0)[:-1] / mass
    sums = g.flatten(0, -2).cumsum(-1)[:, :-1].abs().sum(0) / mass
    least = torch.minimum(below, 1 - below)  # of the two sides
    ends = (least > MEANT) & (sums < 0.1 * least)  # of one softmax the sums are about as large as a side
    if not bool(ends.any()):
        return None
    first = int(ends.nonzero()[0]) + 1
    return (
        f"the last axis holds several softmaxes, the first of {first} classes, and EBC takes it for one: "
        f"give them an axis of their own, logits_of=lambda z: z.unflatten(-1, (-1, {first})), or, where they "
        "are of different sizes, split, padded with -inf and stacked."
    )


def _pairs_of_probabilities(z: Tensor) -> bool:
    """Whether they are (0, p), p strictly between 0 and 1 and not the same in every row."""
    if z.shape[-1] != 2 or z.numel() < 2 * SURE:
        return False
    zero, p = z.unbind(-1)
    return not zero.any() and bool(((p > 0) & (p < 1)).all()) and bool((p != p.flatten()[0]).any())


def _all_alike(g: Tensor) -> bool:
    """Whether a gradient is that of a mean: the same everywhere, or zero where nothing counts."""
    some = g[g != 0]
    return some.numel() > 1 and bool(((some / some[0] - 1).abs() < 1e-3).all())


def _labels_by_themselves(z: Tensor, g: Tensor) -> bool:
    """Whether the gradient is s·(sigmoid(z) - y), up to the rounding of low precision."""
    part = z.sigmoid() - (g < 0).float()
    clear = (g.abs() > 1e-3 * g.abs().max()) & (part.abs() > 1e-3)
    if int(clear.sum()) < 4:
        return False
    scale = g[clear] / part[clear]
    near = (scale / scale.median() - 1).abs() < 0.05
    return bool(near.float().mean() > 0.9)


def _other_axis(axis: int, z: Tensor) -> str:
    return (
        f"the classes are axis {axis} of the model's output, {tuple(z.shape[1:])} behind its rows, and EBC "
        f"takes the last axis for them: give logits_of=lambda z: z.movedim({axis}, -1)."
    )
