"""Gradients in three or five levels, with or without error feedback: what one worker would send.

Of each matrix by itself, a = gradient, or gradient + what earlier steps left out (`error_feedback`); the
compressed gradient is step·code of a, and e <- a - step·code is left out of this one. Two phases, so that a
skipped step loses nothing: `compress` proposes, `commit` keeps the residuals. Nothing is sent in one process
and no memory is saved: e is a float32 copy of the matrices. The maths is in docs/lowbit.md, "Gradients".

Ternary gradients: Wen et al., arXiv:1705.07878; more levels: Alistarh et al., arXiv:1610.02132. Error
feedback: Seide et al. 2014; Karimireddy et al., arXiv:1901.09847.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends.formulas import check_levels
from .backends.planes import matrices_size
from .backends.tensors import torch_stochastic, torch_stochastic_step
from .dispatch import default_dispatcher
from .levels import rounding_key, stochastic_step
from .ste import effective

ROUNDINGS = ("nearest", "stochastic")


class GradientQuantizer:
    """Replace gradients by what a worker would send of them.

    Args:
        levels: `ternary` or `five`.
        rounding: `nearest`, at the mean magnitude; or `stochastic`, unbiased for magnitudes up to 2.5 rms,
            from (seed, step, index of the matrix).
        error_feedback: whether what a step leaves out is added to the next gradient.
        seed: of the run.

    `last_error` is the squared error of the last compressed gradients over their square, over all matrices
    and with what was added to them: a 0-dim float32 tensor, NaN before the first and where one is not finite.
    Gradients so large that their squares overflow float32 (1e19) count as not finite.
    Raises ValueError for an unknown levels or rounding.
    """

    def __init__(
        self, levels: str, *, rounding: str = "nearest", error_feedback: bool = False, seed: int = 0
    ):
        check_levels(levels)
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding={rounding!r} is unknown: choose one of {', '.join(ROUNDINGS)}.")
        self.levels = levels
        self.rounding = rounding
        self.error_feedback = error_feedback
        self.seed = seed
        self.residuals: list[Tensor] | None = None
        self.last_error = torch.tensor(torch.nan)
        # the residuals a step would leave, float32, and whether all its gradients were finite, 0-dim
        self._proposal: tuple[list[Tensor], Tensor] | None = None
        self._sent = (0, 0)  # bytes and elements

    @property
    def grad_bits(self) -> float:
        """Return the bits per element that a worker would send: codes and a step per matrix; 0 at first."""
        size, elements = self._sent
        return 8 * size / max(1, elements)

    @torch.no_grad()
    def compress(self, gradients: Sequence[Tensor], step: int) -> list[Tensor]:
        """Return what is sent of the gradients of step `step`, decoded, of their shapes and dtypes.

        If one of them is not finite, all are returned as they are, and `commit` will keep nothing. Raises
        ValueError when their shapes are not those of the residuals.
        """
        self._proposal = None
        counts = [g.numel() for g in gradients]
        self._sent = matrices_size(counts, self.levels), sum(counts)
        # a = g + e: what this step is to send, with what earlier ones left out
        wanted = self._with_residuals([g.detach().float() for g in gradients])
        total = _products(wanted, wanted)
        finite = total.isfinite()
        if finite.device.type == "cpu" and not finite:
            self.last_error = torch.tensor(torch.nan)
            return list(gradients)
        sent = [self._sent_of(a, step, index) for index, a in enumerate(wanted)]
        # |a - s|² = |a|² - (2a - s)·s, without a tensor for the difference
        explained = 2 * _products(wanted, sent) - _products(sent, sent)
        self.last_error = torch.where(total == 0, 0.0, (1 - explained / total).clamp(min=0)).float()
        if self.error_feedback:
            self._proposal = [a - s for a, s in zip(wanted, sent, strict=True)], finite
        return _chosen(finite, sent, gradients)

    def commit(self, taken: Tensor | bool = True) -> None:
        """Keep the residuals of the last `compress`, if its step was `taken`, which may lie on the device.

        Without a proposal (none was made since the last `commit`) it does nothing.
        """
        proposal = self._proposal
        self._proposal = None
        if proposal is None or taken is False:
            return
        residuals, keep = proposal
        if isinstance(taken, Tensor):
            keep = keep & taken.to(keep.device)
        if self.residuals is None:
            self.residuals = [torch.zeros_like(r) for r in residuals]
        if keep.device.type == "cpu":
            self.residuals = _chosen(keep, residuals, self.residuals)
            return
        for r, new in zip(self.residuals, residuals, strict=True):
            r.copy_(torch.where(keep, new, r))  # in place: a CUDA graph reads the memory it was captured with

    def state_dict(self) -> dict[str, Any]:
        """Return the residuals, copied; None before the first kept step. Loads with `weights_only=True`."""
        residuals = self.residuals
        return {"residuals": None if residuals is None else [r.clone() for r in residuals]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as the quantizer that `state` was taken from; an open proposal is dropped.

        Raises ValueError when `state` has residuals but this quantizer has no error feedback, or is none.
        """
        try:
            saved = state["residuals"]
            residuals = None if saved is None else [r.detach().float().clone() for r in saved]
        except (AttributeError, LookupError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"this is no state of a GradientQuantizer ({error}): load one of its own."
            ) from None
        if saved is not None and not self.error_feedback:
            raise ValueError(
                "the saved state has residuals of error feedback: set error_feedback=True to use it."
            )
        self.residuals = residuals
        self._proposal = None

    def _with_residuals(self, gradients: list[Tensor]) -> list[Tensor]:
        if self.residuals is None:
            return gradients
        shapes = [tuple(g.shape) for g in gradients]
        expected = [tuple(r.shape) for r in self.residuals]
        if shapes != expected:
            raise ValueError(
                f"the gradients have the shapes {shapes}, but the residuals {expected}: give the same "
                "matrices, in the same order, at every step."
            )
        pairs = zip(self.residuals, gradients, strict=True)
        self.residuals = [r.to(g.device) for r, g in pairs]
        return [g + r for g, r in zip(gradients, self.residuals, strict=True)]

    def _sent_of(self, a: Tensor, step: int, index: int) -> Tensor:
        """Return step·code of one matrix, float32; NaN where it is not finite."""
        if self.rounding == "nearest":
            return effective(a, self.levels, "tensor", "absmean")
        key = rounding_key(self.seed, step, index)
        drawn = drawn_on_host if a.device.type == "cpu" else drawn_on_device
        return drawn(a, self.levels, key)


