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

from .given import checks
from .given.numbers import Numbers, kept
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
        self.sharded: list[Any] = []  # the modules whose weights FSDP gathers for a forward
        self.low_precision: bool  # whether the forward itself computes so, without autocast: find_shards()
        self.takes_some = False  # whether it has been called on some rows of a batch
        self.watched = 0  # calls in which random numbers are still looked for
        self.draws = False  # whether it draws some in evaluation, too
        self.numbers: Numbers | None = None  # those that all measurements of a step draw then

    def find_shards(self) -> None:
        """Look at the model as it is trained."""
        self.sharded = fsdp_modules(self.model)
        dtypes = {p.dtype for p in self.model.parameters()} | gathered_dtypes(self.sharded)
        self.low_precision = not dtypes.isdisjoint(LOW_PRECISION)

    def forget(self) -> None:
        """What FSDP has gathered: the weights have changed."""
        with resharded(self.sharded):
            pass

    def forward(self, inputs: Any) -> Tensor:
        return self.rows_first(checks.logits_in(self.call(self.model, inputs)))

    def as_trained(self, inputs: Any, part: tuple[int, int] | None = None) -> Tensor:
        """The logits by the same code as the training forward's.

        `part`: how many rows of how many `inputs` are. Raises ValueError where the model takes no part.
        """
        with resharded(self.sharded):
            try:
                output = self._called_with_its_numbers(inputs)
            except Exception as error:
                known = isinstance(error, (torch.OutOfMemoryError, *self.refusals))
                # a TypeError is of what it is called with, and says so
                if part is None or self.takes_some or known or isinstance(error, TypeError):
                    raise
                raise checks.not_by_rows(*part, error, self.axis) from error
        self.takes_some = self.takes_some or part is not None
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

    def cut(self, inputs: Any, start: int, stop: int, size: int) -> Any:
        """Rows `start` to `stop` of a batch of `size` rows."""
        return checks.cut(inputs, start, stop, size, self.axis)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Dropout off and the clock on; afterwards every module returns to its own mode."""
        start = time.perf_counter()
        # `eval()`, twice a step, without `modules()` and __setattr__, which take longer than a small forward
        training: list[dict[str, Any]] = []
        modules = [self.model]
        for module in modules:
            if module.training:
                state = module.__dict__
                state["training"] = False
                training.append(state)
            modules += [child for child in module._modules.values() if child is not None]
        try:
            yield
        finally:
            for state in training:
                state["training"] = True
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
    mask: Tensor | None
    targets: Tensor | None
    z: Tensor

    def count(self) -> Tensor | int:
        """The tokens that count; a 0-dim tensor under a mask."""
        return self.z[..., 0].numel() if self.mask is None else self.mask.sum()


class Batch:
    """The leading `k` rows (`probe`) choose c; if an audit is due, enough of the others (`held`) judge it.

    Args:
        inputs: of the step; its `probe` rows, if given, choose c instead of the leading ones, which the audit
            still leaves out. Logits that are not given are computed.
        weight: any of the trained weights, for device and precision.
        audit: whether rows are held back for one; the batch needs more than `k` of them then.
    Raises:
        ValueError: no tokens, or logits that are not the batch's.
    """

    def __init__(
        self,
        prober: Prober,
        inputs: StepInputs,
        weight: Tensor,
        *,
        k: int,
        audit: bool,
        audit_tokens: int,
    ):
        self.prober = prober
        if prober.watched > 0 or prober.draws:
            prober.numbers = Numbers()
        logits = None if inputs.logits is None else checks.logits_in(inputs.logits)
        self.size = size = checks.rows_of(inputs.tokens, logits, inputs.mask, prober.axis)
        like = weight if logits is None else logits
        self.device = like.device.type
        cast = _low_precision(like, self.device)
        low_weights = weight.dtype in LOW_PRECISION or prober.low_precision
        self.autocast = cast if torch.is_autocast_enabled(self.device) or not low_weights else None
        self.floor = KL_FLOOR["bfloat16" if cast or low_weights else "float32"]

        drawn = prober.fresh_logits and prober.model.training
        z = None if logits is None or drawn or inputs.stale else logits.detach()
        self.reused = z is not None and inputs.probe is None  # whether z(W) was given for the probe rows
        self.probe = self._probe(inputs, z, k, size)
        self.held: Rows | None = None
        self.held_tokens = 0
        if audit:
            row = (self.probe.z if logits is None else logits)[0]
            end, self.held_tokens = _audited_rows(size, k, audit_tokens, row[..., 0].numel(), inputs.mask)
            audit_inputs = prober.cut(inputs.tokens, k, end, size)
            self.held = self._rows(audit_inputs, inputs.mask, None, z, k, end)

    def _probe(self, inputs: StepInputs, z: Tensor | None, k: int, size: int) -> Rows:
        if inputs.probe is None:
            rows = self.prober.cut(inputs.tokens, 0, k, size)
            return self._rows(rows, inputs.mask, inputs.targets, z, 0, k)
        logits, targets = inputs.probe
        rows = self.prober.cut(logits, 0, k, checks.rows_of(logits, None, None, self.prober.axis))
        return self._rows(rows, None, targets, None, 0, k)

    def _rows(
        self,
        rows: Any,
        mask: Tensor | None,
        targets: Tensor | None,
        z: Tensor | None,
        start: int,
        end: int,
    ) -> Rows:
        z = self.logits(rows, (end - start, self.size)) if z is None else z[start:end]
        mask = None if mask is None else mask[start:end]
        if mask is not None and mask.shape != z.shape[:-1]:
            raise checks.other_lengths(tuple(z.shape), tuple(mask.shape), self.size)
        return Rows(rows, mask, None if targets is None else targets[start:end], z)

    def probe_tokens(self, workers: Workers) -> Tensor | int:
        """Return how many tokens choose c, on all processes, 1 at least."""
        count = self.probe.count()
        if not workers.alone:
            count = workers.total(count)[0]
        return count.double().clamp(min=1) if isinstance(count, Tensor) else max(count, 1)

    def logits(self, rows: Any, part: tuple[int, int] | None = None) -> Tensor:
        """The logits on `rows` at the present weights, without dropout, in the training forward's precision.

        `part`: see `Prober.as_trained`; all rows are none.
        """
        with self.prober.measuring(), self._precision():
            some = part if part is not None and part[0] < part[1] else None
            return self.prober.as_trained(rows, some)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """autocast may hold a low-precision copy of a weight that was changed in place: its cache is cleared,
        and off."""
        torch.clear_autocast_cache()
        with torch.no_grad():
            if self.autocast is None:
                yield
                return
            with torch.autocast(self.device, self.autocast, cache_enabled=False):
                yield

    def moved(self, rows: Rows) -> Tensor:
        """The logits on `rows` at the present weights, which have moved from W.

        All NaN if the forward raises one of the prober's `refusals`.
        """
        try:
            z = self.logits(rows.inputs, (len(rows.z), self.size))
        except self.prober.refusals:
            return torch.full_like(rows.z, torch.nan)
        checks.same_shape(rows.z, z, self.size)
        return z

    def check_given(self, rows: Rows) -> Tensor | None:
        """How far z(W) as given lies from what the model says on `rows` now, nats per token, 0-dim.

        None where z(W) was not given.
        """
        if not self.reused:
            return None
        return mean_kl(rows.z, self.moved(rows), rows.mask)

    def cause(self, inputs: StepInputs) -> Cause:
        """Name why some rows of the logits given differ from the model's own, by two forwards on all."""
        passed = checks.logits_in(inputs.logits)
        computed = self.logits(inputs.tokens)
        if (
            computed.shape == passed.shape
            and float(mean_kl(passed, computed, inputs.mask)) <= 10 * self.floor
        ):
            return Cause.ROWS
        buffers = [(b, b.clone()) for b in self.prober.model.buffers()]
        try:
            with kept(), self._precision():
                trained = self.prober.as_trained(inputs.tokens)
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)
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
            out: Tensor = torch.func.functional_call(self.prober, weights, (self.probe.inputs,))
            checks.same_shape(self.probe.z, out)
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
        # the c down to which they are known to be; NaN: they have not been looked at
        self.known_to = 0.0 if fresh_logits is False else math.nan

    @property
    def first(self) -> bool:
        return math.isnan(self.known_to)

    def due(self, c: float) -> bool:
        """Whether to look: at first, and whenever c has fallen to a tenth of what it was then."""
        return self.first or c < 0.1 * self.known_to

    def looked_at(self, c: float) -> None:
        self.known_to = min(1.0, max(c, 1e-9))

    def renew(self) -> None:
        """Compute z(W) anew from now on, unless something else was asked for."""
        self.prober.fresh_logits = self.prober.fresh_logits or not self.settled

    def answer(self, batch: Batch, inputs: StepInputs, kl: float, alone: bool) -> bool:
        """To logits that differ by `kl`: an error, a warning, or logits that are computed anew (True).

        `alone`: whether no other process waits meanwhile. Raises ValueError at the first batch.
        """
        cause = batch.cause(inputs) if alone else Cause.UNKNOWN
        error = checks.differing(kl, batch.size if cause is Cause.ROWS else None, self.prober.axis)
        if self.first and cause is not Cause.TRAINING:
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
