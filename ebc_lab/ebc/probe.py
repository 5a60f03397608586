"""One batch as the method sees it: the rows that choose c, the rows that audit it, and the logits on them.

Measurements run with dropout off, in the training forward's precision; sensitivities in float32 outside
autocast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .given import checks
from .logits import mean_kl, token_mean
from .options import KL_FLOOR
from .parallel.shards import fsdp_modules, gathered_dtypes, resharded
from .step import StepInputs

LOW_PRECISION = (torch.bfloat16, torch.float16)
RATES = ("dropout", "attention_dropout", "dropout_p", "drop_prob")  # of modules that call it as a function


class Prober(nn.Module):
    """A model and its user's forward as one module, so that `functional_call` can swap weights under both.

    `fresh_logits`: whether the training forward's logits are not those of the model without dropout;
    `seconds`: the host time spent measuring. `compiled`, if training calls that instead of the model, is
    called by `as_trained` alone, because rounding that differs between z(W) and z(W + c·dW) would count as
    KL. `functional_call` and transforms call the model itself.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[nn.Module, Any], Any] | None,
        fresh_logits: bool | None,
        compiled: nn.Module | None = None,
    ):
        super().__init__()
        self.model = model
        # in a tuple, so that torch does not see a second owner of the weights
        self._called = (model if compiled is None else compiled,)
        self.call = forward or _call
        self.fresh_logits = any(map(_draws, model.modules())) if fresh_logits is None else fresh_logits
        self.seconds = 0.0
        self.sharded: list[Any] = []  # the modules whose weights FSDP gathers for a forward
        self.low_precision = False  # whether the forward itself computes so, without autocast

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
        return checks.logits_in(self.call(self.model, inputs))

    def as_trained(self, inputs: Any) -> Tensor:
        """The logits by the same code as the training forward's."""
        with resharded(self.sharded):
            return checks.logits_in(self.call(self._called[0], inputs))

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Dropout off and the clock on; afterwards every module returns to its own mode."""
        start = time.perf_counter()
        # `eval()`, twice a step, without `modules()` and __setattr__, which take longer than a small forward
        training: list[dict[str, Any]] = []
        found = [self.model]
        for module in found:
            if module.training:
                state = module.__dict__
                state["training"] = False
                training.append(state)
            found += [child for child in module._modules.values() if child is not None]
        try:
            yield
        finally:
            for state in training:
                state["training"] = True
            self.seconds += time.perf_counter() - start


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
        refusals: what a forward may raise for weights that have gone too far.
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
        refusals: tuple[type[Exception], ...] = (),
    ):
        self.prober = prober
        self.refusals = refusals
        logits = None if inputs.logits is None else checks.logits_in(inputs.logits)
        size = checks.rows_of(inputs.tokens, logits, inputs.mask)
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
            held = checks.cut(inputs.tokens, k, end, size)
            self.held = self._rows(held, inputs.mask, None, z, k, end)

    def _probe(self, inputs: StepInputs, z: Tensor | None, k: int, size: int) -> Rows:
        if inputs.probe is None:
            rows = checks.cut(inputs.tokens, 0, k, size)
            return self._rows(rows, inputs.mask, inputs.targets, z, 0, k)
        given, targets = inputs.probe
        rows = checks.cut(given, 0, k, checks.rows_of(given, None, None))
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
        return Rows(
            rows,
            None if mask is None else mask[start:end],
            None if targets is None else targets[start:end],
            self.logits(rows) if z is None else z[start:end],
        )

    def logits(self, rows: Any) -> Tensor:
        """The logits on `rows` at the present weights, without dropout, in the training forward's precision.

        autocast may hold a low-precision copy of a weight that was changed in place, so its cache is cleared
        and off.
        """
        torch.clear_autocast_cache()
        context = (
            torch.autocast(self.device, self.autocast, cache_enabled=False)
            if self.autocast
            else nullcontext()
        )
        with self.prober.measuring(), torch.no_grad(), context:
            return self.prober.as_trained(rows)

    def moved(self, rows: Rows) -> Tensor:
        """The logits on `rows` at the present weights, which have moved from W.

        All NaN if the forward raises one of `refusals`.
        """
        try:
            z = self.logits(rows.inputs)
        except self.refusals:
            return torch.full_like(rows.z, torch.nan)
        checks.same_shape(rows.z, z)
        return z

    def check_given(self, rows: Rows) -> Tensor | None:
        """How far z(W) as given lies from what the model says on `rows` now, nats per token, 0-dim.

        None where z(W) was not given.
        """
        if not self.reused:
            return None
        return mean_kl(rows.z, self.moved(rows), rows.mask)

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
        targets = self.probe.targets
        assert targets is not None
        wide = z if z.dtype == torch.float64 else z.float()
        losses = F.cross_entropy(wide.flatten(0, -2), targets.flatten(), reduction="none")
        return token_mean(losses.view(targets.shape), self.probe.mask)


def _draws(module: nn.Module) -> bool:
    """Whether a module's output differs in training: batch-norm, or dropout, that of recurrent layers and of
    attention too, which have no module for it."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
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
    kept = mask[k:].reshape(size - k, -1).sum(1).cumsum(0)
    end = min(size, k + 1 + int((kept < tokens).sum()))
    return end, int(kept[end - k - 1])


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