def drawn_on_host(a: Tensor, levels: str, key: int) -> Tensor:
    """Return step·(stochastic code) of a finite matrix on the CPU, float32."""
    size = float(stochastic_step(a, levels))
    codes: Tensor = default_dispatcher().stochastic(a, levels, size, key)
    return codes * torch.tensor(size)


def drawn_on_device(a: Tensor, levels: str, key: int) -> Tensor:
    """Do the same on any device, without a look from the host; NaN where the matrix is not finite."""
    size = torch_stochastic_step(a, levels)
    # at step 1 the codes of a/step have the bits of those of a at `step`
    position = (a / size).nan_to_num(0.0, 0.0, 0.0)
    return torch_stochastic(position, levels, 1.0, key) * size


def _products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two lists of float32 tensors, 0-dim float64; not finite if one is not."""
    if not left:
        return torch.zeros((), dtype=torch.float64)
    products = [torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(left, right, strict=True)]
    return torch.stack(products).sum(dtype=torch.float64)


def _chosen(flag: Tensor, yes: Sequence[Tensor], no: Sequence[Tensor]) -> list[Tensor]:
    """Return `yes` where the 0-dim flag holds, else `no`, in `no`'s dtypes; only a CPU's flag is read."""
    pairs = zip(yes, no, strict=True)
    if flag.device.type != "cpu":
        return [torch.where(flag, y.to(n.dtype), n) for y, n in pairs]
    return [y.to(n.dtype) for y, n in pairs] if flag else list(no)
