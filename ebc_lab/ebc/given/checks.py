"""The batch and the logits that a step is given; wrong ones would make c fall to 0 without a word."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

FEW_TOKENS = 100  # to choose c by: with fewer, one step's KL says little about the next tokens
ENOUGH_TOKENS = 250  # what `probe_sequences=None` takes rows for: twice as many hold the KL little closer


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
            "of the batch, and a last axis for the classes. Where the model returns its loss because it is "
            "given targets, say drop=('targets',), by their name in its forward, and EBC calls it without "
            "them; where it returns nothing else, attach to the module inside it that returns logits."
        )
    if not logits.is_floating_point():
        raise ValueError(f"logits of {logits.dtype}: the arguments are step(tokens, logits), in this order.")
    if logits.shape[-1] == 1:
        raise ValueError(
            "logits with one class: a softmax over it is always 1, its KL 0, and nothing would be limited. "
            "EBC is for classification; a regression has no distribution whose KL could be bounded. A binary "
            "classifier has two logits, 0 and the model's, as logits_of=lambda z: "
            "torch.cat([torch.zeros_like(z), z], -1); if it ends in a sigmoid, logits_of=lambda p: "
            "torch.cat([(1 - p).log(), p.log()], -1)."
        )
    return logits


def tensors_in(inputs: Any) -> Iterator[Tensor]:
    """Those in nested mappings and sequences."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Mapping | tuple | list):
        for value in inputs.values() if isinstance(inputs, Mapping) else inputs:
            yield from tensors_in(value)


def rows_of(tokens: Any, logits: Tensor | None, mask: Tensor | None, axis: int = 0) -> int:
    """The rows of a batch, which lie along `axis` of its tensors, and first in the logits and the mask.

    Raises ValueError where there is no batch, or none of its tensors has as many rows as the logits.
    """
    if tokens is None:
        raise ValueError("step(tokens, logits) needs the batch: the budget is measured on its tokens.")
    tensors = [t for t in tensors_in(tokens) if t.ndim]
    if not tensors:
        raise ValueError("the batch holds no tensor.")
    sizes = [t.shape[axis] for t in tensors if t.ndim > axis]
    like = next((t for t in (logits, mask) if t is not None), None)
    size = sizes[0] if like is None and sizes else None
    if like is not None:
        size = like.shape[0]
    if size is None or size not in sizes:
        raise ValueError(_no_rows(tensors, logits, size, axis))
    if mask is not None and logits is not None and mask.shape != logits.shape[:-1]:
        raise ValueError(f"a mask of shape {tuple(mask.shape)} for logits of {tuple(logits.shape)}.")
    return size


def _no_rows(tensors: list[Tensor], logits: Tensor | None, size: int | None, axis: int) -> str:
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
    if axis:
        return (
            f"batch_dim={axis}: the logits have {size} rows along it, and no tensor of the batch has as many "
            f"({shapes}). Logits are (T, B, V) then; where a model flattens them to (T·B, V), say "
            "logits_of=lambda z: z.unflatten(0, (T, -1)), T the length of a row."
        )
    flat = logits is not None and logits.ndim == 2 and any(logits.shape[0] == t.numel() for t in tensors)
    remedy = (
        "they are flattened: say logits_of=lambda z: z.unflatten(0, (-1, T)), T the length of a row, or for "
        "a batch of shape (T, B) logits_of=lambda z: z.unflatten(0, (T, -1)) and batch_dim=1"
        if flat
        else "these are not this batch's logits"
    )
    return f"the logits have {size} rows, and no tensor of the batch has as many ({shapes}): {remedy}."


def cut(inputs: Any, start: int, stop: int, size: int, axis: int = 0) -> Any:
    """Rows `start` to `stop` of a batch of `size` rows along `axis`: of each tensor, in mappings and
    sequences, that has them. Tensors of another size (positions, shared by all rows) stay whole."""

    def some(t: Tensor, at: int) -> Tensor:
        rows = t.narrow(at, start, min(stop, size) - start)
        return rows.contiguous() if at else rows  # models may `view` them

    return _of_rows(inputs, some, size, axis)


def turned(inputs: Any, size: int, axis: int = 0) -> Any:
    """The batch with its rows, see `cut`, in reverse order."""
    return _of_rows(inputs, lambda t, at: t.flip(at), size, axis)


