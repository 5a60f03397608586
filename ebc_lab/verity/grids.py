"""Sums over tokens, which are the gradients of weights: exact, so that no order and no split changes them.

A sum's terms are rounded to integers on a grid, 2^E divided into so many steps, and added as int64. Without
`Grids` a layer takes E from the backward call's own tokens. With `Grids(model)` E is fixed before the step,
so that any number of backward calls and workers add to the same sums.

Sums that are reproducible because their terms are rounded to one grid: Demmel & Nguyen 2013, and in parallel
Demmel & Nguyen 2015.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .bits import LEAST_EXPONENT, NOT_FINITE, VerityError, all_finite, divided, pow2f
from .checks import check_model
from .engine import engine_of

FACTOR_BITS = 21  # of either factor of a product
TERM_BITS = 40
CHUNK = 2048  # tokens whose products a float64 matrix product adds exactly
MOST_TOKENS = 2**21 - 1  # of a step: as many products of two factors up to 2^21 fit into int64
KEPT = 16  # accepted steps whose largest exponents are remembered
UNSEEN = -(2**20)  # the exponent of values that are all zero, or not there


@dataclass
class Grid:
    """One exponent E that covers values below 2^E, and what it is chosen from."""

    e: int | None = None  # None: no value but zero was seen yet
    hist: list[int] = field(default_factory=list)  # the largest exponents of accepted steps, latest last
    seen: int = UNSEEN  # of this step

    @property
    def sound(self) -> bool:
        """Say whether this step's values lie below 2^E."""
        return self.seen == UNSEEN or (self.e is not None and self.seen <= self.e)

    def accept(self) -> None:
        if self.seen != UNSEEN:
            self.hist = [*self.hist, self.seen][-KEPT:]
            self.e = max(self.hist) + 1

    def fit(self) -> None:
        """Raise E to cover this step's values, with a factor of two to spare."""
        if self.seen != UNSEEN:
            self.e = self.seen + 1 if self.e is None else max(self.e, self.seen + 1)


@dataclass
class Sum:
    """The gradient of a layer's parameter as an integer sum, a multiple of a power of two."""

    layer: Any
    name: str  # of the parameter, which is looked up whenever it is needed: somebody may tie or replace it
    grids: tuple[Grid, ...]  # of its factors, or of its terms
    total: Tensor | None = None  # int64, of the parameter's shape; None where there was no backward

    def __post_init__(self) -> None:
        self.bits = FACTOR_BITS * 2 if len(self.grids) == 2 else TERM_BITS

    @property
    def parameter(self) -> Tensor:
        parameter: Tensor = getattr(self.layer, self.name)
        return parameter

    def room(self) -> Tensor:
        if self.total is None:
            self.total = zeros_for(self.parameter)
        return self.total

    def gradient(self, count: int) -> Tensor:
        assert self.total is not None
        return rounded(self.total, sum(g.e or 0 for g in self.grids) - self.bits, count)


def zeros_for(parameter: Tensor) -> Tensor:
    """Return room for a sum, int64, contiguous whatever the parameter's layout is."""
    return torch.zeros(parameter.shape, dtype=torch.int64, device=parameter.device)


def rounded(total: Tensor, scale: int, count: int = 1) -> Tensor:
    """Return total·2^scale / count, int64 -> float32."""
    return divided(total.double() * pow2f(scale), float(count)).float()


# -- the sums themselves -------------------------------------------------------------------------------------


def exponent_of(x: Tensor) -> int:
    """Return e of the largest |x|, `UNSEEN` where all are zero. VerityError for NaN and infinity."""
    e: int = engine_of(x.device).max_exponent(x)
    if e == NOT_FINITE:
        raise VerityError("a gradient or an activation is not finite.")
    if e == 0 and not bool(x.any()):
        return UNSEEN
    return max(e, LEAST_EXPONENT)


def on_grid(x: Tensor, e: int, bits: int) -> Tensor:
    """Return rint(x·2^(bits-e)) of any shape, as float64."""
    flat = x.reshape(1, -1)
    at = torch.full((1,), e, device=x.device)
    quantized: Tensor = engine_of(x.device).quantize_rows(flat, at, bits)
    return quantized.view(x.shape)


