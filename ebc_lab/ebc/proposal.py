"""`Proposal`: the update dW that the base optimizers propose at one step, before it is limited."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .flat import Copy, Layout, real
from .given.bases import Gradients
from .parallel.shards import local
from .parallel.workers import Workers
from .probe import LOW_PRECISION, Batch, Rows
from .scalars import Flag, Number, number
from .step import Arithmetic, StepStats, TorchArithmetic


class StateCopy(NamedTuple):
    """A copy of a weight in a base's state (Schedule-Free has one), and its value before the step."""

    weight: int  # index of the weight
    state: dict[Any, Any]
    key: str
    old: Tensor

    def scale(self, c: Number) -> None:
        """Scale its change by c in [0, 1], if the base keeps one of this weight at all."""
        new = kept_in(self.state, self.key)
        if new is not None:
            part = local(new)
            c = torch.as_tensor(c, dtype=part.dtype, device=part.device)
            part.copy_(torch.lerp(self.old.to(part.dtype), part, c))


def kept_in(state: dict[Any, Any], key: str) -> Tensor | None:
    """What a weight's state holds under `key`, itself or a dict in it, as heavyball has one for each part of
    a weight."""
    inner = (value for value in state.values() if isinstance(value, dict) and key in value)
    found: Tensor | None = state.get(key, next(inner, {}).get(key))
    return found


@dataclass(frozen=True)
class Opened:
    """A step whose bases have not stepped yet: the weights are at W."""

    t: int  # 0-based
    stats: StepStats
    batch: Batch | None  # None where the step measures nothing
    audit: bool
    curve: bool
    kept: Copy | None  # W, where the step needs it again
    copies: list[StateCopy]
    void: bool = False  # a bad gradient: the bases must not step


