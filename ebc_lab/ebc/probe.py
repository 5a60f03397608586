"""One batch as the method sees it: the rows that choose c, the rows that audit it, and the logits on them.

Measurements run with dropout off, in the training forward's precision; sensitivities in float32 outside
autocast.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from .given import checks, rows
from .given.numbers import Numbers, kept
from .given.rows import At, Choice
from .given.state import ModelState
from .logits import mean_cross_entropy, mean_kl
from .options import KL_FLOOR
from .parallel.shards import fsdp_modules, gathered_dtypes, resharded
from .parallel.workers import Workers
from .step import StepInputs

BatchNorm = nn.modules.batchnorm._BatchNorm
LOW_PRECISION = (torch.bfloat16, torch.float16)
RATES = ("dropout", "attention_dropout", "dropout_p", "drop_prob")  # of modules that call it as a function


class Prober(nn.Module):
    """A model and its user's forward as one module, so that `functional_call` can swap weights under both.

    `fresh_logits`: whether the training forward's logits are not those of the model without dropout;
    `seconds`: the host time spent measuring. `compiled`, if training calls that instead of the model, is
    called by `as_trained` alone, because rounding that differs between z(W) and z(W + c·dW) would count as
    KL. `functional_call` and transforms call the model itself. `axis`: that of the batch, in what the model
    takes and returns; the logits returned here have the rows first. `refusals`: what a forward may raise for
    weights that have gone too far.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[nn.Module, Any], Any] | None,
        fresh_logits: bool | None,
        compiled: nn.Module | None = None,
        axis: int = 0,
        refusals: tuple[type[Exception], ...] = (),
    ):
        super().__init__()
        self.model = model
        self.axis = axis
        self.refusals = refusals
        # in a tuple, so that torch does not see a second owner of the weights
        self._called = (model if compiled is None else compiled,)
        self.call = forward or _call
        self.fresh_logits = any(map(_draws, model.modules())) if fresh_logits is None else fresh_logits
        self.normalises = any(isinstance(m, BatchNorm) for m in model.modules())
        self.seconds = 0.0
        self.state = ModelState(model)
        self.sharded: list[Any] = []  # the modules whose weights FSDP gathers for a forward
        self.low_precision: bool  # whether the forward itself computes so, without autocast: find_shards()
        # (inputs, rows) -> those rows; None: `rows.cut`
        self.cut_by: Callable[[Any, Tensor], Any] | None = None
        self.whole = False  # whether it is called on whole batches, and some rows of its logits are read
        self.watched = 0  # calls in which random numbers are still looked for
        self.draws = False  # whether it draws some in evaluation, too
        self.numbers: Numbers | None = None  # those that all measurements of a step draw then

    def find_shards(self) -> None:
        """Look at the model as it is trained."""
        self.sharded = fsdp_modules(self.model)
        dtypes = {p.dtype for p in self.model.parameters()} | gathered_dtypes(self.sharded)
        self.low_precision = not dtypes.isdisjoint(LOW_PRECISION)

    def forget(self) -> None:
        """Free the weights that FSDP has gathered: they have changed since."""
        with resharded(self.sharded):
            pass

    def forward(self, inputs: Any) -> Tensor:
        return self.rows_first(checks.logits_in(self.call(self.model, inputs)))

    def as_trained(self, inputs: Any) -> Tensor:
        """The logits by the same code as the training forward's."""
        with resharded(self.sharded):
            try:
                output = self._called_with_its_numbers(inputs)
            except Exception as error:
                known = isinstance(error, (torch.OutOfMemoryError, checks.NoLogitsError, *self.refusals))
                if known or "memory" in str(error):  # of a CPU torch has no class
                    raise
                raise checks.ForwardError(error) from error
        return self.rows_first(checks.logits_in(output))

    def _called_with_its_numbers(self, inputs: Any) -> Any:
        """Where the model draws random numbers in evaluation: the same at W and at W + c·dW, and none that
        training would have drawn."""
        if not self.draws and self.watched <= 0:
            return self.call(self._called[0], inputs)
        before = Numbers()
        if self.draws and self.numbers is not None:
            self.numbers.restore()
        try:
            return self.call(self._called[0], inputs)
        finally:
            self.watched -= 1
            self.draws = self.draws or before.drawn()
            before.restore()

    def rows_first(self, x: Tensor) -> Tensor:
        """Logits, or what belongs to their positions, with the batch's axis in front."""
        return x.movedim(self.axis, 0) if self.axis else x

    def cut(self, inputs: Any, at: At, size: int) -> Any:
        """Some rows of a batch of `size` rows."""
        if self.cut_by is not None:
            return self.cut_by(inputs, torch.arange(at.start, at.stop) if isinstance(at, slice) else at)
        return rows.cut(inputs, at, size, self.axis)

    def read_whole(self, why: str, k: int, size: int) -> None:
        """Call the model on whole batches from now on, which is told."""
        self.whole = True
        warnings.warn(checks.read_whole(why, k, size, self.axis), checks.EBCWarning, stacklevel=2)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """In evaluation mode and the clock on; afterwards the model is as it was."""
        start = time.perf_counter()
        try:
            with self.state.undisturbed():
                yield
        finally:
            self.seconds += time.perf_counter() - start