def chunks_on_grid(x: Tensor, e: int) -> list[Tensor]:
    """Put as many tokens at a time on the grid as a product can take, (N, K) float32."""
    return [on_grid(x[i : i + CHUNK], e, FACTOR_BITS) for i in range(0, len(x), CHUNK)]


def add_products(total: Tensor, dy: Tensor, e: int, inputs: Sequence[Tensor]) -> None:
    """Do total += dy^T x in units of 2^(e - 21) times those of x: dy (N, M), x in chunks -> (M, …) int64."""
    engine = engine_of(dy.device)
    total = total.view(len(total), -1)
    for a, b in zip(chunks_on_grid(dy, e), inputs, strict=True):
        engine.add_integers(total, a.t() @ b)


def add_terms(total: Tensor, terms: Tensor, e: int, ids: Tensor | None = None) -> None:
    """Do total += the terms' sum over tokens in units of 2^(e-40), by id if they have one."""
    engine = engine_of(terms.device)
    if ids is None:
        engine.sum_rows(terms, TERM_BITS - e, total)
    else:
        engine.sum_rows_by_id(terms, ids, TERM_BITS - e, total)


class OwnedByGrids:
    """Sums of a layer that a `Grids` may take over. A copy of the layer belongs to none, until its model's
    `Grids` is copied with it."""

    owner: Grids | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "owner"}


class Products(OwnedByGrids):
    """The gradients of layers' weights that are factors of one product: a grid for each one's dy, one for x.

    Without a `Grids` that has taken the layer over, each call to `gradients` is complete.
    """

    def __init__(self, layers: Sequence[Any]):
        inputs = Grid()
        self.sums = [Sum(layer, "weight", (Grid(), inputs)) for layer in layers]

    def gradients(self, parts: Sequence[Tensor], x: Tensor) -> list[Tensor | None]:
        """Return each weight's gradient from its part of dy, (N, M_j), and x, (N, K); None if summed up."""
        e_x = exponent_of(x)
        check_tokens(len(x))
        if self.owner is None:
            chunks = chunks_on_grid(x, 0 if e_x == UNSEEN else e_x)
            return [_complete(s, dy, chunks, e_x) for s, dy in zip(self.sums, parts, strict=True)]
        inputs = self.sums[0].grids[1]
        usable = self.owner.covers(inputs, e_x, len(x))
        chunks = chunks_on_grid(x, inputs.e or 0) if usable else []
        for s, dy in zip(self.sums, parts, strict=True):
            if s.parameter.requires_grad:
                room = s.room()
                grid = s.grids[0]
                if self.owner.covers(grid, exponent_of(dy), len(x)) and usable:
                    add_products(room, dy, grid.e or 0, chunks)
        return [None] * len(parts)


def _complete(s: Sum, dy: Tensor, chunks: Sequence[Tensor], e_x: int) -> Tensor | None:
    """Return a weight's gradient from one backward call alone; the chunks are those of its inputs."""
    if not s.parameter.requires_grad:
        return None
    e_dy = exponent_of(dy)
    total = zeros_for(s.parameter)
    if UNSEEN in (e_dy, e_x):
        return total.float()
    add_products(total, dy, e_dy, chunks)
    return rounded(total, e_dy + e_x - s.bits)


class Terms(OwnedByGrids):
    """The gradient of one parameter whose terms are given token by token."""

    def __init__(self, layer: Any, name: str):
        self.sum = Sum(layer, name, (Grid(),))
        self.sums = [self.sum]

    def gradient(self, terms: Tensor, ids: Tensor | None = None) -> Tensor | None:
        """Return the gradient from terms (N, d), which belong to the rows `ids`, (N,), of the parameter; None
        where they are summed up."""
        parameter = self.sum.parameter
        if not parameter.requires_grad:
            return None
        e = exponent_of(terms)
        check_tokens(len(terms))
        if self.owner is None:
            total = zeros_for(parameter)
            if e == UNSEEN:
                return total.float()
            add_terms(total, terms, e, ids)
            return rounded(total, e - self.sum.bits)
        grid = self.sum.grids[0]
        room = self.sum.room()
        if self.owner.covers(grid, e, len(terms)):
            add_terms(room, terms, grid.e or 0, ids)
        return None


