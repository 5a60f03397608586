"""The batch and the logits that a step is given; wrong ones would make c fall to 0 without a word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

FEW_TOKENS = 100  # to choose c by: with fewer, one step's KL says little about the next tokens


class EBCWarning(UserWarning):
    """Something that makes a budget less exact than its reader may expect."""


def logits_in(output: Any) -> Tensor:
    """The logits (B, ..., V) in what a forward returns: itself, or its `.logits`.

    Raises TypeError or ValueError where there are none.
    """
    logits = output["logits"] if isinstance(output, dict) and "logits" in output else output
    logits = getattr(logits, "logits", logits)
    if not isinstance(logits, Tensor):
        where = "output[0]" if isinstance(output, tuple | list) else "…"
        raise TypeError(
            f"no logits in a {type(output).__name__}: say where they are, as logits_of=lambda output: "
            f"{where} to `attach`, or as forward=lambda model, batch: … to an optimizer."
        )
    if logits.ndim < 2:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)}: this looks like a loss; logits have a row for each row "
            "of the batch, and a last axis for the classes."
        )
    if not logits.is_floating_point():
        raise ValueError(f"logits of {logits.dtype}: the arguments are step(tokens, logits), in this order.")
    if logits.shape[-1] == 1:
        raise ValueError(
            "logits with one class: a softmax over it is always 1, its KL 0, and nothing would be limited. "
            "EBC is for classification; a regression has no distribution whose KL could be bounded (two "
            "logits, 0 and the model's, make a binary classifier one)."
        )
    return logits


def tensors_in(inputs: Any) -> Iterator[Tensor]:
    """Those in nested mappings and sequences."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Mapping | tuple | list):
        for value in inputs.values() if isinstance(inputs, Mapping) else inputs:
            yield from tensors_in(value)


def rows_of(tokens: Any, logits: Tensor | None, mask: Tensor | None) -> int:
    """The rows of a batch.

    Raises ValueError where there is no batch, or none of its tensors has as many rows as the logits.
    """
    if tokens is None:
        raise ValueError("step(tokens, logits) needs the batch: the budget is measured on its tokens.")
    found = [t for t in tensors_in(tokens) if t.ndim]
    if not found:
        raise ValueError("the batch holds no tensor.")
    like = next((t for t in (logits, mask) if t is not None), found[0])
    size = like.shape[0]
    if not any(t.shape[0] == size for t in found):
        raise ValueError(
            f"the logits have {size} rows, and no tensor of the batch has as many "
            f"({', '.join(str(tuple(t.shape)) for t in found)}): these are not this batch's logits."
        )
    if mask is not None and logits is not None and mask.shape != logits.shape[:-1]:
        raise ValueError(f"a mask of shape {tuple(mask.shape)} for logits of {tuple(logits.shape)}.")
    return size


def cut(inputs: Any, start: int, stop: int, size: int) -> Any:
    """Rows `start` to `stop` of a batch of `size` rows: of each tensor, in mappings and sequences, that has
    them. Tensors with another first axis (positions, shared by all rows) stay whole."""
    if isinstance(inputs, Tensor):
        return inputs[start:stop] if inputs.ndim and inputs.shape[0] == size else inputs
    if isinstance(inputs, Mapping):
        return {k: cut(v, start, stop, size) for k, v in inputs.items()}
    if isinstance(inputs, tuple | list):
        parts = [cut(v, start, stop, size) for v in inputs]
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else type(inputs)(parts)
    return inputs


def same_shape(z: Tensor, z_new: Tensor) -> None:
    """Raises ValueError unless a measuring forward's logits have the shape of those at W."""
    if z.shape != z_new.shape:
        raise ValueError(
            f"the forward on the same rows returned logits of shape {tuple(z_new.shape)}, and those given "
            f"have {tuple(z.shape)}: in evaluation mode, or without targets, this model returns other "
            "positions; pass a `forward` that returns the logits of all."
        )


def differing(kl: float) -> ValueError:
    """The error for logits that are not what the model says on the batch."""
    return ValueError(
        f"the logits given differ from the model's own on this batch by a KL of {kl:.2g} nats per token: "
        "they are another batch's, weights, logits or batch were changed since, a row's logits depend on "
        "other rows, or the training forward draws random numbers outside of Dropout modules "
        "(then pass fresh_logits=True)."
    )