class Cause(Enum):
    """Why logits that were given differ from the model's own on some rows of their batch."""

    ROWS = "a row's logits depend on the others"
    TRAINING = "the model does something in training that it does not do in evaluation"
    UNKNOWN = "another batch, or something was written to"


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch and z, the model's logits on them at W."""

    inputs: Any
    at: At | None  # their places in the batch; None where they are a batch of their own
    mask: Tensor | None
    targets: Tensor | None
    z: Tensor

    def count(self) -> Tensor | int:
        """The tokens that count; a 0-dim tensor under a mask."""
        return self.z[..., 0].numel() if self.mask is None else self.mask.sum()


class Batch:
    """The first `k` rows of a choice (`probe`) choose c; if an audit is due, enough others (`held`) judge it.

    Args:
        inputs: of the step; its `probe` rows, if given, choose c instead, and the audit still leaves out the
            first `k`. Logits that are not given are computed.
        weight: any of the trained weights, for device and precision.
        choice: of rows.
        audit: whether rows are held back for one; the batch needs more than `k` of them then.
    Raises:
        ValueError: no tokens, or logits that are not the batch's.
    """

    def __init__(
        self,
        prober: Prober,
        inputs: StepInputs,
        weight: Tensor,
        choice: Choice,
        *,
        audit: bool,
        audit_tokens: int,
    ):
        self.prober = prober
        if prober.watched > 0 or prober.draws:
            prober.numbers = Numbers()
        logits = None if inputs.logits is None else checks.logits_in(inputs.logits)
        self.tokens = inputs.tokens
        self.choice = choice
        self.size = size = choice.size
        k = choice.k
        if not prober.whole and prober.cut_by is None:
            why = checks.uncut(inputs.tokens, logits, size, prober.axis)
            if why is not None:
                prober.read_whole(why, k, size)
        like = weight if logits is None else logits
        self.device = like.device.type
        cast = _low_precision(like, self.device)
        low_weights = weight.dtype in LOW_PRECISION or prober.low_precision
        self.autocast = cast if torch.is_autocast_enabled(self.device) or not low_weights else None
        self.floor = KL_FLOOR["bfloat16" if cast or low_weights else "float32"]

        drawn = prober.fresh_logits and prober.model.training
        z = None if logits is None or drawn or inputs.stale else logits.detach()
        self.reused = z is not None and inputs.probe is None  # whether z(W) was given for the probe rows
        self.probe = self._probe(inputs, z)
        self.held: Rows | None = None
        self.held_tokens = 0
        self.few: Rows | None = None  # the first of them, on which given logits are looked at
        if audit:
            row = (self.probe.z if logits is None else logits)[0]
            mask = None if inputs.mask is None else choice.taken(inputs.mask, 0, size)
            end, self.held_tokens = _audited_rows(size, k, audit_tokens, row[..., 0].numel(), mask)
            self.held = self._rows(inputs, None, z, k, end)
            if self.reused:
                end, _ = _audited_rows(size, k, checks.FEW_TOKENS, row[..., 0].numel(), mask)
                self.few = self._rows(inputs, None, z, k, end)

    def _probe(self, inputs: StepInputs, z: Tensor | None) -> Rows:
        if inputs.probe is None:
            return self._rows(inputs, inputs.targets, z, 0, self.choice.k)
        tokens, targets = inputs.probe
        size = checks.rows_of(tokens, None, None, self.prober.axis)
        at = slice(0, min(self.choice.k, size))
        cut = rows.cut(tokens, at, size, self.prober.axis)
        return Rows(cut, None, None, None if targets is None else rows.take(targets, at), self.logits(cut))

    def _rows(
        self, inputs: StepInputs, targets: Tensor | None, z: Tensor | None, start: int, end: int
    ) -> Rows:
        at = self.choice.at(start, end)
        some = self.cut(at)
        mask = None if inputs.mask is None else rows.take(inputs.mask, at)
        targets = None if targets is None else rows.take(targets, at)
        if z is not None:
            return Rows(some, at, mask, targets, rows.take(z, at))
        return Rows(some, at, mask, targets, self.logits(some, at, None if mask is None else mask.shape))

    def cut(self, at: At) -> Any:
        """What the model is called on for some rows: all, where it takes no part, or where they are all."""
        every = isinstance(at, slice) and at.stop - at.start == self.size
        return self.tokens if self.prober.whole or every else self.prober.cut(self.tokens, at, self.size)

    def probe_tokens(self, workers: Workers) -> Tensor | int:
        """Return how many tokens choose c, on all processes, 1 at least."""
        count = self.probe.count()
        if not workers.alone:
            count = workers.total(count)[0]
        return count.double().clamp(min=1) if isinstance(count, Tensor) else max(count, 1)

    def logits(self, inputs: Any, at: At | None = None, like: torch.Size | None = None) -> Tensor:
        """The logits on `inputs`, some rows of the batch, at the present weights.

        Without dropout, in the training forward's precision. Where the model cannot be called on these rows
        alone, or has other positions for them than it should, it is called on whole batches from now on.

        Args:
            at: the places of these rows in the batch. None: a batch of their own.
            like: the shape that their logits must have, or the leading part of it.
        Raises:
            ValueError: the forward failed on the whole batch, too, or has another shape there.
        """
        with self.prober.measuring(), self._precision():
            if at is None:
                return self.prober.as_trained(inputs)
            why = None
            if inputs is not self.tokens and not self.prober.whole:
                some, why = self._of_some(inputs, at, like)
                if why is None:
                    return some
            z = self.prober.as_trained(self.tokens)
            whole = rows.take(z, at) if len(z) == self.size else z
            if len(z) != self.size or (like is not None and whole.shape[: len(like)] != like):
                raise checks.other_shape(like or (self.size,), whole.shape)
            if why is not None:
                self.prober.read_whole(why, self.choice.k, self.size)
            return whole

    def _of_some(self, inputs: Any, at: At, like: torch.Size | None) -> tuple[Tensor, str | None]:
        """The logits of a forward on some rows alone, and why they will not do."""
        count = len(at) if isinstance(at, Tensor) else at.stop - at.start
        about = f"EBC calls the model on {count} of the batch's {self.size} rows"
        try:
            z = self.prober.as_trained(inputs)
        except checks.ForwardError as error:
            if self.prober.sharded:  # the other processes would wait for a second forward
                raise
            return torch.empty(0), f"{about}, and that failed ({checks.failed(error.__cause__)})"
        if like is None or z.shape[: len(like)] == like:
            return z, None
        return (
            z,
            f"{about} and gets logits of shape {tuple(z.shape)}, which are {tuple(like)} among all of them",
        )

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Run the model without gradients, in the dtype of the training's autocast.

        Its cache is cleared and off: it may hold a low-precision copy of a weight that was changed in place.
        """
        torch.clear_autocast_cache()
        with torch.no_grad():
            if self.autocast is None:
                yield
                return
            with torch.autocast(self.device, self.autocast, cache_enabled=False):
                yield

    def moved(self, some: Rows) -> Tensor:
        """The logits on `some` rows at the present weights, which have moved from W.

        All NaN if the forward raises one of the prober's `refusals`.
        """
        try:
            return self.logits(some.inputs, some.at, some.z.shape)
        except self.prober.refusals:
            return torch.full_like(some.z, torch.nan)

    def check_given(self, some: Rows) -> Tensor | None:
        """How far z(W) as given lies from what the model says on `some` rows now, nats per token, 0-dim.

        None where z(W) was not given.
        """
        if not self.reused:
            return None
        return mean_kl(some.z, self.moved(some), some.mask)

    def cause(self, inputs: StepInputs) -> Cause:
        """Name why some rows of the logits given differ from the model's own, by two forwards on all."""
        passed = checks.logits_in(inputs.logits)
        computed = self.logits(self.tokens, slice(0, self.size))
        if (
            computed.shape == passed.shape
            and float(mean_kl(passed, computed, inputs.mask)) <= 10 * self.floor
        ):
            return Cause.ROWS
        with kept(), self._precision(), self.prober.state.unchanged():
            trained = self.prober.as_trained(inputs.tokens)
        differs = (
            trained.shape == computed.shape
            and float(mean_kl(computed, trained, inputs.mask)) > 10 * self.floor
        )
        return Cause.TRAINING if differs else Cause.UNKNOWN

    def functional(self, weights: dict[str, Tensor]) -> Tensor:
        """The probe rows' logits at other weights (`model.<name>`), in their precision, outside autocast.

        Weights that are not given are the model's own.
        """
        with self.prober.measuring(), torch.autocast(self.device, enabled=False):
            whole = self.prober.whole and self.probe.at is not None
            inputs = self.tokens if whole else self.probe.inputs
            out: Tensor = torch.func.functional_call(self.prober, weights, (inputs,))
            if whole and self.probe.at is not None:
                out = rows.take(out, self.probe.at)
            if out.shape != self.probe.z.shape:
                raise checks.other_shape(self.probe.z.shape, out.shape)
            return out

    def probe_loss(self, z: Tensor) -> Tensor:
        """Mean cross-entropy of logits on the probe rows, float32 or better, nats per token."""
        assert self.probe.targets is not None
        return mean_cross_entropy(z, self.probe.targets, self.probe.mask)