def _of_rows(inputs: Any, act: Callable[[Tensor, int], Tensor], size: int, axis: int) -> Any:
    if isinstance(inputs, Tensor):
        if inputs.layout is not torch.strided:
            return inputs
        for at in (axis, 0):  # a mask of padding is (B, T) beside tokens (T, B), too
            if inputs.ndim > at and inputs.shape[at] == size:
                return act(inputs, at)
        return inputs
    if isinstance(inputs, Mapping):
        return {k: _of_rows(v, act, size, axis) for k, v in inputs.items()}
    if isinstance(inputs, tuple | list):
        parts = [_of_rows(v, act, size, axis) for v in inputs]
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else type(inputs)(parts)
    return inputs


def same_shape(z: Tensor, z_new: Tensor, size: int | None = None) -> None:
    """Raises ValueError unless a measuring forward's logits have the shape of those at W.

    `size`: the rows of the batch, if the forward was of some of them.
    """
    if z.shape == z_new.shape:
        return
    apart = [(a, b) for a, b in zip(z.shape, z_new.shape, strict=False) if a != b]
    if size is not None and z.ndim == z_new.ndim and apart == [(size, z.shape[0])]:
        raise ValueError(
            f"on {z.shape[0]} of the batch's rows the model returns logits of shape {tuple(z_new.shape)}, "
            f"and had {tuple(z.shape)} for them: the other rows are its classes. Let all of them choose c: "
            f"probe_sequences={size}."
        )
    raise ValueError(
        f"the forward on the same rows returned logits of shape {tuple(z_new.shape)}, and those given "
        f"have {tuple(z.shape)}: in evaluation mode, or without targets, this model returns other "
        "positions; pass a `forward` that returns the logits of all."
    )


def other_lengths(logits: tuple[int, ...], mask: tuple[int, ...], size: int) -> ValueError:
    """The error for logits on some rows that have other positions than on all of them."""
    return ValueError(
        f"on {mask[0]} of the batch's {size} rows the model returns logits of shape {logits}, and their mask "
        f"is {mask}: where the longest row sets the length, return that of the whole batch "
        f"(pad_packed_sequence(…, total_length=…)), or let all rows choose c, probe_sequences={size}."
    )


TIME_FIRST = "; or, if the batch is time-first, (T, B), say batch_dim=1"


def not_by_rows(rows: int, size: int, error: Exception, axis: int) -> ValueError:
    """The error for a model that cannot be called on some rows of its batch, which lie along `axis`."""
    return ValueError(
        f"EBC calls the model on {rows} of the batch's {size} rows, and that failed ({type(error).__name__}: "
        f"{str(error).strip().partition(chr(10))[0]}). A mask, positions or a class token made for {size} "
        f"rows need all of them: say probe_sequences={size}, and they choose c (none is left for "
        f"audits){'' if axis else TIME_FIRST}."
    )


def differing(kl: float, by_rows: int | None = None, axis: int = 0) -> ValueError:
    """The error for logits that are not what the model says on the batch.

    `by_rows`: the rows of the batch, along `axis`, if on all of them together the model says just that.
    """
    difference = (
        f"the logits given differ from the model's own on this batch by a KL of {kl:.2g} nats per token: "
    )
    if by_rows is not None:
        return ValueError(
            f"{difference}a row's logits depend on other rows, and EBC calls the model on some of them. Let "
            f"all choose c, probe_sequences={by_rows}{'' if axis else TIME_FIRST}."
        )
    return ValueError(
        f"{difference}they are another batch's, weights, logits or batch were changed since, a row's logits "
        "depend on other rows, or the training forward is not the one in evaluation mode (then pass "
        "fresh_logits=True)."
    )


def few_tokens(tokens: int, rows: int, size: int) -> str:
    """Return the warning for c chosen by so few tokens, of some of a batch's rows."""
    more = "take larger batches" if rows == size else f"raise probe_sequences (now {rows})"
    return (
        f"c is chosen by {tokens} tokens of each batch, and the others' KL will often be far from "
        f"the budget: {more}, or use budget='tracked'."
    )


def renewed(kl: float) -> str:
    """What is said when z(W) is computed anew from now on."""
    return (
        f"the training forward's logits differ from the model's own, without what it does in training alone, "
        f"by a KL of {kl:.2g} nats per token: from now on EBC computes them again at each step, one more "
        "forward on the rows that choose c. fresh_logits=True says so from the start."
    )


def check_counts(**counts: int) -> None:
    """Raise TypeError or ValueError unless these are whole numbers >= 0, `probe_sequences` >= 1."""
    for name, count in counts.items():
        least = 1 if name == "probe_sequences" else 0
        if not isinstance(count, int):
            raise TypeError(f"{name} must be a whole number, not {count!r}.")
        if count < least:
            raise ValueError(f"{name} must be at least {least}, not {count}.")
