"""One batch as the method sees it: the rows that choose c, the rows that audit it, and the model's logits on either.

Probes are made with dropout off, in the training forward's precision; sensitivities in float32 outside autocast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .logits import token_mean
from .options import KL_FLOOR

LOW_PRECISION = (torch.bfloat16, torch.float16)


class Prober(nn.Module):
    """A model and its user's forward as one module, so that `functional_call` can swap weights under both.

    `fresh_logits`: whether the training forward's logits are not those of the model without dropout. `seconds` is the host
    time spent measuring.
    `compiled`, where training calls that in the model's place, is called by `as_trained` alone: rounding that differs between
    z(W) and z(W + c·dW) would count as KL. Under `functional_call` and transforms the model itself is called.
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
        self._called = (
            model if compiled is None else compiled,
        )  # in a tuple: not a second owner of the weights
        self.call = forward or _call
        if fresh_logits is None:
            kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
            fresh_logits = any(isinstance(m, kinds) and getattr(m, "p", 1) > 0 for m in model.modules())
        self.fresh_logits = fresh_logits
        self.seconds = 0.0

    def forward(self, inputs: Any) -> Tensor:
        return _logits(self.call(self.model, inputs))

    def as_trained(self, inputs: Any) -> Tensor:
        """The logits by the same code as the training forward's."""
        return _logits(self.call(self._called[0], inputs))

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Dropout off and the clock on; afterwards each module is in the mode it was in, where parts differ too."""
        start = time.perf_counter()
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.__dict__["training"] = False  # `eval()` without its walk through __setattr__, twice a step
        try:
            yield
        finally:
            for module in training:
                module.__dict__["training"] = True
            self.seconds += time.perf_counter() - start


class Batch:
    """The leading `k` rows (`probe`) choose c; when `audit` is asked for, enough of the others (`held`) to judge it.

    Args:
        tokens: the batch as the forward takes it, rows first.
        logits: the training forward's, (B, ..., V), or its output, which has them as `.logits`; None to compute them.
        mask: (B, ...) bool, the token positions that count.
        weight: any of the trained weights, for device and precision.
        targets: (B, ...) class indices of the batch.
        probe: (rows, targets) of held-back text that choose c instead of the leading rows, which the audit still leaves out.
    Raises:
        ValueError: no tokens, or no row is left for the audit.
    """

    def __init__(
        self,
        prober: Prober,
        tokens: Any,
        logits: Any,
        mask: Tensor | None,
        weight: Tensor,
        *,
        k: int,
        audit: bool,
        audit_tokens: int,
        targets: Tensor | None = None,
        probe: tuple[Any, Tensor | None] | None = None,
    ):
        if tokens is None:
            raise ValueError("step(tokens, logits) needs the batch: the budget is measured on its tokens.")
        self.prober, self.audit = prober, audit
        logits = None if logits is None else _logits(logits)
        first = mask if mask is not None else logits if logits is not None else _first_tensor(tokens)
        size = first.shape[0]
        if size <= k and audit:
            raise ValueError(f"a batch of {size} rows leaves none for the audit beside probe_sequences={k}.")
        like = logits if logits is not None else weight
        self.device = like.device.type
        enclosing = torch.is_autocast_enabled(self.device)
        cast = (
            torch.get_autocast_dtype(self.device)
            if enclosing
            else like.dtype
            if like.dtype in LOW_PRECISION
            else None
        )
        low_weights = weight.dtype in LOW_PRECISION
        self.autocast = None if low_weights else cast
        self.floor = KL_FLOOR["bfloat16" if cast or low_weights else "float32"]

        z = None if logits is None or (prober.fresh_logits and prober.model.training) else logits.detach()
        self.probe, self.probe_mask = _rows(tokens, 0, k), None if mask is None else mask[:k]
        self.probe_targets = None if targets is None else targets[:k]
        if probe is not None:
            self.probe, self.probe_mask = _rows(probe[0], 0, k), None
            self.probe_targets = None if probe[1] is None else probe[1][:k]
        self.z_probe = self.logits(self.probe) if z is None or probe is not None else z[:k]
        if not audit:
            return
        tokens_per_row = (logits if logits is not None else self.z_probe)[0, ..., 0].numel()
        if mask is None:
            rows = min(size, k - (-audit_tokens // tokens_per_row))
            self.held_tokens = (rows - k) * tokens_per_row
        else:
            kept = mask[k:].reshape(size - k, -1).sum(1).cumsum(0)
            rows = min(size, k + 1 + int((kept < audit_tokens).sum()))
            self.held_tokens = int(kept[rows - k - 1])
        self.held, self.held_mask = _rows(tokens, k, rows), None if mask is None else mask[k:rows]
        self.z_held = self.logits(self.held) if z is None else z[k:rows]

    def logits(self, rows: Any) -> Tensor:
        """The model's logits on `rows` at its present weights, without dropout, in the training forward's precision.

        autocast may hold a low-precision copy of a weight that has changed in place since: its cache is emptied and off.
        """
        torch.clear_autocast_cache()
        context = (
            torch.autocast(self.device, self.autocast, cache_enabled=False)
            if self.autocast
            else nullcontext()
        )
        with self.prober.measuring(), torch.no_grad(), context:
            return self.prober.as_trained(rows)

    def functional(self, weights: dict[str, Tensor]) -> Tensor:
        """The logits of the probe rows at other weights (`model.<name>`), in those weights' precision, outside autocast.

        Weights that are not given are the model's own.
        """
        with self.prober.measuring(), torch.autocast(self.device, enabled=False):
            out: Tensor = torch.func.functional_call(self.prober, weights, (self.probe,))
            return out

    def probe_loss(self, z: Tensor) -> Tensor:
        """Mean cross-entropy of logits on the probe rows, float32 or better, nats per token. Needs targets."""
        assert self.probe_targets is not None
        wide = z if z.dtype == torch.float64 else z.float()
        losses = F.cross_entropy(wide.flatten(0, -2), self.probe_targets.flatten(), reduction="none")
        return token_mean(losses.view(self.probe_targets.shape), self.probe_mask)


def _rows(inputs: Any, start: int, stop: int) -> Any:
    """Rows of a batch: of a tensor, or of each tensor in a mapping or sequence."""
    if isinstance(inputs, Tensor):
        return inputs[start:stop]
    if isinstance(inputs, Mapping):
        return {k: _rows(v, start, stop) for k, v in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(_rows(v, start, stop) for v in inputs)
    return inputs


def _logits(out: Any) -> Tensor:
    logits: Tensor = out.logits if hasattr(out, "logits") else out
    return logits


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def _first_tensor(inputs: Any) -> Tensor:
    if isinstance(inputs, Tensor):
        return inputs
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return _first_tensor(next(iter(values)))