def check_tokens(count: int) -> None:
    """Raise ValueError where the sums of so many tokens might not fit into int64."""
    if count > MOST_TOKENS:
        raise ValueError(f"a step takes {MOST_TOKENS} tokens at most, not {count}: use smaller batches.")


# -- over many backward calls --------------------------------------------------------------------------------


@contextlib.contextmanager
def step_of(what: Any) -> Iterator[None]:
    """End the step of a model at an error of ours inside: drop what its `Grids` have summed up so far.

    `what`: the sums of one of its layers, a tensor that it has computed, or a node of autograd's graph. A
    forward without gradients is no part of a step.
    """
    graded = torch.is_grad_enabled() or not isinstance(what, Products | Terms)
    try:
        yield
    except (VerityError, ValueError):
        owner = _owner_of(what) if graded else None
        if owner is not None:
            owner.reset()
        raise


def _owner_of(what: Any) -> Grids | None:
    """Return the `Grids` of the nearest exact layer by which this was computed; None where there is none."""
    left = [what.grad_fn if isinstance(what, Tensor) else what]
    seen: set[Any] = set()
    while left:
        node = left.pop(0)
        layer = node if isinstance(node, Products | Terms) else getattr(node, "summed", None)
        if isinstance(layer, Products | Terms):
            return layer.owner
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
    return None