class GivenLogits:
    """What is known of the logits that steps are given: are they the model's own, so that z(W) is at hand?

    `fresh_logits`: what was asked for, see `StabilizedOptimizer`.
    """

    def __init__(self, prober: Prober, fresh_logits: bool | None):
        self.prober = prober
        self.settled = fresh_logits is not None  # else it is found out
        self.resumed = False  # whether steps before have taken them for the model's own
        # the c down to which they are known to be; NaN: they have not been looked at
        self.known_to = 0.0 if fresh_logits is False else math.nan

    @property
    def first(self) -> bool:
        return math.isnan(self.known_to)

    def look(self, batch: Batch, inputs: StepInputs, c: float, limit: float, workers: Workers) -> bool:
        """At the first batch, and whenever c has fallen to a tenth of what it was then: are the logits given
        the model's own on the batch, up to a KL of `limit`?

        Returns whether they are computed anew from now on, as where the training forward draws random numbers
        that no module shows. Raises ValueError, at the first batch, where they are another batch's.
        """
        if not self.first and not c < 0.1 * self.known_to:
            return False
        renewed = False
        kl = batch.check_given(batch.probe)
        if kl is not None or not workers.alone:
            # a process without given logits contributes zero weight, and takes part: the others wait for it
            count = 0 if kl is None else batch.probe.count()
            difference = float(workers.mean(torch.ones(()) if kl is None else kl, count))
            if difference > limit:
                renewed = self.answer(batch, inputs, difference, workers.alone)
        self.known_to = min(1.0, max(c, 1e-9))
        return renewed

    def renew(self) -> None:
        """Compute z(W) anew from now on, unless something else was asked for."""
        self.prober.fresh_logits = self.prober.fresh_logits or not self.settled

    def answer(self, batch: Batch, inputs: StepInputs, kl: float, alone: bool) -> bool:
        """To logits that differ by `kl`: an error, a warning, or logits that are computed anew (True).

        `alone`: whether no other process waits meanwhile. Raises ValueError at the first batch.
        """
        cause = batch.cause(inputs) if alone else Cause.UNKNOWN
        if cause is Cause.ROWS and not self.prober.whole:
            why = (
                f"a row's logits depend on other rows: called on {batch.choice.k} rows alone, the model "
                f"differs by a KL of {kl:.2g} nats per token from what it says of them among all"
            )
            self.prober.read_whole(why, batch.choice.k, batch.size)
            return True
        error = checks.differing(kl)
        if self.first and not self.resumed and cause is not Cause.TRAINING:
            raise error
        renews = alone and cause is not Cause.ROWS and not self.settled
        message = checks.renewed(kl) if renews else str(error)
        warnings.warn(message, checks.EBCWarning, stacklevel=2)
        if renews:
            self.renew()
        return renews


def _draws(module: nn.Module) -> bool:
    """Whether a module's output differs in training: batch-norm, or dropout, that of recurrent layers and of
    attention too, which have no module for it."""
    if isinstance(module, BatchNorm):
        return True
    names = ("p",) if isinstance(module, nn.modules.dropout._DropoutNd) else RATES
    rates = [getattr(module, name, 0) for name in names]
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)


def _low_precision(like: Tensor, device: str) -> torch.dtype | None:
    """The dtype of the enclosing autocast, or else that of the logits, if it is a low-precision one."""
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return like.dtype if like.dtype in LOW_PRECISION else None


def _audited_rows(
    size: int, k: int, tokens: int, tokens_per_row: int, mask: Tensor | None
) -> tuple[int, int]:
    """The end of the rows that, from the k-th on, hold at least `tokens` tokens, and how many they hold."""
    if mask is None:
        end = min(size, k - (-tokens // tokens_per_row))
        return end, (end - k) * tokens_per_row
    counts = mask[k:].reshape(size - k, -1).sum(1).cumsum(0)
    end = min(size, k + 1 + int((counts < tokens).sum()))
    return end, int(counts[end - k - 1])


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