@dataclass(frozen=True)
class Proposal:
    """A step that the bases propose: the weights are at W + dW, and `kept` holds W if it is needed again."""

    t: int  # the step, 0-based
    measured_batch: Batch | None  # None where the step measures nothing
    layout: Layout
    kept: Copy | None
    state_copies: list[StateCopy]
    sound: Flag  # whether gradients and proposal are finite
    on_host: bool  # whether numbers are floats, see `scalars`
    arithmetic: Arithmetic
    workers: Workers
    names: Sequence[str]
    weights: Sequence[nn.Parameter]  # at W + dW
    scaled: Sequence[int]  # indices of the weights that c scales
    found: Gradients  # as the bases have found them
    retract: Callable[[], None] | None  # puts the weights back on their manifold
    audited: bool

    @cached_property
    def gradients(self) -> list[Tensor | None]:
        """Those of the weights, at W."""
        return self.found.of(self.weights)

    @property
    def before(self) -> Copy:
        assert self.kept is not None, "W is kept with `keeps_old` and at audits only"
        return self.kept

    @property
    def batch(self) -> Batch:
        assert self.measured_batch is not None, "the step measures nothing"
        return self.measured_batch

    @property
    def audit_rows(self) -> Rows:
        assert self.batch.held is not None, "the step is not audited"
        return self.batch.held

    @property
    def old(self) -> list[Tensor]:
        """W, one tensor for each weight."""
        return self.before.views

    def number(self, measured: Tensor) -> Number:
        """A 0-dim tensor as the numbers of this step are."""
        return number(measured, self.on_host)

    def updates(self) -> tuple[Tensor, ...]:
        """dW, one tensor for each weight."""
        return torch._foreach_sub(list(self.layout.weights), self.old)

    @cached_property
    def length(self) -> Number:
        """||dW|| of what c scales, while the weights are at W + dW."""
        return self.norm()

    def norm(self, *, whole: bool = False) -> Number:
        """How far the weights are from W, of what c scales or of the `whole`."""
        if not isinstance(self.arithmetic, TorchArithmetic):
            updates = self.updates()
            chosen = range(len(updates)) if whole else self.scaled
            return self.number(self.arithmetic.norm([updates[i] for i in chosen]))
        segments = range(len(self.layout.parts)) if whole else self.layout.moving
        return self._joined([_distance(self.layout.parts[i], self.before.parts[i]) for i in segments])

    def old_norm(self) -> Number:
        """Return ||W|| before the step, over the weights that c scales."""
        if not isinstance(self.arithmetic, TorchArithmetic):
            return self.number(self.arithmetic.norm([self.old[i] for i in self.scaled]))
        return self._joined([_length(self.before.parts[i]) for i in self.layout.moving])

    def _joined(self, lengths: list[Tensor]) -> Number:
        """The length of all parts of every process together."""
        if self.on_host and self.workers.alone:
            return math.hypot(*map(float, lengths))
        total: Tensor = torch.linalg.vector_norm(torch.stack(lengths).double())
        return self.number(self.workers.joined_norm(total))

    def fall_and_norm(self) -> tuple[Number, Number]:
        """-<g, dW> with the weights' gradients g, and ||dW||, of what c scales.

        The copy for trial weights is overwritten: it holds dW meanwhile.
        """
        layout, room = self.layout, self.layout.trial
        parts = [room.parts[i] for i in layout.moving]
        for i, part in zip(layout.moving, parts, strict=True):
            torch.sub(layout.parts[i], self.before.parts[i], out=part)
        norm = self._joined([_length(part) for part in parts])
        members = [j for i in layout.moving for j in layout.segments[i].members]
        known = {j: real(g) for j in members if (g := self.gradients[j]) is not None}
        if known:
            torch._foreach_mul_([real(room.views[j]) for j in known], list(known.values()))
        for j in set(members).difference(known):
            room.views[j].zero_()
        fall = -torch.stack([part.sum(dtype=_norm_dtype(part)) for part in map(real, parts)]).double().sum()
        return self.number(self.workers.joined(fall)), norm

    def interpolate(self, c: Number, out: Sequence[Tensor], segments: Sequence[int] | None = None) -> None:
        """Set `segments`, by default what c scales, to W + c·dW, exact at 0 and 1, in `out`, by segment."""
        segments = self.layout.moving if segments is None else segments
        old = [self.before.parts[i] for i in segments]
        new = [self.layout.parts[i] for i in segments]
        self.arithmetic.interpolate(old, new, c, [out[i] for i in segments])

    def apply(self, c: Number) -> None:
        """Move what c scales from W + dW to W + c·dW."""
        self.interpolate(c, self.layout.parts)
        self.layout.write(self.layout.moving)

    def by_name(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return one tensor for each weight as derivatives take them: by name, float32 at least."""
        wide = (w.float() if w.dtype in LOW_PRECISION else w for w in tensors)
        return {f"model.{n}": w for n, w in zip(self.names, wide, strict=True)}

    def kl(self, c: Number, rows: Rows, *, whole: bool = False) -> Number:
        """Return KL(p(W) || p(W + c·dW)) on `rows` of every process, nats per token.

        Noise may make it < 0. For the rest see `logits_at`.
        """
        z = self.logits_at(c, rows, whole=whole)
        kl = self.arithmetic.mean_kl(rows.z, z, rows.mask, self.on_host)
        return self.number(self.workers.mean(kl, rows.count()))

    def logits_at(self, c: Number, rows: Rows, *, whole: bool = False) -> Tensor:
        """Return z(W + c·dW) on `rows`.

        What c does not scale stays at W, or is scaled as well if `whole`. The weights are as before
        afterwards; the copy for trial weights is overwritten.
        """
        layout = self.layout
        trial = layout.trial
        self.interpolate(c, trial.parts, range(len(layout.parts)) if whole else layout.moving)
        if not whole:
            for i in set(range(len(layout.parts))).difference(layout.moving):
                trial.parts[i].copy_(self.before.parts[i])
        with trial.standing_in(layout.weights):
            if self.retract is not None:
                self.retract()
            return self.batch.moved(rows)

    def scale_states(self, c: Number, scaled: Container[int]) -> None:
        """Scale the bases' own copies of the weights `scaled` as the weights are scaled."""
        for copy in self.state_copies:
            if copy.weight in scaled:
                copy.scale(c)

    def restore(self) -> None:
        """Put the weights back at W."""
        self.before.restore()


def _norm_dtype(part: Tensor) -> torch.dtype:
    """float32, or the part's own where that is wider: a norm in bfloat16 is off by up to 0.4%."""
    return torch.float32 if part.dtype in LOW_PRECISION else part.dtype


def _length(part: Tensor) -> Tensor:
    """||part||, 0-dim, in float32 at least."""
    length: Tensor = torch.linalg.vector_norm(part, dtype=_norm_dtype(part))
    return length


def _distance(new: Tensor, old: Tensor) -> Tensor:
    """||new - old||, 0-dim, in float32 at least; `torch.dist` answers in what it is given."""
    if new.dtype not in LOW_PRECISION:
        return torch.dist(new, old)
    return _length(new - old)
