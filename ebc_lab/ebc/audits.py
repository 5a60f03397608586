"""`AuditedOptimizer`: the batch of a step, and how far the applied update moves predictions on part of it.

Some rows choose c; others, which had no part in that, audit it. The logits that a step is given are
looked at, too: wrong ones would make c fall to 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .given import checks
from .given.rows import Choice, counted_first
from .options import CURVE_SCALES
from .parallel.workers import Workers
from .probe import Batch, Rows
from .proposal import Proposal
from .step import Arithmetic, StepInputs, StepStats
from .wrapping import WrappingOptimizer


class AuditedOptimizer(WrappingOptimizer):
    """A wrapping optimizer that measures what its steps do; `StabilizedOptimizer` sets what it reads."""

    deferred = False  # reads nothing on the host: the bases must then heed `found_inf`, as torch's fused do
    watches_given = False  # whether audits look at the logits given, not only the first step
    probe_sequences: int | str | None
    audit_every: int
    audit_tokens: int
    curve_every: int
    arithmetic: Arithmetic
    workers: Workers
    _one: Tensor
    _flags: tuple[Tensor, ...]

    def any_process(self, flag: bool) -> bool:
        """Return whether it is true in one of the processes that train together."""
        return bool(self.workers.any(self._flags[flag]))

    def audits(self, t: int) -> bool:
        """Whether step `t` is one at which the applied KL is measured, if its batch has rows for that."""
        return self.audit_every > 0 and t % self.audit_every == 0

    def _curves(self, t: int) -> bool:
        """Whether step `t` measures the KL at many scales of the proposal."""
        return self.curve_every > 0 and t > 0 and t % self.curve_every == 0

    def _held(self, inputs: StepInputs) -> tuple[bool, bool]:
        """Whether this step is audited, and whether it draws a curve; neither on a batch too short for it."""
        audit = self.audits(inputs.t)
        curve = self._curves(inputs.t)
        if not audit and not curve:
            return False, False
        choice = self._choice(inputs)
        short = choice.size <= choice.k
        if inputs.mask is not None and not self.deferred:
            short = short or not bool(choice.taken(inputs.mask, choice.k, choice.size).any())
        if not self.workers.alone:
            short = self.any_process(short)
        if short:
            return False, False
        return audit, curve

    def _rows_first(self, inputs: StepInputs) -> StepInputs:
        """With the batch's axis in front in all but what the model takes."""
        if not self.prober.axis:
            return inputs
        front = self.prober.rows_first
        return replace(
            inputs,
            logits=None if inputs.logits is None else front(checks.logits_in(inputs.logits)),
            mask=None if inputs.mask is None else front(inputs.mask),
            targets=None if inputs.targets is None else front(inputs.targets),
        )

    def _choice(self, inputs: StepInputs) -> Choice:
        """Which rows choose c: the leading ones, if positions of theirs count and `spread` is not set."""
        logits = None if inputs.logits is None else checks.logits_in(inputs.logits)
        size = checks.rows_of(inputs.tokens, logits, inputs.mask, self.prober.axis)
        order = None
        if self.spread and not self.deferred:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(inputs.t))
        if inputs.mask is None or self.deferred:
            return Choice(size, self._few(inputs, logits, size), order)
        counted = inputs.mask.reshape(size, -1).sum(1).cpu()
        k = self._enough(counted, order)
        later = counted_first(counted, order, k)
        return Choice(size, k if later is order else self._enough(counted, later), later)

    def _few(self, inputs: StepInputs, logits: Tensor | None, size: int) -> int:
        """How many rows choose c where all positions count."""
        if self.probe_sequences is not None:
            return size if self.probe_sequences == "all" else int(self.probe_sequences)
        like = logits[..., 0] if logits is not None else inputs.mask
        if like is None:  # neither is given: tokens are one for each position, most of the time
            like = next(t for t in checks.tensors_in(inputs.tokens) if t.ndim > self.prober.axis)
            like = self.prober.rows_first(like)
        in_a_row = like.numel() // max(1, size)
        return self._at_most(-(-checks.ENOUGH_TOKENS // max(1, in_a_row)), size)

    def _enough(self, counted: Tensor, order: Tensor | None) -> int:
        """How many rows choose c, of rows with `counted` positions each, (B,) on the CPU."""
        if self.probe_sequences is not None:
            return len(counted) if self.probe_sequences == "all" else int(self.probe_sequences)
        tokens = (counted if order is None else counted[order]).cumsum(0)
        return self._at_most(1 + int((tokens < checks.ENOUGH_TOKENS).sum()), max(1, int((counted > 0).sum())))

    def _at_most(self, k: int, size: int) -> int:
        """`k` rows, two at least and as many as leave a quarter of `size`, those that count, for audits."""
        most = size - max(1, size // 4) if self.audit_every and size > 1 else size
        return min(max(k, 2), most)

    def _batch(self, inputs: StepInputs, held: bool) -> Batch:
        """`held`: with the rows of an audit."""
        batch = self._batch_of(inputs, held)
        if self.deferred:
            return batch
        renewed = False
        if self.given.due(self._collapsed()):
            renewed = self._check_given(batch, inputs)
            self.given.looked_at(self._collapsed())
        if self.watches_given and batch.held is not None and not self.workers.sharded and not renewed:
            renewed = self._watch_given(batch, inputs, batch.held)
        return self._batch_of(inputs, held) if renewed else batch

    def _batch_of(self, inputs: StepInputs, held: bool) -> Batch:
        return Batch(
            self.prober,
            inputs,
            self.weights[0],
            self._choice(inputs),
            audit=held,
            audit_tokens=self.audit_tokens,
        )

    def _collapsed(self) -> float:
        """The c of the step before, where measurements on logits that were given chose it; else 1."""
        return 1.0

    def _check_given(self, batch: Batch, inputs: StepInputs) -> bool:
        """At the first batch, and when c collapses: are the logits given the model's own on the batch?

        Returns whether they are computed anew from now on, as where the training forward draws random numbers
        that no module shows. Raises ValueError, at the first batch, where they are another batch's.
        """
        kl = batch.check_given(batch.probe)
        if kl is None and self.workers.alone:
            return False
        # a process without given logits contributes zero weight, and takes part: the others wait for it
        count = 0 if kl is None else batch.probe.count()
        difference = float(self.workers.mean(self._one if kl is None else kl, count))
        if not difference > max(10 * batch.floor, self._most_differing()):
            return False
        return self.given.answer(batch, inputs, difference, self.workers.alone)

    def _watch_given(self, batch: Batch, inputs: StepInputs, held: Rows) -> bool:
        """At an audit, `_check_given` on its rows, since what is too small to be seen at the first batch may
        grow in training."""
        kl = batch.check_given(held)
        if kl is None or not kl > max(10 * batch.floor, self._most_differing()):
            return False
        self.watches_given = False
        return self.given.answer(batch, inputs, float(kl), self.workers.alone)

    def _most_differing(self) -> float:
        """How far given logits may lie from the model's own, nats per token."""
        return 1e-3

    def _slope(self, proposal: Proposal) -> Tensor:
        """<gradient, dW>, 0-dim float64."""
        triples = zip(proposal.gradients, proposal.old, proposal.layout.weights, strict=True)
        moved = [(g, w, new) for g, w, new in triples if g is not None]
        if not moved:
            return torch.zeros_like(proposal.sound, dtype=torch.float64)
        gradients, old, new = zip(*moved, strict=True)
        return self.workers.joined(self.arithmetic.slope(gradients, old, new))

    def _kl_curve(self, proposal: Proposal) -> Tensor:
        """The KL at CURVE_SCALES of the whole proposal, on the held rows; NaN where it is not finite."""
        kls = [proposal.kl(c, proposal.audit_rows, whole=True) for c in CURVE_SCALES]
        curve = torch.stack(kls).double().clamp(min=0)
        return torch.where(curve.isfinite() & proposal.sound, curve, torch.nan)

    def _audit(self, stats: StepStats, proposal: Proposal) -> None:
        """Measure how far the applied update moved the predictions on the held rows."""
        audit_rows = proposal.audit_rows
        z_new = proposal.batch.moved(audit_rows)
        tokens = audit_rows.count()
        kl = self.arithmetic.mean_kl(audit_rows.z, z_new, audit_rows.mask)
        movement = self.arithmetic.movement(audit_rows.z, z_new, audit_rows.mask)
        stats.audit_tokens = proposal.batch.held_tokens
        if not self.workers.alone:
            kl, square, counted = self.workers.pooled(tokens, kl, movement.double().square())
            movement = square.sqrt()
            stats.audit_tokens = int(counted)
        stats.applied_kl = kl.clamp(min=0)
        stats.movement = movement
        if proposal.kept is not None:
            stats.applied_norm = proposal.norm(whole=True)
        if self.deferred:  # the host does not know yet whether the step was skipped: then it is not audited
            stats.applied_kl = torch.where(stats.skipped, torch.nan, stats.applied_kl)
            stats.movement = torch.where(stats.skipped, torch.nan, stats.movement)
            if stats.applied_norm is not None:
                stats.applied_norm = torch.where(stats.skipped, torch.nan, stats.applied_norm)