class Grids:
    """Gradients of a model's exact layers as sums over any number of backward calls and workers.

    From now on backward calls leave `p.grad` alone. `finish(tokens)` writes it, or returns False: then repeat
    the backward calls of the same batch, which cannot fail twice. The first step is always repeated.

    Args:
        vouched: as in `check_model`.
    Raises:
        VerityError: a layer that is not exact, or a trained parameter that belongs to no exact layer.
    """

    def __init__(self, model: nn.Module, vouched: Sequence[Any] = ()):
        check_model(model, vouched)
        self.layers: list[Products | Terms] = [s for m in model.modules() for s in getattr(m, "summed", ())]
        self.sums = [s for layer in self.layers for s in layer.sums]
        # of each layer; where one of its grids does not fit, all are chosen anew
        self.sites = [list({id(g): g for s in layer.sums for g in s.grids}.values()) for layer in self.layers]
        self.grids = [g for site in self.sites for g in site]
        known = {id(s.parameter) for s in self.sums}
        for name, p in model.named_parameters():
            if p.requires_grad and id(p) not in known:
                raise VerityError(
                    f"{name} belongs to no exact layer, so its gradient cannot be summed exactly: freeze it "
                    "by requires_grad_(False), or train without Grids."
                )
        self.redone = 0  # steps whose backward calls were repeated
        self.tokens = 0  # the most that any sum has seen in this step
        self._counted: dict[int, int] = {}
        self._take_over()

    def _take_over(self) -> None:
        for layer in self.layers:
            layer.owner = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._take_over()

    def covers(self, grid: Grid, e: int, tokens: int) -> bool:
        """Note the largest exponent of some values; say whether they can be added: on the grid, not all
        zero."""
        self._counted[id(grid)] = self._counted.get(id(grid), 0) + tokens
        self.tokens = max(self.tokens, self._counted[id(grid)])
        grid.seen = max(grid.seen, e)
        return e != UNSEEN and grid.sound

    def reset(self) -> None:
        """Drop what this step has summed up so far; grids and gradients stay."""
        self.tokens = 0
        self._counted = {}
        for s in self.sums:
            s.total = None
        for g in self.grids:
            g.seen = UNSEEN

    @torch.no_grad()
    def finish(self, count: int, group: Any = None) -> bool:
        """End a step's backward calls. True: every `p.grad` is its sum divided by `count`.

        False: a value was too large for its grid. Nothing is written, `p.grad` is None, and the grids now fit
        this batch.

        Args:
            count: what the sums are divided by, usually this worker's tokens; 1 at least, on a worker among
                others 0.
            group: a process group, or True for the default one: its workers' sums and counts are added first.
        Raises:
            ValueError: 2^21 tokens or more, on all workers together.
            VerityError: a gradient that is too large for float32. Grids are as before the step then.
        """
        if not _is_int(count) or count < (group is None):
            raise ValueError(f"finish takes a number of tokens, a whole one, not {count!r}.")
        if group is not None:
            count = self._reduced(count, None if group is True else group)
        try:
            check_tokens(self.tokens)
            for s in self.sums:
                s.parameter.grad = None
            if all(g.sound for g in self.grids):
                self._write([(s, s.gradient(count)) for s in self.sums if s.total is not None])
                return True
            # a layer whose values did not fit chooses all its grids anew
            self.redone += 1
            for site in self.sites:
                if not all(g.sound for g in site):
                    for g in site:
                        g.fit()
            return False
        finally:
            self.reset()

    def _write(self, gradients: Sequence[tuple[Sum, Tensor]]) -> None:
        """Write every gradient, or none where one of them is not finite."""
        if not all_finite([gradient for _, gradient in gradients]):
            raise VerityError("a gradient is not finite.")
        for s, gradient in gradients:
            p = s.parameter
            p.grad = gradient if p.grad is None else p.grad + gradient  # a parameter of two layers
        for g in self.grids:
            g.accept()

    def _reduced(self, count: int, group: Any) -> int:
        """Add the workers' sums and counts, and take the largest of their exponents."""
        from torch import distributed

        device = self.sums[0].parameter.device
        noted = [g.seen for g in self.grids] + [int(s.total is not None) for s in self.sums]
        maxima = torch.tensor(noted, device=device)
        counts = torch.tensor([count, self.tokens], device=device)
        distributed.all_reduce(maxima, distributed.ReduceOp.MAX, group)
        distributed.all_reduce(counts, distributed.ReduceOp.SUM, group)
        largest = maxima.tolist()
        # every worker now sees the largest values of all, and adds what some worker has summed
        for g, seen in zip(self.grids, largest, strict=False):
            g.seen = seen
        for s, used in zip(self.sums, largest[len(self.grids) :], strict=True):
            if used:  # by some worker
                distributed.all_reduce(s.room(), distributed.ReduceOp.SUM, group)
        self.tokens = int(counts[1])
        return int(counts[0])

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step's grids follow from, by layer, for the checkpoint; plain numbers."""
        sites = []
        for site, layer in zip(self.sites, self.layers, strict=True):
            hist = [list(g.hist) for g in site]
            sites.append({"e": [g.e for g in site], "hist": hist, "shapes": _shapes(layer)})
        return {"sites": sites, "redone": self.redone}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. VerityError, and no change, where it is damaged or another model's."""
        try:
            sites = [list(zip(site["e"], site["hist"], strict=True)) for site in state["sites"]]
            shapes = [site["shapes"] for site in state["sites"]]
            redone = state["redone"]
            counted = _is_int(redone) and redone >= 0
            sized = all(_is_int(size) for layer in shapes for shape in layer for size in shape)
            sound = counted and sized and all(_is_grid(e, hist) for site in sites for e, hist in site)
        except (LookupError, RuntimeError, TypeError, ValueError):
            sound = False
        if not sound:
            raise VerityError("the state of the grids is damaged.")
        if shapes != [_shapes(layer) for layer in self.layers]:
            raise VerityError("the state of the grids is another model's: its layers have other shapes.")
        if [len(site) for site in sites] != [len(site) for site in self.sites]:
            raise VerityError("the state of the grids is damaged.")
        for saved, site in zip(sites, self.sites, strict=True):
            for (e, hist), g in zip(saved, site, strict=True):
                g.e, g.hist = e, list(hist)
        self.redone = redone
        self.reset()


def _shapes(layer: Products | Terms) -> list[list[int]]:
    return [list(s.parameter.shape) for s in layer.sums]


def _is_int(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_grid(e: Any, hist: Any) -> bool:
    """Say whether an exponent, or None, and its history are what `state_dict` writes."""
    values = hist if e is None else [e, *hist]
    inside = all(_is_int(x) and LEAST_EXPONENT <= x <= NOT_FINITE for x in values)
    return inside and len(hist) <= KEPT and (e is not None or not hist)
